"""The log: no flood of lines, and lines that people and programs can read."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from counter.system.log import LINE_INTERVAL_S, LimitedLog, configure_log
from kit.lines import LineList


@dataclass
class FakeClock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Bench:
    """A limited log with its clock in the test's hand."""

    def __init__(self) -> None:
        handler = LineList()
        logger = logging.Logger("test", logging.DEBUG)
        logger.addHandler(handler)
        self.clock = FakeClock()
        self.lines = handler.lines
        self.log = LimitedLog(logger, interval_s=10, clock=self.clock)

    def take_lines(self) -> list[str]:
        taken = self.lines[:]
        self.lines.clear()
        return taken


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def bare_root() -> Iterator[logging.Logger]:
    """The root logger without the handlers of the test runner, which come back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


# Limited


def test_the_first_line_of_a_kind_is_logged_at_once(bench: Bench) -> None:
    bench.log.warning("pool", "all %d workers are taken", 8)
    assert bench.lines == ["WARNING all 8 workers are taken"]


def test_one_line_of_a_kind_is_logged_in_an_interval(bench: Bench) -> None:
    for step in range(100):
        bench.clock.now_s = 1000 + step / 10  # to 9.9 s after the first
        bench.log.warning("pool", "full")
    assert bench.lines == ["WARNING full"]


def test_the_next_line_says_how_many_were_left_out(bench: Bench) -> None:
    for _ in range(4):
        bench.log.warning("pool", "full")
    bench.clock.now_s += 10
    bench.log.warning("pool", "full: %d", 8)
    assert bench.lines == ["WARNING full", "WARNING full: 8 (3 more like it were left out)"]


def test_what_was_left_out_is_said_once(bench: Bench) -> None:
    for _ in range(2):
        bench.log.warning("pool", "full")
    bench.clock.now_s += 10
    bench.log.warning("pool", "full")
    bench.take_lines()
    bench.clock.now_s += 10
    bench.log.warning("pool", "full")
    bench.log.flush()
    assert bench.lines == ["WARNING full"]


def test_the_interval_begins_at_the_line_that_was_logged(bench: Bench) -> None:
    for now_s in (1000.0, 1009.0, 1010.0, 1019.9, 1020.0):
        bench.clock.now_s = now_s
        bench.log.warning("pool", "at %g", now_s)
    assert bench.lines == [
        "WARNING at 1000",
        "WARNING at 1010 (1 more like it was left out)",
        "WARNING at 1020 (1 more like it was left out)",
    ]


def test_kinds_are_limited_apart(bench: Bench) -> None:
    for _ in range(2):
        bench.log.warning("pool", "full")
        bench.log.warning("frame", "refused")
    bench.log.warning("frame", "refused")
    assert bench.take_lines() == ["WARNING full", "WARNING refused"]
    bench.clock.now_s += 10
    bench.log.warning("frame", "refused")
    bench.log.warning("pool", "full")
    assert bench.lines == [
        "WARNING refused (2 more like it were left out)",
        "WARNING full (1 more like it was left out)",
    ]


def test_the_end_says_what_is_still_left_out_and_says_it_once(bench: Bench) -> None:
    for _ in range(3):
        bench.log.warning("pool", "full")
        bench.log.warning("frame", "refused")
    bench.log.warning("frame", "refused")
    bench.log.warning("once", "alone")
    for _ in range(2):
        bench.log.warning("accept", "cannot")
    bench.take_lines()
    bench.log.flush()
    assert bench.take_lines() == [
        "WARNING pool: 2 more warnings were left out",
        "WARNING frame: 3 more warnings were left out",
        "WARNING accept: 1 more warning was left out",
    ]
    bench.log.flush()
    assert bench.lines == []


def test_a_percent_sign_of_a_peer_is_only_text(bench: Bench) -> None:
    for _ in range(2):
        bench.log.warning("frame", "refused %r", "%s %d %")
    bench.clock.now_s += 10
    bench.log.warning("frame", "refused %r", "%s %d %")
    assert bench.lines == [
        "WARNING refused '%s %d %'",
        "WARNING refused '%s %d %' (1 more like it was left out)",
    ]


def test_the_interval_is_ten_seconds_unless_told() -> None:
    bench = Bench()
    log = LimitedLog(logging.getLogger("unused"), clock=bench.clock)
    assert (LINE_INTERVAL_S, vars(log)["_interval_s"]) == (10.0, LINE_INTERVAL_S)


# Configured


def test_a_json_line_is_one_object_with_its_fields(
    bare_root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_log("info", "json")
    logging.getLogger("counter").warning('refused %s from "%s"', "zwölf\nlines", "[::1]:80")
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    entry = json.loads(captured.err)
    moment = entry.pop("time")
    assert entry == {
        "level": "warning",
        "pid": os.getpid(),
        "message": 'refused zwölf\nlines from "[::1]:80"',
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", moment)


def test_the_time_of_a_json_line_is_utc_to_the_millisecond(bare_root: logging.Logger) -> None:
    configure_log("info", "json")
    record = logging.makeLogRecord({"msg": "x", "created": 1_700_000_000.007, "msecs": 7.0})
    entry = json.loads(bare_root.handlers[0].format(record))
    assert entry["time"] == "2023-11-14T22:13:20.007Z"


def test_a_json_line_carries_the_error(
    bare_root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_log("info", "json")
    try:
        raise ValueError("no such total")
    except ValueError:
        logging.getLogger("counter").exception("lost")
    entry = json.loads(capsys.readouterr().err)
    assert (entry["level"], entry["message"]) == ("error", "lost")
    assert entry["error"].startswith("Traceback")
    assert entry["error"].endswith("ValueError: no such total")


def test_a_text_line_has_time_process_level_and_message(
    bare_root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_log("info", "text")
    logging.getLogger("counter").info("ready: %d workers", 40)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(
        rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} {os.getpid()} INFO ready: 40 workers\n",
        captured.err,
    )


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    ("level", "shown"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)]
)
def test_lines_below_the_level_are_not_logged(
    level: str,
    shown: int,
    form: str,
    bare_root: logging.Logger,
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_log(level, form)
    for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logging.getLogger("counter").log(number, "line")
    assert capsys.readouterr().err.count("\n") == shown


def test_configuring_twice_logs_each_line_once(
    bare_root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_log("info", "text")
    configure_log("info", "json")
    logging.getLogger("counter").info("once")
    assert json.loads(capsys.readouterr().err)["message"] == "once"
