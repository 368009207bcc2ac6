"""How a port is listened on: which address of a name, what accepted sockets get, what is said."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from counter.system import sockets
from counter.system.sockets import VANISHED_S, listen, longest_backlog
from counter.system.waiting import wait_readable

NOT_HERE = "192.0.2.1"  # set aside for documents: no interface has it


def resolve_to(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    """Has every name lead to these addresses, in this order."""

    def getaddrinfo(_host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, port)) for host in hosts]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_of_several_addresses_the_first_that_can_be_had_is_listened_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as those of localhost, where IPv6 is off."""
    resolve_to(monkeypatch, NOT_HERE, "127.0.0.1")
    with listen("a-name", 0, 1) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_an_error_tells_of_the_address_that_this_machine_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with listen("127.0.0.1", 0, 1) as taken:
        port = taken.getsockname()[1]
        resolve_to(monkeypatch, NOT_HERE, "127.0.0.1")
        with pytest.raises(OSError, match="cannot listen on here: address already in use; stop"):
            listen("a-name", port, 1, "here")
    resolve_to(monkeypatch, NOT_HERE)
    with pytest.raises(OSError, match=r"no interface has it, --host 0\.0\.0\.0 serves all"):
        listen("a-name", 0, 1, "here")


@pytest.mark.parametrize("vanished_s", [VANISHED_S, 300.0, 365 * 24 * 3600.0])
def test_a_peer_that_vanished_is_given_up_in_time(vanished_s: float) -> None:
    """Also with replies on the way, for which the kernel takes a quarter of an hour by itself."""
    with listen("127.0.0.1", 0, 1, vanished_s=vanished_s) as listener:
        with socket.create_connection(listener.getsockname()):
            assert wait_readable(listener.fileno(), 10)
            accepted, _ = listener.accept()
            with accepted:
                given = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
                assert given == min(2**31 - 1, vanished_s * 1000)
                assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_what_a_backlog_is_cut_to_is_known_or_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    somaxconn = tmp_path / "somaxconn"
    monkeypatch.setattr(sockets, "_SOMAXCONN", somaxconn)
    assert longest_backlog() is None
    somaxconn.write_text("128\n")
    assert longest_backlog() == 128
