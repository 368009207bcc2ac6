"""Options: where a value comes from, what is refused and in which words, and what is hidden."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import Field, FrozenInstanceError, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counter.options.client import ClientSettings
from counter.options.parser import read_settings, unknown_variables
from counter.options.server import ServerSettings
from counter.options.values import (
    LONGEST_S,
    Address,
    AmountRange,
    Seconds,
    StoreAddress,
    masked,
    parse_seconds,
    parse_thresholds,
)
from counter.system.version import VERSION
from kit.harness import ROOT

PROPERTY = settings(deadline=None, derandomize=True)

PROGRAMS: dict[type[Any], str] = {ServerSettings: "server.py", ClientSettings: "client.py"}
PREFIXES = {ServerSettings: "COUNTER_SERVER_", ClientSettings: "COUNTER_CLIENT_"}

# Every option: a text, its value, and another text that a weaker source gives meanwhile.
EXAMPLES: dict[str, tuple[str, object, str]] = {
    "host": ("0.0.0.0", "0.0.0.0", "example.org"),
    "port": (":9000", 9000, "9001"),
    "backlog": ("16", 16, "17"),
    "multiplier": ("3", 3, "4"),
    "slice_s": ("20ms", 0.02, "3m"),
    "max_connections": ("50,000", 50_000, "60000"),
    "engine": ("Plain", "plain", "compiled"),
    "store": ("memory", StoreAddress("memory", "memory"), "elsewhere"),  # refused if not outdone
    "set_total": ("1,000", 1000, "2"),
    "force": ("true", True, "false"),
    "max_increment": ("1_000", 1000, "2"),
    "sessions": ("100", 100, "200"),
    "frame_timeout_s": ("2m", 120.0, "3m"),
    "store_timeout_s": ("10s", 10.0, "3m"),
    "write_timeout_s": ("500ms", 0.5, "3m"),
    "drain_timeout_s": ("0", 0.0, "3m"),
    "admin_port": (":8580", 8580, "8581"),
    "admin_host": ("0.0.0.0", "0.0.0.0", "example.org"),
    "idle_timeout_s": ("2m", 120.0, "3m"),
    "tls_cert": ("server.pem", "server.pem", "other.pem"),
    "tls_key": ("server.key", "server.key", "other.key"),
    "tls_client_ca": ("ca.pem", "ca.pem", "other.pem"),
    "log_level": ("ERROR", "error", "debug"),
    "log_format": ("json", "json", "text"),
    "tls": ("true", True, "false"),
    "tls_ca": ("ca.pem", "ca.pem", "other.pem"),
    "server_address": ("[::1]:9000", Address("::1", 9000), "example.org:9001"),
    "timeout_s": ("1.5", 1.5, "3m"),
    "connections": ("7", 7, "8"),
    "duration_s": ("1h", 3600.0, "3m"),
    "requests": ("100", 100, "200"),
    "warmup_s": ("250ms", 0.25, "3m"),
    "pipeline": ("16", 16, "17"),
    "rate": ("2500.5", 2500.5, "10"),
    "amount": ("1-1000", AmountRange(1, 1000), "5"),
    "processes": ("2", 2, "3"),
    "add": ("5", 5, "6"),
    "session_file": ("job-17", "job-17", "job-18"),
    "read": ("true", True, "false"),
    "json": ("-", "-", "result.json"),
    "verify": ("shared", "shared", "alone"),
    "html": ("run.html", "run.html", "other.html"),
    "hgrm": ("run.hgrm", "run.hgrm", "other.hgrm"),
    "threshold": ("p99<5ms,rps>=50000", parse_thresholds("p99<5ms,rps>=50000"), "max<1s"),
}

# What must stand on the command line beside an option, or it is refused.
BESIDE: dict[tuple[type[Any], str], list[str]] = {
    (ServerSettings, "tls_cert"): ["--tlsKey=server.key"],
    (ServerSettings, "tls_key"): ["--tlsCert=server.pem"],
    (ServerSettings, "tls_client_ca"): ["--tlsCert=server.pem", "--tlsKey=server.key"],
    (ClientSettings, "tls_key"): ["--tlsCert=me.pem"],
    (ServerSettings, "force"): ["--setTotal=1"],
    (ClientSettings, "session_file"): ["--add=1"],
}

ANY_TEXT = (
    *("host", "admin_host", "json", "html", "hgrm", "session_file"),
    *("tls_cert", "tls_key", "tls_client_ca", "tls_ca"),
)


class Option(NamedTuple):
    """One declared option of one command."""

    record: type[Any]
    declared: Field[Any]

    @property
    def name(self) -> str:
        return self.declared.name

    @property
    def flag(self) -> str:
        return str(self.declared.metadata["flag"])

    @property
    def kebab(self) -> str:
        return re.sub("[A-Z]+", lambda capitals: f"-{capitals[0].lower()}", self.flag)

    @property
    def variable(self) -> str:
        return PREFIXES[self.record] + self.kebab.lstrip("-").replace("-", "_").upper()

    @property
    def beside(self) -> list[str]:
        return BESIDE.get((self.record, self.name), [])

    def __str__(self) -> str:
        return f"{PROGRAMS[self.record]}{self.flag}"

    def arguments(self, flag: str, text: str) -> list[str]:
        if self.declared.default is False:
            return [flag] if text == "true" else []
        return [f"{flag}={text}"]


OPTIONS = [Option(record, declared) for record in PROGRAMS for declared in fields(record)]
every_option = pytest.mark.parametrize("option", OPTIONS, ids=str)
checked_options = pytest.mark.parametrize(
    "option", [option for option in OPTIONS if option.name not in ANY_TEXT], ids=str
)


def read(
    record: type[Any], arguments: Sequence[str] = (), environment: dict[str, str] | None = None
) -> Any:
    return read_settings(record, arguments, environment or {})


def read_server(*arguments: str, **environment: str) -> ServerSettings:
    settings: ServerSettings = read(ServerSettings, arguments, environment)
    return settings


def read_client(*arguments: str, **environment: str) -> ClientSettings:
    settings: ClientSettings = read(ClientSettings, arguments, environment)
    return settings


def read_printed(
    capsys: pytest.CaptureFixture[str],
    record: type[Any],
    arguments: Sequence[str],
    environment: dict[str, str] | None = None,
) -> str:
    """What goes to standard output before a good end, with nothing on standard error."""
    with pytest.raises(SystemExit) as ended:
        read(record, arguments, environment)
    captured = capsys.readouterr()
    assert (ended.value.code, captured.err) == (0, "")
    return captured.out


def read_refusal(
    capsys: pytest.CaptureFixture[str],
    record: type[Any],
    arguments: Sequence[str],
    environment: dict[str, str] | None = None,
) -> str:
    """The one line on standard error that goes with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        read(record, arguments, environment)
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (2, "")
    assert captured.err.splitlines(keepends=True) == [captured.err]
    assert captured.err.startswith(f"{PROGRAMS[record]}: ")
    assert captured.err.endswith(f"; {PROGRAMS[record]} --help lists all options\n")
    return captured.err


def write_config(directory: Path, *lines: str) -> str:
    path = directory / "counter.conf"
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


# Every option, from every source


@every_option
def test_a_flag_is_read_by_both_its_names(option: Option) -> None:
    text, value, _ = EXAMPLES[option.name]
    for flag in {option.flag, option.kebab}:
        settings = read(option.record, [*option.arguments(flag, text), *option.beside])
        assert getattr(settings, option.name) == value


@every_option
def test_an_environment_variable_is_read(option: Option) -> None:
    text, value, _ = EXAMPLES[option.name]
    settings = read(option.record, option.beside, {option.variable: text})
    assert getattr(settings, option.name) == value


@every_option
def test_a_config_file_is_read_by_both_its_names(option: Option, tmp_path: Path) -> None:
    text, value, _ = EXAMPLES[option.name]
    for flag in {option.flag, option.kebab}:
        path = write_config(tmp_path, f"{flag.lstrip('-')} = {text}")
        settings = read(option.record, ["--config", path, *option.beside])
        assert getattr(settings, option.name) == value


@every_option
def test_nothing_given_is_the_default(option: Option) -> None:
    assert getattr(read(option.record), option.name) == option.declared.default


@every_option
def test_a_flag_beats_environment_and_file(option: Option, tmp_path: Path) -> None:
    text, value, weaker = EXAMPLES[option.name]
    path = write_config(tmp_path, f"{option.flag.lstrip('-')} = {weaker}")
    for flag in {option.flag, option.kebab}:
        arguments = ["--config", path, *option.arguments(flag, text), *option.beside]
        settings = read(option.record, arguments, {option.variable: weaker})
        assert getattr(settings, option.name) == value


@every_option
def test_the_environment_beats_the_file(option: Option, tmp_path: Path) -> None:
    text, value, weaker = EXAMPLES[option.name]
    for flag in {option.flag, option.kebab}:
        path = write_config(tmp_path, f"{flag.lstrip('-')} = {weaker}")
        arguments = ["--config", path, *option.beside]
        settings = read(option.record, arguments, {option.variable: text})
        assert getattr(settings, option.name) == value


@every_option
def test_an_option_has_help_a_group_and_a_variable(
    option: Option, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # so that no line is broken within a word
    meta = option.declared.metadata
    page = " ".join(read_printed(capsys, option.record, ["--help"]).split())
    assert meta["group"] in page
    assert f"{option.flag} " in page
    assert f"[env var: {option.variable}]" in page
    assert meta["description"] in page


@every_option
def test_abbreviations_are_refused(option: Option, capsys: pytest.CaptureFixture[str]) -> None:
    text, _, _ = EXAMPLES[option.name]
    for flag in {option.flag, option.kebab}:
        line = read_refusal(capsys, option.record, option.arguments(flag[:-1], text))
        assert f"unknown argument {flag[:-1]}" in line


@checked_options
def test_a_bad_value_in_the_environment_names_the_variable(
    option: Option, capsys: pytest.CaptureFixture[str]
) -> None:
    assert option.variable in read_refusal(capsys, option.record, [], {option.variable: "?!"})


@pytest.mark.parametrize("empty", ["", "\r", "\n", "\r\n"])
@every_option
def test_an_empty_variable_is_unset(option: Option, empty: str, tmp_path: Path) -> None:
    """Container engines set `NAME=` for what was not given."""
    text, value, _ = EXAMPLES[option.name]
    path = write_config(tmp_path, f"{option.flag.lstrip('-')} = {text}")
    environment = {option.variable: empty, f"{PREFIXES[option.record]}CONFIG": empty}
    assert read(option.record, [], environment) == option.record()
    settings = read(option.record, ["--config", path, *option.beside], environment)
    assert getattr(settings, option.name) == value


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
@every_option
def test_a_line_end_behind_a_variable_is_none_of_its_value(option: Option, end: str) -> None:
    """Docker keeps the carriage return of an env file, Kubernetes the newline of a secret."""
    text, value, _ = EXAMPLES[option.name]
    settings = read(option.record, option.beside, {option.variable: text + end})
    assert getattr(settings, option.name) == value


def test_the_config_file_can_be_named_in_the_environment(tmp_path: Path) -> None:
    path = write_config(tmp_path, "port = 9000")
    assert read_server(COUNTER_SERVER_CONFIG=path).port == 9000


def test_the_config_file_takes_comments_and_empty_lines(tmp_path: Path) -> None:
    path = write_config(tmp_path, "# the port", "", "port = 9000  # of the counter", "; end")
    assert read_server("--config", path) == read_server("--port", "9000")


def test_the_config_file_may_come_from_windows(tmp_path: Path) -> None:
    """Its editors write a byte order mark first, and carriage returns at the ends of lines."""
    path = tmp_path / "counter.conf"
    path.write_bytes("\ufeffport = 9000\r\nstore = sqlite:é.db\r\n\r\nforce\r\n".encode())
    settings = read_server("--config", str(path))
    assert (settings.port, settings.store.path, settings.force) == (9000, "é.db", True)


FILES = [option for option in OPTIONS if option.declared.metadata["metavar"] == "FILE"]


@pytest.mark.parametrize("option", FILES, ids=str)
@pytest.mark.parametrize("name", ["", "name\r", "name\n"])
def test_a_file_name_is_refused_that_is_none_or_ends_unseen(
    option: Option, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = read_refusal(capsys, option.record, [f"{option.flag}={name}", *option.beside])
    assert f"argument {option.flag}" in line


@pytest.mark.parametrize("name", ["", "name\r"])
def test_so_is_such_a_name_of_the_config_file(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "argument --config: " in read_refusal(capsys, ServerSettings, [f"--config={name}"])


def test_the_last_of_several_equal_flags_counts() -> None:
    assert read_server("--port", "1", "--port", "2").port == 2


def test_thresholds_of_several_flags_and_commas_all_count(tmp_path: Path) -> None:
    wanted = parse_thresholds("p99<5ms,rps>100,errors<=3")
    assert (
        read_client("--threshold", "p99<5ms,rps>100", "--threshold=errors<=3").threshold == wanted
    )
    assert read_client(COUNTER_CLIENT_THRESHOLD="p99<5ms, rps>100 ,errors<=3").threshold == wanted
    path = write_config(tmp_path, 'threshold = "p99<5ms, rps>100, errors<=3"')
    assert read_client("--config", path).threshold == wanted


def test_thresholds_of_the_command_line_replace_those_of_the_environment() -> None:
    settings = read_client("--threshold", "max<1s", COUNTER_CLIENT_THRESHOLD="p99<5ms")
    assert settings.threshold == parse_thresholds("max<1s")
    assert read_client("--threshold=", COUNTER_CLIENT_THRESHOLD="p99<5ms").threshold == ()


def test_variables_of_others_are_left_alone() -> None:
    assert read_server(
        PORT="1", COUNTER_CLIENT_MULTIPLIER="2", COUNTER_SERVER_SERVICE_HOST="x"
    ) == (ServerSettings())


@pytest.mark.parametrize(
    ("record", "name", "hint"),
    [
        (ServerSettings, "COUNTER_SERVER_PROT", "did you mean COUNTER_SERVER_PORT?"),
        (ServerSettings, "COUNTER_SERVER_MAXCONNECTIONS", "mean COUNTER_SERVER_MAX_CONNECTIONS?"),
        (ServerSettings, "COUNTER_SERVER_ADMINPORT", "did you mean COUNTER_SERVER_ADMIN_PORT?"),
        (ServerSettings, "COUNTER_SERVER_THREADS", "server.py; --help lists all"),
        (ClientSettings, "COUNTER_CLIENT_CONECTIONS", "did you mean COUNTER_CLIENT_CONNECTIONS?"),
    ],
)
def test_a_misspelt_variable_is_worth_a_warning_with_the_nearest_name(
    record: type[Any], name: str, hint: str
) -> None:
    (line,) = unknown_variables(record, {name: "redis://:secret@host", "PATH": "/bin"})
    assert line.startswith(f"{name} is no variable of {PROGRAMS[record]}; ")
    assert line.endswith(hint)
    assert "secret" not in line


@every_option
def test_the_variable_of_an_option_is_worth_none(option: Option) -> None:
    assert unknown_variables(option.record, {option.variable: "1"}) == []


def test_what_kubernetes_sets_for_services_is_worth_none() -> None:
    """For one called counter-server, and one called counter-server-admin, with a port named web."""
    for service in ("COUNTER_SERVER", "COUNTER_SERVER_ADMIN"):
        names = [
            *("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_WEB", "PORT", "PORT_8080_TCP"),
            *(f"PORT_8080_TCP_{what}" for what in ("PROTO", "PORT", "ADDR")),
            "PORT_53_UDP",
        ]
        environment = {f"{service}_{name}": "10.0.0.7" for name in names}
        assert unknown_variables(ServerSettings, environment) == []
    assert unknown_variables(ServerSettings, {"COUNTER_SERVER_B_PORT": "tcp://10.0.0.7:80"}) == []


def test_an_empty_variable_and_that_of_another_program_are_worth_none() -> None:
    environment = {"COUNTER_SERVER_PROT": "", "COUNTER_CLIENT_PROT": "1", "COUNTER_PROT": "1"}
    assert unknown_variables(ServerSettings, environment) == []


def test_printed_settings_remark_on_a_misspelt_variable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = read_printed(capsys, ServerSettings, ["--printConfig"], {"COUNTER_SERVER_PROT": "1"})
    remark = "COUNTER_SERVER_PROT is no variable of server.py; did you mean COUNTER_SERVER_PORT?"
    assert page.endswith(f"\n# {remark}\n")


@pytest.mark.parametrize(
    ("program", "prefix", "arguments"),
    [
        ("server.py", "COUNTER_SERVER_", ["--host=no.such.host.invalid"]),
        ("client.py", "COUNTER_CLIENT_", ["--read", "--serverAddress=no.such.host.invalid:1"]),
    ],
)
def test_a_command_logs_a_misspelt_variable_in_its_own_format(
    program: str, prefix: str, arguments: list[str]
) -> None:
    ran = subprocess.run(
        [sys.executable, program, *arguments, "--logFormat=json"],
        cwd=ROOT,
        env=os.environ | {f"{prefix}PROCESES": "1"},
        capture_output=True,
    )
    first = json.loads(ran.stderr.splitlines()[0])
    assert (ran.returncode, first["level"]) == (1, "warning")
    assert first["message"].endswith(f"did you mean {prefix}PROCESSES?")


def test_arguments_and_environment_are_those_of_the_process_unless_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["server.py", "--port", "9000"])
    monkeypatch.setenv("COUNTER_SERVER_MULTIPLIER", "3")
    settings = read_settings(ServerSettings)
    assert (settings.port, settings.multiplier) == (9000, 3)


def test_settings_cannot_be_changed() -> None:
    settings = read_server()
    with pytest.raises(FrozenInstanceError):
        settings.port = 1  # type: ignore[misc]


# Values


@pytest.mark.parametrize(("text", "port"), [("8080", 8080), (":8080", 8080), ("0", 0), (":0", 0)])
def test_a_port_is_written_as_in_go_or_without_the_colon(text: str, port: int) -> None:
    assert read_server("--port", text).port == port


@pytest.mark.parametrize("text", ["", ":", "::80", "65536", "-1", "+1", "80x", "8e3", "\u0663"])
def test_what_is_no_port_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = read_refusal(capsys, ServerSettings, [f"--port={text}"])
    assert "--port" in line
    assert "not a whole number of 0 to 65535" in line


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("1ms", 0.001),
        ("5s", 5),
        ("2m", 120),
        ("1h", 3600),
        ("5", 5),
        ("0", 0),
        ("0.25", 0.25),
        (".5s", 0.5),
        ("1.5m", 90),
        (" 5 s ", 5),
        ("5S", 5),
    ],
)
def test_a_duration_has_a_unit_or_is_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(0)(text) == seconds
    assert read_client("--warmup", text).warmup_s == seconds


@pytest.mark.parametrize(
    "text", ["", "s", "ms", "five", "5 5", "-5s", "+5s", "5d", "5sec", "1m30s", "1e3", "inf", "nan"]
)
def test_what_is_no_duration_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = read_refusal(capsys, ClientSettings, [f"--warmup={text}"])
    assert f"argument --warmup: {text!r} is not a duration of 0ms to 8760h" in line
    assert "write 500ms, 5s, 2m, 1h or plain seconds" in line


@pytest.mark.parametrize("text", ["8760.1h", "31536000.001", "9" * 400, "9" * 5000 + "ms"])
def test_a_duration_of_more_than_a_year_is_refused(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a float, hundreds of digits are infinite, for which no clock waits."""
    line = read_refusal(capsys, ClientSettings, ["--warmup", text])
    assert "is not a duration of 0ms to 8760h" in line
    assert float(parse_seconds(0)("8760h")) == LONGEST_S


@pytest.mark.parametrize("flag", ["--frameTimeout", "--writeTimeout", "--slice", "--idleTimeout"])
@pytest.mark.parametrize("text", ["0", "0s", "0.9ms"])
def test_a_deadline_of_nothing_is_refused(
    flag: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = read_refusal(capsys, ServerSettings, [flag, text])
    assert f"{text!r} is not a duration of 1ms to 8760h" in line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0005, "0.5ms"),
        (0.5, "500ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (60, "1m"),
        (90, "90s"),
        (120, "2m"),
        (3600, "1h"),
        (5400, "90m"),
        (86_400, "24h"),
    ],
)
def test_a_duration_is_printed_with_its_unit(seconds: float, text: str) -> None:
    assert str(Seconds(seconds)) == text


@PROPERTY
@given(
    st.floats(0, LONGEST_S)
    | st.floats(0, 2)
    | st.integers(0, LONGEST_S * 1000).map(lambda milliseconds: milliseconds / 1000)
)
def test_a_printed_duration_is_read_back_the_same(seconds: float) -> None:
    assert parse_seconds(0)(str(Seconds(seconds))) == seconds


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("1", AmountRange(1, 1)),
        ("0", AmountRange(0, 0)),
        ("1-1000", AmountRange(1, 1000)),
        ("7-7", AmountRange(7, 7)),
        ("0-18446744073709551615", AmountRange(0, 2**64 - 1)),
    ],
)
def test_an_amount_is_a_number_or_a_range(text: str, amount: AmountRange) -> None:
    assert read_client("--amount", text).amount == amount


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("5-1", "the lower bound is above the upper one"),
        ("-5", "not a whole number"),
        ("5-", "not a whole number"),
        ("1-2-3", "not a whole number"),
        ("one", "not a whole number"),
        ("1-", "'1-' is not a whole number"),
        ("18446744073709551616", "not a whole number of 0 to 18446744073709551615"),
    ],
)
def test_what_is_no_amount_is_refused(
    text: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert why in read_refusal(capsys, ClientSettings, [f"--amount={text}"])


def test_what_is_no_threshold_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = read_refusal(capsys, ClientSettings, ["--threshold", "p99<5ms", "--threshold", "p99<5"])
    assert "argument --threshold: threshold 'p99<5': write the unit" in line


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--verify"], "alone"),
        (["--verify", "alone"], "alone"),
        (["--verify=alone"], "alone"),
        (["--verify", "shared"], "shared"),
        (["--verify", "--json", "-"], "alone"),
        (["--verify=off"], "off"),
        (["--verify", "true"], "alone"),
        (["--verify", "no"], "off"),
        ([], "off"),
    ],
)
def test_a_proof_is_asked_for_alone_or_beside_others(arguments: list[str], word: str) -> None:
    assert read_client(*arguments).verify == word


def test_a_proof_can_be_asked_for_in_the_environment() -> None:
    assert read_client(COUNTER_CLIENT_VERIFY="shared").verify == "shared"
    assert read_client(COUNTER_CLIENT_VERIFY="true").verify == "alone"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("host:80", Address("host", 80)),
        (":9000", Address("127.0.0.1", 9000)),
        ("[::1]:80", Address("::1", 80)),
    ],
)
def test_a_server_address_is_read(text: str, address: Address) -> None:
    assert read_client("--serverAddress", text).server_address == address


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("127.0.0.1", "the port is missing; write HOST:PORT"),
        ("host", "the port is missing; write HOST:PORT"),
        ("::1:80", "write IPv6 in brackets"),
        ("host:65536", "the port is not a number of 0 to 65535"),
        ("host:0", "port 0 cannot be connected to"),
    ],
)
def test_a_bad_server_address_is_refused(
    text: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = read_refusal(capsys, ClientSettings, ["--serverAddress", text])
    assert f"argument --serverAddress/--server-address: address {text!r}: {why}" in line


@pytest.mark.parametrize(
    ("cpus", "multiplier", "workers"),
    [(1, 20, 20), (2, 20, 40), (1.5, 20, 30), (1.5, 3, 5), (0.1, 3, 1), (0.5, 1, 1), (64, 1, 64)],
)
def test_workers_are_cpus_times_multiplier_rounded_up(
    cpus: float, multiplier: int, workers: int
) -> None:
    assert read_server("--multiplier", str(multiplier)).workers(cpus) == workers


def test_workers_are_rounded_up_from_the_quota_and_not_from_its_binary_fraction() -> None:
    """0.07 CPUs × 100 are 7.000000000000001 in floating point, and 7 workers."""
    for multiplier in (1, 10, 20, 25, 50, 100):
        for hundredths in range(1, 1000):
            workers = ServerSettings(multiplier=multiplier).workers(hundredths / 100)
            assert workers == math.ceil(Fraction(hundredths, 100) * multiplier)


@pytest.mark.parametrize(
    ("cpus", "multiplier", "asked", "processes"),
    [
        (1, 20, None, 1),
        (2, 20, None, 2),
        (3.9, 20, None, 3),
        (0.5, 20, None, 1),
        (0.1, 1, None, 1),
        (2, 20, 1, 1),
        (2, 20, 7, 7),
        (2, 1, 7, 2),
        (0.5, 1, 7, 1),
        (2, 20, 0, 0),
        (0.1, 1, 0, 0),
    ],
)
def test_processes_are_whole_cpus_and_never_more_than_workers(
    cpus: float, multiplier: int, asked: int | None, processes: int
) -> None:
    settings = ServerSettings(multiplier=multiplier, processes=asked)
    assert settings.process_count(cpus) == processes


@pytest.mark.parametrize(
    ("asked", "workers", "processes", "descriptors", "limit"),
    [
        (None, 40, 2, 20_000, 10_000),
        (None, 40, 2, math.inf, 10_000),
        (None, 12_000, 2, 20_000, 12_000),
        (None, 40, 2, 1024, 1920),
        (None, 40, 1, 1024, 960),
        (None, 12_000, 2, 1024, 1920),
        (100, 40, 2, 1024, 100),
        (40, 40, 2, 1024, 40),
        (100_000, 40, 2, 20_000, 39_872),
        (100_000, 40, 2, math.inf, 100_000),
        (None, 40, 2, 64, 2),
        (None, 40, 3, 10, 3),
    ],
)
def test_connections_are_ten_thousand_or_as_asked_and_never_more_than_descriptors_allow(
    asked: int | None, workers: int, processes: int, descriptors: float, limit: int
) -> None:
    settings = ServerSettings(max_connections=asked)
    assert settings.connection_limit(workers, processes, descriptors) == limit


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (None, None),
        (40, None),
        (10_000, None),
        (39, "--maxConnections 39 is fewer than the 40 workers; raise it to 40 at least, or"),
    ],
)
def test_connections_that_are_fewer_than_the_workers_are_refused_with_both_numbers(
    asked: int | None, words: str | None
) -> None:
    problem = ServerSettings(max_connections=asked).too_few_connections(40)
    assert problem is None if words is None else problem and words in problem


@pytest.mark.parametrize(
    ("arguments", "planned_duration_s"),
    [
        ([], 60),
        (["--duration", "5s"], 5),
        (["--requests", "100"], None),
        (["--requests", "100", "--duration", "5s"], 5),
    ],
)
def test_a_run_that_nothing_bounds_is_planned_for_a_minute(
    arguments: list[str], planned_duration_s: float | None
) -> None:
    assert read_client(*arguments).planned_duration_s == planned_duration_s


# Refusals


@pytest.mark.parametrize(
    ("record", "arguments", "words"),
    [
        (ServerSettings, ["--prot", "9000"], "unknown argument --prot, did you mean port?"),
        (ServerSettings, ["--max-incremnt=1"], "did you mean max-increment?"),
        (ServerSettings, ["--duration", "1s"], "unknown argument --duration"),
        (ServerSettings, ["-p", "80"], "unknown argument -p"),
        (ServerSettings, ["9000"], "unknown argument 9000"),
        (ServerSettings, ["--port", "1", "80"], "unknown argument 80"),
        (ServerSettings, ["--prot\nport"], r"unknown argument --prot\nport"),
        (ServerSettings, ["--port\r"], r"unknown argument --port\r"),
        (ServerSettings, ["--port=1", "\x1b[2J\u2028"], r"unknown argument \x1b[2J\u2028"),
        (ServerSettings, ["--port"], "argument --port: expected one argument"),
        (ServerSettings, ["--port", "a\nb"], r"'a\nb' is not a whole number"),
        (ServerSettings, ["--multiplier", "0"], "'0' is not a whole number of 1 to"),
        (ServerSettings, ["--multiplier", "1.5"], "'1.5' is not a whole number of 1 to"),
        (ServerSettings, ["--backlog", "-1"], "'-1' is not a whole number of 1 to"),
        (ServerSettings, ["--setTotal", str(2**64)], f"of 0 to {2**64 - 1}"),
        (ServerSettings, ["--setTotal", "9" * 5000], f"of 0 to {2**64 - 1}"),
        (ServerSettings, ["--host", ""], "argument --host: the host is empty; write 127.0.0.1"),
        (ServerSettings, ["--host= "], "argument --host: the host is empty; write 127.0.0.1"),
        (ServerSettings, ["--logLevel", "loud"], "is not one of debug, info, warning, error"),
        (ServerSettings, ["--logFormat", "xml"], "is not one of text, json"),
        (ServerSettings, ["--engine", "c"], "'c' is not one of auto, compiled, plain"),
        (ServerSettings, ["--maxConnections", "0"], "'0' is not a whole number of 1 to"),
        (ServerSettings, ["--store", "elsewhere"], "'elsewhere' is not a store"),
        (
            ServerSettings,
            ["--config", "missing/file"],
            "server.py: cannot read config file missing/file: No such file or directory; ",
        ),
        (ServerSettings, ["--config", "."], "server.py: cannot read config file .: Is a dir"),
        (ServerSettings, ["--config"], "argument --config: expected one argument"),
        (ClientSettings, ["--read=no!"], "argument --read: 'no!' is not one of true, yes, on, 1, "),
        (ClientSettings, ["--requests", "0"], "'0' is not a whole number of 1 to"),
        (ClientSettings, ["--pipeline", "65537"], "of 1 to 65536"),
        (ClientSettings, ["--port", "80"], "unknown argument --port"),
    ],
)
def test_a_command_line_that_cannot_be_read_ends_in_one_line(
    record: type[Any], arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in read_refusal(capsys, record, arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"prot = 9000\n", "unknown key 'prot', did you mean port?"),
        (b"port = 9000\nmax-incremnt = 5\n", "unknown key 'max-incremnt', did you mean max-incr"),
        (b"zzz = 1\n", "unknown key 'zzz'"),
        (b"duration = 1s\n", "unknown key 'duration'"),
        (b"= 9000\n", "counter.conf, line 1: write it as key = value"),
        (b"\nport = 1\n# one\n=\n", "counter.conf, line 4: write it as key = value"),
        (b"store = elsewhere\n", "'elsewhere' is not a store"),
        (b"port = [1, 2]\n", "counter.conf, line 1: write it as key = value, without a list"),
        (b"port = 1\nstore = sqlite:a\0b\n", "counter.conf, line 2: it holds a zero byte"),
        (b"port\n", "'true' is not a whole number"),
        (b"host = \xff\xfe\n", "counter.conf: it is no text in UTF-8 (byte 0xff is not)"),
        (b"[server]\nport = 1\n", "counter.conf, line 1: there are no sections; write key = value"),
        (b"--- server\n", "counter.conf, line 1: there are no sections; write key = value"),
        (b"\nport 8099\n", "counter.conf, line 2: there is no = between key and value; write it"),
        (b"--port 8099\n", "counter.conf, line 1: there is no = between key and value; write it"),
        (b"force true  # all\n", "counter.conf, line 1: there is no = between key and value"),
    ],
)
def test_a_file_that_cannot_be_read_ends_in_one_line(
    text: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "counter.conf"
    path.write_bytes(text)
    assert words in read_refusal(capsys, ServerSettings, ["--config", str(path)])


def test_an_unknown_key_names_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, "port = 9000", "maxIncremnt = 5")
    line = read_refusal(capsys, ServerSettings, ["--config", path])
    assert f"config file {path}: unknown key 'maxIncremnt', did you mean maxIncrement?" in line


def test_a_bad_flag_is_blamed_neither_on_the_environment_nor_on_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, "port = 9001")
    arguments = ["--config", path, "--port", "abc"]
    line = read_refusal(capsys, ServerSettings, arguments, {"COUNTER_SERVER_PORT": "9000"})
    assert "COUNTER_SERVER_PORT" not in line
    assert path not in line


@checked_options
def test_a_bad_value_in_the_file_names_the_file_and_the_key(
    option: Option, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in {option.flag, option.kebab}:
        path = write_config(tmp_path, f"{flag.lstrip('-')} = ?!")
        line = read_refusal(capsys, option.record, ["--config", path])
        assert line.startswith(f"{PROGRAMS[option.record]}: argument {option.flag}")
        assert f"(from file {path})" in line


def test_a_config_file_that_is_missing_is_named_with_its_variable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = read_refusal(capsys, ServerSettings, [], {"COUNTER_SERVER_CONFIG": "/missing"})
    assert "/missing" in line
    assert "(from environment COUNTER_SERVER_CONFIG)" in line
    assert "from environment" not in read_refusal(capsys, ServerSettings, ["--config", "/missing"])


def test_what_kubernetes_sets_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    environment = {"COUNTER_SERVER_PORT": "tcp://10.0.0.1:8080"}
    line = read_refusal(capsys, ServerSettings, [], environment)
    for word in ("tcp://10.0.0.1:8080", "Kubernetes", "enableServiceLinks: false"):
        assert word in line
    assert "COUNTER_SERVER_PORT" in line


def test_a_switch_in_the_environment_is_true_or_false(capsys: pytest.CaptureFixture[str]) -> None:
    assert read_client(COUNTER_CLIENT_READ="true").read is True
    assert read_client(COUNTER_CLIENT_READ="false").read is False
    line = read_refusal(capsys, ClientSettings, [], {"COUNTER_CLIENT_READ": "perhaps"})
    assert "'perhaps' is not one of true, " in line
    assert "(from environment COUNTER_CLIENT_READ)" in line


def test_the_command_line_can_undo_a_switch() -> None:
    assert read_client("--read=false", COUNTER_CLIENT_READ="true").read is False
    assert read_client("--read", COUNTER_CLIENT_READ="false").read is True


# Passwords


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://user:secret@host/0?key=counter", "redis://user:***@host/0?key=counter"),
        ("rediss://:secret@host:6379/0", "rediss://:***@host:6379/0"),
        ("redis://user:se@cr:et@host", "redis://user:***@host"),
        ("redis://user:secret/slash@host/0", "redis://user:***@host/0"),
        ("redis://user:secret space@host/0", "redis://user:***@host/0"),
        ("redis://user:secret://@host/0", "redis://user:***@host/0"),
        ("redis://host?password=secret", "redis://host?password=***"),
        ("redis://host?db=1&Password=se/c ret&key=a", "redis://host?db=1&Password=***&key=a"),
        ("'redis://host?password=secret' is", "'redis://host?password=***' is"),
        ("two: a://b:secret@c and d://e:secret@f", "two: a://b:***@c and d://e:***@f"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://user@host", "redis://user@host"),
        ("127.0.0.1:8080", "127.0.0.1:8080"),
        ("sqlite:/data/a@b", "sqlite:/data/a@b"),
        ("", ""),
    ],
)
def test_the_password_of_a_url_is_masked_and_nothing_else(text: str, shown: str) -> None:
    assert masked(text) == shown


@pytest.mark.timeout(20)  # in which a text of a tenth of this length was not looked through
def test_a_long_text_is_looked_through_in_no_time() -> None:
    text = "a" * 1_000_000
    assert masked(text) == text


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--store", "redis://user:secret@host/zero"], {}),
        (["--store=redis://:secret@host/0?database=1"], {}),
        (["--stor=redis://user:secret@host/0"], {}),
        (["redis://user:secret@host/0"], {}),
        (["--port", "redis://user:secret@host/0"], {}),
        (["--frameTimeout", "redis://user:secret@host/0"], {}),
        (["--logLevel", "redis://user:secret@host/0"], {}),
        ([], {"COUNTER_SERVER_STORE": "redis://user:secret@host/0#x"}),
        ([], {"COUNTER_SERVER_CONFIG": "redis://user:secret@host/0"}),
        (["--store", "redis://user:a secret/of mine@host/0"], {}),
        (["redis://user:a\nsecret@host/0"], {}),
    ],
)
def test_a_refusal_shows_no_password(
    arguments: list[str], environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = read_refusal(capsys, ServerSettings, arguments, environment)
    assert "secret" not in line
    assert ":***@host" in line


@pytest.mark.parametrize("line", ["store = {}?database=1", "stoer = {}", "store {} {}", "= {}"])
def test_a_refused_file_shows_no_password(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, line.replace("{}", "redis://user:secret@host/0"))
    assert "secret" not in read_refusal(capsys, ServerSettings, ["--config", path])


def test_printed_settings_show_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    page = read_printed(
        capsys, ServerSettings, ["--printConfig", "--host", "redis://user:secret@host/0"]
    )
    assert "host = redis://user:***@host/0  # command line\n" in page
    assert "secret" not in page


# Printed settings


def test_printed_settings_name_where_each_value_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, "frame-timeout = 2m", "port = 1", "multiplier = 1")
    page = read_printed(
        capsys,
        ServerSettings,
        ["--config", path, "--port=9000", "--print-config"],
        {"COUNTER_SERVER_MULTIPLIER": "3", "COUNTER_SERVER_PORT": "2"},
    )
    lines = page.splitlines()
    assert len(lines) == len(fields(ServerSettings))
    for line in (
        "host = 127.0.0.1  # default",
        "port = 9000  # command line",
        "multiplier = 3  # environment COUNTER_SERVER_MULTIPLIER",
        f"frameTimeout = 2m  # file {path}",
        "maxIncrement = 18446744073709551615  # default",
        "# setTotal is not set  # default",
    ):
        assert line in lines


@every_option
def test_each_option_is_printed_with_its_origin(
    option: Option, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, _, _ = EXAMPLES[option.name]
    key = option.flag.lstrip("-")
    path = write_config(tmp_path, f"{key} = {text}")
    origins = {
        "command line": (option.arguments(option.kebab, text), {}),
        f"environment {option.variable}": ([], {option.variable: text}),
        f"file {path}": (["--config", path], {}),
        "default": ([], {}),
    }
    for origin, (arguments, environment) in origins.items():
        page = read_printed(capsys, option.record, [*arguments, "--printConfig"], environment)
        (line,) = [line for line in page.splitlines() if line.lstrip("# ").startswith(f"{key} ")]
        assert line.endswith(f"  # {origin}")


@pytest.mark.parametrize("record", PROGRAMS)
@pytest.mark.parametrize("given", [False, True])
def test_printed_settings_are_a_config_file_of_the_same_settings(
    record: type[Any], given: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {
        option.variable: EXAMPLES[option.name][0]
        for option in OPTIONS
        if option.record is record and given and option.name != "read"  # or "add"
    }
    page = read_printed(capsys, record, ["--printConfig"], environment)
    path = write_config(tmp_path, page)
    assert read(record, ["--config", path]) == read(record, [], environment)
    assert (read(record, ["--config", path]) == record()) is not given


@pytest.mark.parametrize(
    "name",
    ["run 1.json", "run #1.json", "a ;b", "'run'.json", '"run"', "a=b:c"],
)
def test_a_file_name_is_printed_so_that_it_is_read_back(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = read_printed(capsys, ClientSettings, ["--json", name, "--printConfig"])
    assert read_client("--config", write_config(tmp_path, page)).json == name


def test_a_file_name_with_line_ends_is_printed_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = read_printed(capsys, ClientSettings, ["--json", "a\nprocesses = 2\r#", "--printConfig"])
    assert r'json = "a\nprocesses = 2\r#"  # command line' in page.splitlines()


# Help and version


@pytest.mark.parametrize("record", PROGRAMS)
def test_the_version_is_that_of_the_program(
    record: type[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_printed(capsys, record, ["--version"]) == f"counter {VERSION}\n"
    assert "--version " in read_printed(capsys, record, ["--help"])


@pytest.mark.parametrize("record", PROGRAMS)
@pytest.mark.parametrize("flag", ["--help", "-h", "--version"])
@pytest.mark.parametrize("bad", ["PROCESSES", "CONFIG"])
def test_a_bad_environment_hides_neither_help_nor_version(
    record: type[Any], flag: str, bad: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_printed(capsys, record, [flag], {PREFIXES[record] + bad: "/missing"})


def test_the_version_is_asked_for_on_the_command_line_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_server(COUNTER_SERVER_VERSION="1.4.2") == ServerSettings()
    path = write_config(tmp_path, "version = true")
    assert "argument --version" in read_refusal(capsys, ServerSettings, ["--config", path])


# Values that exclude or need each other


@pytest.mark.parametrize(
    ("record", "arguments", "words"),
    [
        (ServerSettings, ["--tlsCert", "a.pem"], "--tlsCert and --tlsKey need each other; give"),
        (ServerSettings, ["--tlsKey", "a.key"], "--tlsCert and --tlsKey need each other; give"),
        (ServerSettings, ["--tlsClientCA", "a"], "--tlsClientCA needs --tlsCert and --tlsKey"),
        (ClientSettings, ["--add=1", "--read"], "--add and --read exclude each other; give one"),
        (ClientSettings, ["--add=0", "--read"], "--add and --read exclude each other; give one"),
        (ClientSettings, ["--tlsKey", "a.key"], "--tlsKey needs --tlsCert"),
        (ClientSettings, ["--tlsCA=a", "--tlsKey=b"], "--tlsKey needs --tlsCert"),
        (ServerSettings, ["--force"], "--force needs --setTotal, without which it does nothing"),
    ],
)
def test_values_that_contradict_are_refused_and_can_be_printed(
    record: type[Any], arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{PROGRAMS[record]}: {words}" in read_refusal(capsys, record, arguments)
    assert "not set" in read_printed(capsys, record, [*arguments, "--printConfig"])


def test_a_contradiction_names_where_values_came_from_that_were_not_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {"COUNTER_CLIENT_READ": "true"}
    line = read_refusal(capsys, ClientSettings, ["--add", "1"], environment)
    assert "(--read is from environment COUNTER_CLIENT_READ)" in line
    path = write_config(tmp_path, "tlsCert = a.pem")
    line = read_refusal(capsys, ServerSettings, ["--config", path], {})
    assert f"(--tlsCert is from file {path})" in line
    assert " is from " not in read_refusal(capsys, ClientSettings, ["--add", "1", "--read"])


@pytest.mark.parametrize(
    ("record", "arguments"),
    [
        (ServerSettings, ["--tlsCert=a", "--tlsKey=b"]),
        (ServerSettings, ["--tlsCert=a", "--tlsKey=b", "--tlsClientCA=c"]),
        (ClientSettings, ["--tlsCert=a", "--tlsKey=b"]),
        (ClientSettings, ["--tlsCert=a"]),
        (ClientSettings, ["--add=1", "--read=false"]),
        (ServerSettings, ["--force", "--setTotal=0"]),
        (ServerSettings, ["--force=false"]),
    ],
)
def test_values_that_go_together_are_taken(record: type[Any], arguments: list[str]) -> None:
    assert read(record, arguments).conflict(()) is None


# One addition, and what it cannot have


@pytest.mark.parametrize(
    "flags",
    [
        *(["--json=-"], ["--html=x"], ["--hgrm=x"], ["--verify"], ["--threshold=rps>1"]),
        *(["--duration", "3s"], ["--rate=5"], ["--requests=7"], ["--connections=2"]),
        *(["--multiplier=1"], ["--processes=1"], ["--pipeline=2"], ["--warmup=0"], ["--amount=2"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("what", [["--read"], ["--add", "1"]])
def test_a_load_or_report_of_one_addition_is_refused(
    what: list[str], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flag = flags[0].partition("=")[0]
    line = read_refusal(capsys, ClientSettings, [*what, *flags])
    assert f"{flag} needs a load; --add and --read make none" in line


def test_what_the_environment_asks_of_every_load_does_not_hinder_a_read(tmp_path: Path) -> None:
    assert read_client("--read", COUNTER_CLIENT_JSON="run.json").json == "run.json"
    assert read_client("--read", COUNTER_CLIENT_DURATION="3s").duration_s == 3
    path = write_config(tmp_path, "rate = 5")
    assert read_client("--add=1", "--config", path).rate == 5


def test_a_force_that_is_set_for_every_start_does_not_hinder_one_without_a_total() -> None:
    assert read_server(COUNTER_SERVER_FORCE="true").force is True


# Standard output that cannot be written


@pytest.mark.parametrize("program", ["server.py", "client.py"])
@pytest.mark.parametrize("flag", ["--help", "--version", "--printConfig"])
def test_what_cannot_be_shown_is_exit_1_in_one_line_or_none(program: str, flag: str) -> None:
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [sys.executable, program, flag], cwd=ROOT, stdout=full, stderr=subprocess.PIPE
        )
    why = "cannot write to standard output: No space left on device"
    assert (ran.returncode, ran.stderr.decode()) == (1, f"{program}: {why}\n")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ran = subprocess.run(
            [sys.executable, program, flag], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE
        )
    finally:
        os.close(writer)
    assert (ran.returncode, ran.stderr) == (1, b"")


@pytest.mark.parametrize("program", ["server.py", "client.py"])
def test_a_command_without_its_packages_says_what_to_install(program: str) -> None:
    ran = subprocess.run([sys.executable, "-S", program, "--help"], cwd=ROOT, capture_output=True)
    assert ran.returncode == 2
    line = rf"{program}: \w+ is not installed; pip install -r requirements\.txt\n"
    assert re.fullmatch(line, ran.stderr.decode())


@pytest.mark.parametrize("processes", ["0", "2"])
@pytest.mark.parametrize(
    ("package", "flags"),
    [
        ("numpy", []),
        ("prometheus_client", ["--adminPort", "0"]),
        ("redis", ["--store", "redis://127.0.0.1:1/0"]),
        ("redis", ["--store", "rediss://127.0.0.1:1/0"]),
    ],
)
def test_a_package_that_only_the_processes_import_is_missed_before_they_are_forked(
    package: str, flags: list[str], processes: str
) -> None:
    flags = ["--port", "0", "--processes", processes, *flags]
    script = f"import sys; sys.modules[{package!r}] = None; import server; "
    ran = subprocess.run(
        [sys.executable, "-c", f"{script} sys.exit(server.main({flags}))"],
        cwd=ROOT,
        capture_output=True,
        timeout=20,
    )
    line = f"server.py: {package} is not installed; pip install -r requirements.txt\n"
    assert (ran.returncode, ran.stdout, ran.stderr.decode()) == (2, b"", line)


@pytest.mark.parametrize("program", ["server.py", "client.py"])
@pytest.mark.parametrize("how", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--printConfig", 0), ("--nope", 2)])
def test_closed_streams_change_no_exit_code(program: str, how: str, flag: str, code: int) -> None:
    ran = subprocess.run(
        ["sh", "-c", f'exec "$0" "$@" {how}', sys.executable, program, flag],
        cwd=ROOT,
        capture_output=True,
    )
    assert (ran.returncode, b"Traceback" in ran.stderr) == (code, False)


@pytest.mark.parametrize("program", ["server.py", "client.py"])
@pytest.mark.parametrize("encoding", ["ascii", "iso8859-1"])
@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--printConfig", 0), ("--né", 2)])
def test_what_an_encoding_lacks_hinders_no_word(
    program: str, encoding: str, flag: str, code: int
) -> None:
    variables = {"PYTHONIOENCODING": encoding, "COUNTER_SERVER_TLS_CLIENT_CA": "é€"}
    ran = subprocess.run(
        [sys.executable, program, flag],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
    )
    assert (ran.returncode, b"Traceback" in ran.stderr) == (code, False)
    assert ran.stderr if code else ran.stdout


@pytest.mark.parametrize("program", ["server.py", "client.py"])
@pytest.mark.parametrize("flag", ["-P", "-I"])
def test_a_command_finds_its_own_modules_where_python_searches_no_folder_of_its_own(
    program: str, flag: str, tmp_path: Path
) -> None:
    (tmp_path / "counter.py").write_text("raise SystemExit('a stranger was imported')")
    ran = subprocess.run(
        [sys.executable, flag, ROOT / program, "--version"], cwd=tmp_path, capture_output=True
    )
    assert (ran.returncode, ran.stdout) == (0, f"counter {VERSION}\n".encode())
