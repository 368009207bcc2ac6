"""How a store is written: what is read, what is refused, and that no refusal shows a password."""

from __future__ import annotations

import argparse

import pytest

from counter.options.values import StoreAddress, parse_path, parse_store


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("memory", StoreAddress("memory", "memory")),
        ("sqlite:counter.db", StoreAddress("", "sqlite", path="counter.db")),
        ("sqlite:/data/a b:c@d?e#f", StoreAddress("", "sqlite", path="/data/a b:c@d?e#f")),
        ("redis://host", StoreAddress("", "redis", url="redis://host", key="counter")),
        ("redis://host/", StoreAddress("", "redis", url="redis://host/", key="counter")),
        (
            "redis://u:p%2F%40@[::1]:7/3?key=a%20b%2Fc",
            StoreAddress("", "redis", url="redis://u:p%2F%40@[::1]:7/3", key="a b/c"),
        ),
        ("redis://h/0?key={a}:b", StoreAddress("", "redis", url="redis://h/0", key="{a}:b")),
        (
            "rediss://h/0?ssl_ca_certs=/a/b&key=k&ssl_cert_reqs=none",
            StoreAddress(
                "",
                "rediss",
                url="rediss://h/0?ssl_ca_certs=%2Fa%2Fb&ssl_cert_reqs=none",
                key="k",
            ),
        ),
    ],
)
def test_a_store_is_read_as_it_is_written(text: str, address: StoreAddress) -> None:
    read = parse_store(text)
    assert read.text == text
    assert (read.kind, read.path) == (address.kind, address.path)
    assert (read.url, read.key) == (address.url, address.key)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' is not a store; write memory, sqlite:PATH or redis://HOST:PORT/0"),
        ("Memory", "is not a store"),
        ("memory:", "is not a store"),
        ("sqlite", "is not a store"),
        ("sqlite:", "is not a store"),
        ("sqlite::memory:", "is not a store"),
        ("sqlite:///counter.db", "is a URL; write sqlite:PATH for"),
        ("sqlite:////data/counter.db", "sqlite:/PATH for one from the root"),
        ("sqlite:file:counter.db?mode=rw", "is a URL; write sqlite:PATH for"),
        ("sqlite://counter.db", "is a URL; write sqlite:PATH for"),
        ("counter.db", "is not a store"),
        ("postgres://host/0", "is not a store"),
        ("unix:///run/redis.sock", "is not a store"),
        ("redis:host", "write redis://HOST:PORT/0"),
        ("redis://", "write redis://HOST:PORT/0"),
        ("redis:///0", "write redis://HOST:PORT/0"),
        ("redis://host:port", "write redis://HOST:PORT/0"),
        ("redis://host:0", "write redis://HOST:PORT/0"),
        ("redis://host:65536", "write redis://HOST:PORT/0"),
        ("redis://[::1", "write redis://HOST:PORT/0"),
        ("redis://host/0 ", "a space %20"),
        ("redis://host/0#x", "a # in a password is %23"),
        ("redis://host/db", "the number of the database"),
        ("redis://host/0/1", "the number of the database"),
        ("redis://host/-1", "the number of the database"),
        ("redis://host/0?database=1", "unknown parameter 'database'; there is key"),
        ("redis://host/0?ssl_ca_certs=/a", "unknown parameter 'ssl_ca_certs'; there is key"),
        ("rediss://host/0?ssl_password=a", "there is key, ssl_ca_certs"),
        ("redis://host/0?key=", "parameter 'key' needs one value"),
        ("redis://host/0?key=a&key=b", "parameter 'key' needs one value"),
        ("redis://host/0?key", "redis://host/0?key"),
        ("redis://host/0?key={}", "braces in the key are a hash tag"),
        ("redis://host/0?key={a", "braces in the key are a hash tag"),
        ("redis://host/0?key=a}b{", "braces in the key are a hash tag"),
        ("redis://host/0?key={a}{b}", "braces in the key are a hash tag"),
    ],
)
def test_what_is_no_store_is_refused_with_what_would_do(text: str, reason: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        parse_store(text)
    assert reason in str(caught.value)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "redis://user:hunter2@host/zero",
        "redis://:hunter2@host/0?database=1",
        "redis://user:hunter2@host:port/0",
        "redis://user:hunter2@host/0#x",
        "redis://user:hunter2#@host/0",
        "redis://user:hunt/hunter2@host/0",
        "redis://user:hunt?hunter2@host/0",
        "redis://user:hunt hunter2@host/0",
        "redis://user:hunt@hunter2@host:x/0",
        "redis://user:[hunter2@host/0",
        "rediss://host/0?password=hunter2",
        "redis://host/0?password=hunter2&key=a",
        "valkey://user:hunter2@host/0",
        "http://user:hunter2@host/0",
    ],
)
def test_a_refusal_of_a_store_shows_no_password(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        parse_store(text)
    assert "hunter2" not in str(caught.value)
    assert "***" in str(caught.value)


UNSEEN = ["\r", "\n", "\t", "\0", "\x1b", "\x7f", "\x85", " ", "\xa0", "\u200b", "\ufeff"]


@pytest.mark.parametrize("end", UNSEEN)
def test_a_path_with_something_unseen_at_an_end_is_refused(end: str) -> None:
    """A line end that was left there makes another file of it than whoever reads it sees."""
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        parse_path(f"counter.db{end}")
    assert repr(f"counter.db{end}") in str(caught.value)
    with pytest.raises(argparse.ArgumentTypeError, match="ends in a space or control character"):
        parse_store(f"sqlite:counter.db{end}")
    with pytest.raises(argparse.ArgumentTypeError, match="begins in a space or control character"):
        parse_store(f"sqlite:{end}counter.db")


@pytest.mark.parametrize("text", ["counter.db", "a b", "a\rb", "-", "caf\u00e9", "\udce9"])
def test_any_other_path_is_taken_as_it_is(text: str) -> None:
    assert parse_path(text) == text


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="the file name is empty"):
        parse_path("")


def test_a_store_is_shown_without_its_password() -> None:
    address = parse_store("redis://user:hunter2@host/0?key=k")
    assert str(address) == f"{address}" == "redis://user:***@host/0?key=k"
