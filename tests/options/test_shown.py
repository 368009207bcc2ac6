"""How settings are shown: as text of which each is read back and none has a password; as JSON."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from counter.options.client import ClientSettings
from counter.options.declare import Settings
from counter.options.parser import read_settings
from counter.options.server import ServerSettings
from counter.options.shown import plain_values, shown
from counter.options.values import Address, Seconds, parse_store, parse_thresholds

SETTINGS = [
    ServerSettings(),
    ServerSettings(set_total=5, force=True, admin_port=0, frame_timeout_s=Seconds(0.25)),
    ClientSettings(),
    ClientSettings(tls=True, tls_ca="a b", threshold=parse_thresholds("p99<5ms,rps>1"), rate=2.5),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_is_shown_is_read_back_as_it_was(settings: Settings) -> None:
    arguments = [f"{option.flag}={option.text}" for option in shown(settings) if option.is_set]
    assert read_settings(type(settings), arguments, {}) == settings


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_option_is_shown_by_its_flag_in_the_records_order(settings: Settings) -> None:
    declared = [(field.name, field.metadata["flag"]) for field in fields(settings)]
    assert [(option.name, option.flag) for option in shown(settings)] == declared


def test_what_is_not_set_is_said_so() -> None:
    texts = {option.flag: option.text for option in shown(ClientSettings(add=0))}
    assert {texts[flag] for flag in ("--json", "--threshold", "--duration")} == {"not set"}
    assert texts["--add"] == "0"
    assert texts["--read"] == "false"


def test_a_file_that_is_called_not_set_is_set() -> None:
    options = {option.flag: option for option in shown(ClientSettings(json="not set"))}
    assert (options["--json"].text, options["--json"].is_set) == ("not set", True)


def test_no_option_shows_a_password() -> None:
    url = "redis://user:secret@host/0"
    settings = ServerSettings(store=parse_store(url), host=url, tls_cert=url)
    texts = {option.flag: option.text for option in shown(settings)}
    masked = "redis://user:***@host/0"
    assert [texts[flag] for flag in ("--store", "--host", "--tlsCert")] == [masked] * 3


def test_plain_values_are_what_json_has_words_for() -> None:
    settings = ClientSettings(
        server_address=Address("::1", 80), duration_s=Seconds(90), read=True, requests=2**60
    )
    values = json.loads(json.dumps(plain_values(settings)))
    assert list(values) == [field.name for field in fields(settings)]
    assert values["server_address"] == "[::1]:80"
    assert (values["duration_s"], values["read"], values["requests"]) == (90.0, True, 2**60)
    assert (values["json"], values["threshold"]) == (None, "")
