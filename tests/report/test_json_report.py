"""The result as JSON: every name of its schema, and numbers that any reader takes."""

from __future__ import annotations

import json

import pytest
from jsonschema import Draft202012Validator

from counter.options.client import ClientSettings
from counter.options.values import Address, AmountRange, Seconds, parse_thresholds
from counter.proof.history import Verdict
from counter.report.json_report import as_json
from counter.report.thresholds import hold
from counter.results.histogram import Histogram
from counter.results.result import Result
from counter.results.timeline import Interval, Timeline
from kit.harness import ROOT
from kit.runs import minute_of_load, run_of

TOP = 2**64


def test_the_json_report_parses_and_has_its_version() -> None:
    report = json.loads(as_json(minute_of_load(), ClientSettings()))
    assert report["version"] == 1
    assert (report["sent"], report["answered"], report["unknown"]) == (61_002, 61_001, 1)
    assert (report["connections"], report["processes"], report["interrupted"]) == (40, 2, False)
    assert (report["measured"], report["elapsed_s"]) == (60_000, 60.01)
    assert report["requests_per_s"] == 60_000 / 60.01
    assert report["errors"] == {"timeout": 2, "connection reset": 1000}
    assert report["check"] == {
        "verdict": "ok",
        "reason": "1 more than answered, within the 1 unknown",
    }
    assert report["client_cpu_share"] == 0.5
    assert report["python"]
    assert report["machine"]


def test_the_json_report_says_how_many_requests_were_not_sent() -> None:
    assert json.loads(as_json(Result(behind=102), ClientSettings()))["behind"] == 102


def test_the_json_report_has_latencies_in_nanoseconds() -> None:
    result = minute_of_load()
    latency = json.loads(as_json(result, ClientSettings()))["latency_ns"]
    assert list(latency) == ["mean", "p50", "p90", "p99", "p99.9", "max"]
    assert latency["mean"] == pytest.approx(1_000_316.67)
    assert latency["max"] == 20_000_000
    for name in ("p50", "p90", "p99", "p99.9"):
        assert latency[name] == result.latencies.percentile_ns(float(name[1:]))


def test_numbers_of_64_bits_are_text_in_json() -> None:
    """2^53 + 1 is the first whole number that a reader of doubles takes for another."""
    result = run_of(2**53 + 1, TOP - 1, TOP + 1, 2**63 + 1)
    report = json.loads(as_json(result, ClientSettings()), parse_int=float)
    assert report["total_before"] == "9007199254740993"
    assert report["total_after"] == "18446744073709551615"
    assert report["answered_sum"] == "18446744073709551617"
    assert report["unknown_sum"] == "9223372036854775809"


def test_totals_that_were_not_read_are_null_in_json() -> None:
    report = json.loads(as_json(Result(), ClientSettings()))
    assert (report["total_before"], report["total_after"]) == (None, None)
    assert report["answered_sum"] == "0"


def test_the_json_report_has_every_setting_as_it_is_written() -> None:
    settings = ClientSettings(
        server_address=Address("::1", 80),
        amount=AmountRange(1, 9),
        duration_s=Seconds(90),
        read=True,
    )
    written = json.loads(as_json(Result(), settings))["settings"]
    assert set(written) == set(vars(settings))
    assert written["server_address"] == "[::1]:80"
    assert written["amount"] == "1-9"
    assert (written["duration_s"], written["read"], written["requests"]) == (90.0, True, None)


def test_a_proof_is_in_the_json_report_and_null_where_none_was_asked_for() -> None:
    result = minute_of_load()
    assert json.loads(as_json(result, ClientSettings()))["verify"] is None
    result.proof = Verdict("impossible", "because", ("this", "that"))
    assert json.loads(as_json(result, ClientSettings()))["verify"] == {
        "verdict": "impossible",
        "reason": "because",
        "evidence": ["this", "that"],
    }


SCHEMA = json.loads((ROOT / "docs" / "result.schema.json").read_text())


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("result", [Result(), minute_of_load(), run_of(0, TOP - 1, TOP + 5, 3)])
def test_the_json_report_is_of_its_schema(result: Result) -> None:
    settings = ClientSettings(threshold=parse_thresholds("p99<5ms,errors<1%"))
    report = json.loads(as_json(result, settings, hold(result, settings.threshold)))
    Draft202012Validator(SCHEMA).validate(report)
    assert set(report) == set(SCHEMA["properties"]), "the schema has every name, and no other"


def test_the_json_report_has_thresholds_and_what_was_measured() -> None:
    settings = ClientSettings(threshold=parse_thresholds("max<5ms,errors<50%"))
    result = minute_of_load()
    report = json.loads(as_json(result, settings, hold(result, settings.threshold)))
    assert report["settings"]["threshold"] == "max<5ms,errors<50%"
    assert report["thresholds"] == [
        {"threshold": "max<5ms", "ok": False, "value": 20_000_000},
        {"threshold": "errors<50%", "ok": True, "value": 1002 / 62_004},
    ]


def test_the_json_report_has_the_course_of_the_run() -> None:
    result = minute_of_load()
    slow = Histogram()
    slow.count(20_000_000)
    counts = {index: count for index, count in enumerate(slow.counts) if count}
    result.timeline = Timeline(0, 0.5, [Interval(0.5, {}), Interval(0.25, counts)])
    assert json.loads(as_json(result, ClientSettings()))["timeline"] == {
        "interval_s": 0.5,
        "intervals": [
            {
                "start_s": 0.0,
                "seconds": 0.5,
                "requests": 0,
                "requests_per_s": 0.0,
                "errors": 0,
                "latency_ns": None,
            },
            {
                "start_s": 0.5,
                "seconds": 0.25,
                "requests": 1,
                "requests_per_s": 4.0,
                "errors": 0,
                "latency_ns": {"p50": 20_000_000, "p99": 20_000_000, "max": 20_000_000},
            },
        ],
    }
