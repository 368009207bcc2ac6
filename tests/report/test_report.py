"""The verdict and the exit code over every kind of run, and the forms of the report."""

from __future__ import annotations

import json

import pytest
from jsonschema import Draft202012Validator

from counter.options.client import ClientSettings
from counter.options.values import Address, AmountRange, Seconds, parse_thresholds
from counter.proof.verify import Proof
from counter.report.report import (
    as_json,
    exit_code,
    first_of,
    format_ns,
    format_s,
    judge,
    lines,
    rate,
)
from counter.report.thresholds import hold
from counter.results.result import CHECKABLE_SUM, PROCESS_DIED, Histogram, Result
from counter.results.timeline import Interval, Timeline
from kit.harness import ROOT

TOP = 2**64
HALF = CHECKABLE_SUM


def run_of(
    before: int | None,
    after: int | None,
    answered_sum: int,
    unknown_sum: int = 0,
    rises_checked: bool = True,
) -> Result:
    """A run that its totals alone can make right or wrong."""
    return Result(
        total_before=before,
        total_after=after,
        answered_sum=answered_sum,
        unknown_sum=unknown_sum,
        rises_checked=rises_checked,
    )


# The verdict

VERDICTS: dict[str, tuple[Result, str, str]] = {
    "nothing sent, nothing grown": (run_of(5, 5, 0), "ok", "exactly the 0 answered"),
    "exact": (run_of(0, 1000, 1000), "ok", "exactly the 1,000 answered"),
    "exact from another total": (run_of(77, 1077, 1000), "ok", "exactly the 1,000 answered"),
    "others added too": (run_of(0, 1500, 1000), "ok", "500 more than answered: other clients"),
    "others added and nothing was sent": (run_of(3, 4, 0), "ok", "1 more than answered: other"),
    "all unknown were counted": (run_of(0, 1010, 1000, 10), "ok", "within the 10 unknown"),
    "some unknown were counted": (run_of(0, 1001, 1000, 10), "ok", "1 more than answered, within"),
    "no unknown was counted": (run_of(0, 1000, 1000, 10), "ok", "exactly the 1,000 answered"),
    "more than the unknown": (run_of(0, 1011, 1000, 10), "ok", "11 more than answered: other"),
    "grew by one less": (run_of(0, 999, 1000), "wrong", "grew by 999, less than the 1,000"),
    "did not grow": (run_of(5, 5, 1), "wrong", "grew by 0, less than the 1"),
    "unknown excuse no loss": (run_of(0, 999, 1000, 10), "wrong", "less than the 1,000"),
    "fell": (run_of(10, 9, 0), "wrong", "the total fell from 10 to 9"),
    "fell to nothing": (run_of(16_423_170, 0, 100), "wrong", "fell from 16,423,170 to 0"),
    "exact over the top": (run_of(TOP - 10, 990, 1000), "ok", "exactly the 1,000 answered"),
    "others added over the top": (run_of(TOP - 10, 991, 1000), "ok", "1 more than answered"),
    "less over the top": (run_of(TOP - 10, 989, 1000), "wrong", "grew by 999, less than"),
    "unknown over the top": (run_of(TOP - 1, 1000, 1000, 1), "ok", "within the 1 unknown"),
    "just checkable and exact": (run_of(0, HALF - 1, HALF - 1), "ok", "exactly"),
    "just checkable and less": (run_of(0, HALF - 2, HALF - 1), "wrong", "less than"),
    "beyond 2^63 and exact": (run_of(5, HALF + 5, HALF), "ok", "exactly"),
    "beyond 2^64 and exact": (run_of(7, 8, TOP + 1), "ok", "exactly"),
    "beyond 2^63 and less": (run_of(0, HALF - 1, HALF), "not checked", "2^63"),
    "beyond 2^63 and more": (run_of(0, HALF + 1, HALF), "not checked", "2^63"),
    "beyond 2^63 with the unknown": (run_of(0, 5, 6, HALF), "not checked", "2^63"),
    "beyond 2^63 with the unknown, and exact": (run_of(0, 6, 6, HALF), "ok", "exactly"),
    "rises not checked": (run_of(0, 5, 6, rises_checked=False), "not checked", "2^63"),
    "rises not checked, and exact": (run_of(0, 6, 6, rises_checked=False), "ok", "exactly"),
    "no total before": (run_of(None, 1000, 1000), "not checked", "could not be read"),
    "no total after": (run_of(0, None, 1000), "not checked", "could not be read"),
    "no totals": (run_of(None, None, 1000), "not checked", "could not be read"),
}


@pytest.mark.parametrize(("result", "word", "reason"), VERDICTS.values(), ids=VERDICTS)
def test_totals_are_judged(result: Result, word: str, reason: str) -> None:
    verdict = judge(result)
    assert verdict.word == word
    assert reason in verdict.reason


@pytest.mark.parametrize(("before", "after"), [(0, 1000), (0, 2000), (None, None)])
def test_an_impossible_total_is_wrong_whatever_the_sum(
    before: int | None, after: int | None
) -> None:
    result = run_of(before, after, 1000)
    result.wrong = 1234
    result.wrong_examples = ["connection 7 got 5 after 9", "another"]
    verdict = judge(result)
    assert verdict.word == "wrong"
    assert verdict.reason == "1,234 impossible totals: connection 7 got 5 after 9"


def test_impossible_totals_need_no_example() -> None:
    assert judge(Result(wrong=3)).reason == "3 impossible totals"


# The exit code


@pytest.mark.parametrize(
    ("total_after", "errors", "unknown", "interrupted", "code"),
    [
        (10, 0, 0, False, 0),
        (15, 0, 0, False, 0),
        (9, 0, 0, False, 4),
        (9, 1, 1, False, 4),
        (9, 1, 1, True, 4),
        (9, 0, 0, True, 4),
        (10, 1, 0, False, 5),
        (10, 0, 1, False, 5),
        (10, 1, 1, False, 5),
        (None, 1, 0, False, 5),
        (None, 0, 0, False, 0),
        (10, 0, 0, True, 130),
        (None, 0, 0, True, 130),
        (10, 1, 0, True, 5),
        (10, 0, 1, True, 5),
    ],
)
def test_the_exit_code_is_the_first_that_applies(
    total_after: int | None, errors: int, unknown: int, interrupted: bool, code: int
) -> None:
    result = run_of(0, total_after, 10)
    result.unknown, result.interrupted = unknown, interrupted
    for _ in range(errors):
        result.count_error("reset")
    assert exit_code(result) == code


@pytest.mark.parametrize(
    ("total_after", "unknown", "interrupted", "code"),
    [(10, 0, False, 99), (10, 0, True, 99), (10, 1, False, 99), (9, 0, False, 4), (9, 1, True, 4)],
)
def test_a_breached_threshold_is_exit_99_unless_something_worse_happened(
    total_after: int, unknown: int, interrupted: bool, code: int
) -> None:
    result = run_of(0, total_after, 10)
    result.unknown, result.interrupted = unknown, interrupted
    breached = hold(result, parse_thresholds("errors<=100,p99<5ms"))
    assert exit_code(result, breached) == code


@pytest.mark.parametrize(
    ("limits", "code"),
    [("errors<3", 0), ("errors<2", 99), ("errors<3,p99<5ms", 99), ("rps>=0,p99<5ms", 5), ("", 5)],
)
def test_a_threshold_for_errors_decides_about_them(limits: str, code: int) -> None:
    result = run_of(0, 10, 10, unknown_sum=1)
    result.unknown, result.errors = 1, {"timeout": 2}
    assert exit_code(result, hold(result, parse_thresholds(limits))) == code


def test_a_load_process_that_died_is_exit_5_whatever_the_threshold() -> None:
    result = run_of(0, 10, 10)
    result.count_error(PROCESS_DIED)
    assert exit_code(result, hold(result, parse_thresholds("errors<3"))) == 5


def test_what_a_second_interrupt_did_not_wait_for_is_no_error() -> None:
    result = Result(unknown=3, interrupted=True, cut=True)
    assert exit_code(result) == 130
    result.count_error("timeout")
    assert exit_code(result) == 5


@pytest.mark.parametrize(
    ("before", "after", "wrong"), [(0, 5, 0), (50, 5, 0), (0, 5, 1)], ids=["less", "fell", "wrong"]
)
def test_a_total_that_went_down_with_connections_lost_asks_for_a_restart(
    before: int, after: int, wrong: int
) -> None:
    result = run_of(before, after, 10)
    result.wrong = wrong
    assert not judge(result).reason.endswith("?")
    result.count_error("connection closed")
    assert judge(result).word == "wrong"
    assert judge(result).reason.endswith("; was the server restarted?")


def test_an_impossible_total_does_not_ask_for_a_restart_where_the_sum_is_right() -> None:
    result = run_of(0, 10, 10)
    result.wrong, result.errors = 1, {"timeout": 1}
    assert judge(result).reason == "1 impossible totals"


def test_thresholds_that_hold_change_no_exit_code() -> None:
    result = run_of(0, 10, 10)
    assert exit_code(result, hold(result, parse_thresholds("errors<1"))) == 0
    result.interrupted = True
    assert exit_code(result, hold(result, parse_thresholds("errors<1"))) == 130


def test_of_several_exit_codes_the_first_that_applies_is_taken() -> None:
    assert first_of(5, 4) == first_of(4, 5) == 4
    assert (first_of(99, 5), first_of(130, 5), first_of(0, 5), first_of(0, 130)) == (5, 5, 5, 130)


# The table


def make_result() -> Result:
    """A minute of 1,000 requests a second, each of 1 ms but the slowest of 20 ms."""
    latencies = Histogram()
    latencies.record(1_000_000, 59_999)
    latencies.record(20_000_000)
    return Result(
        sent=61_002,
        answered=61_001,
        answered_sum=61_001,
        unknown=1,
        unknown_sum=1,
        measured=60_000,
        elapsed_s=60.01,
        latencies=latencies,
        errors={"timeout": 2, "connection reset": 1_000},
        total_before=1_000_000,
        total_after=1_061_002,
        connections=40,
        processes=2,
        cpu_share=0.5,
    )


def test_the_first_line_is_the_promised_one() -> None:
    assert lines(make_result())[0] == "All clients finished after 60 s."


def test_an_interrupted_run_says_so_first() -> None:
    result = make_result()
    result.interrupted, result.elapsed_s = True, 12.34
    assert lines(result)[0] == "Interrupted after 12.3 s."


def test_the_table_has_every_row() -> None:
    assert lines(make_result()) == [
        "All clients finished after 60 s.",
        "",
        "  clients   40 connections in 2 processes",
        "  in all    61,002 sent, 61,001 answered, warm-up and reads included",
        "  measured  60,000 requests in 60 s",
        "  rate      1,000 requests a second",
        "  latency   mean 1 ms  p50 1 ms  p90 1 ms  p99 1 ms  p99.9 1 ms  max 20 ms",
        "  errors    connection reset: 1,000, timeout: 2; outcome unknown: 1",
        "  total     1,000,000 before, 1,061,002 after",
        "  check     ok: 1 more than answered, within the 1 unknown",
        "  note      no reply in time: has the server fewer workers than connections?",
    ]


def test_each_threshold_is_a_row_of_the_table() -> None:
    result = make_result()
    rows = lines(result, hold(result, parse_thresholds("p99<5ms,max<=2ms,rps>999")))
    assert rows[10:13] == [
        "  threshold p99<5ms  ok: 1 ms",
        "  threshold max<=2ms  BREACHED: 20 ms",
        "  threshold rps>999  ok: 1,000",
    ]


def test_an_empty_run_has_a_table_too() -> None:
    assert lines(Result()) == [
        "All clients finished after 0 s.",
        "",
        "  clients   0 connections in 1 process",
        "  in all    0 sent, 0 answered, warm-up and reads included",
        "  measured  0 requests in 0 s",
        "  rate      0 requests a second",
        "  latency   none",
        "  errors    none",
        "  total     unknown before, unknown after",
        "  check     not checked: the server's total could not be read before and after",
    ]


@pytest.mark.parametrize(("share", "said"), [(0.0, False), (0.9, False), (0.91, True), (1.0, True)])
def test_a_client_that_was_the_bottleneck_says_so(share: float, said: bool) -> None:
    result = make_result()
    result.cpu_share = share
    notes = [line for line in lines(result) if "the client was the bottleneck" in line]
    assert len(notes) == said
    assert all(f"{share:.0%} of a core" in note for note in notes)


@pytest.mark.parametrize(
    ("measured", "behind", "shown"),
    [(10_000, 100, False), (10_000, 102, True), (100, 5, False), (100, 6, True)],
)
def test_requests_that_were_not_sent_are_shown_where_they_are_many(
    measured: int, behind: int, shown: bool
) -> None:
    result = Result(measured=measured, behind=behind)
    assert any(line.startswith("  behind ") for line in lines(result)) is shown
    assert json.loads(as_json(result, ClientSettings()))["behind"] == behind


def test_the_rate_is_of_the_measured_part() -> None:
    assert rate(Result(sent=10_000, measured=3000, elapsed_s=1.5)) == 2000
    assert rate(Result(measured=3000)) == 0


# JSON


def test_the_json_report_parses_and_has_its_version() -> None:
    report = json.loads(as_json(make_result(), ClientSettings()))
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


def test_the_json_report_has_latencies_in_nanoseconds() -> None:
    result = make_result()
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


# The proof


def test_a_proof_is_a_row_with_its_evidence_below() -> None:
    result = make_result()
    result.proof = Proof("impossible", "two from one total", ("the first", "the second"))
    assert lines(result)[-4:] == [
        "  verify    impossible: two from one total",
        "            the first",
        "            the second",
        "  note      no reply in time: has the server fewer workers than connections?",
    ]


@pytest.mark.parametrize(
    ("word", "code"), [("proved", 0), ("explained", 0), ("undecided", 0), ("impossible", 4)]
)
def test_only_an_impossible_run_changes_the_exit_code(word: str, code: int) -> None:
    result = run_of(0, 10, 10)
    result.proof = Proof(word, "because")
    assert exit_code(result) == code
    result.count_error("reset")
    assert exit_code(result) == (code or 5)


def test_a_proof_is_in_the_json_report_and_null_where_none_was_asked_for() -> None:
    result = make_result()
    assert json.loads(as_json(result, ClientSettings()))["verify"] is None
    result.proof = Proof("impossible", "because", ("this", "that"))
    assert json.loads(as_json(result, ClientSettings()))["verify"] == {
        "verdict": "impossible",
        "reason": "because",
        "evidence": ["this", "that"],
    }


SCHEMA = json.loads((ROOT / "docs" / "result.schema.json").read_text())


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("result", [Result(), make_result(), run_of(0, TOP - 1, TOP + 5, 3)])
def test_the_json_report_is_of_its_schema(result: Result) -> None:
    settings = ClientSettings(threshold=parse_thresholds("p99<5ms,errors<1%"))
    report = json.loads(as_json(result, settings, hold(result, settings.threshold)))
    Draft202012Validator(SCHEMA).validate(report)
    assert set(report) == set(SCHEMA["properties"]), "the schema has every name, and no other"


def test_the_json_report_has_thresholds_and_what_was_measured() -> None:
    settings = ClientSettings(threshold=parse_thresholds("max<5ms,errors<50%"))
    result = make_result()
    report = json.loads(as_json(result, settings, hold(result, settings.threshold)))
    assert report["settings"]["threshold"] == "max<5ms,errors<50%"
    assert report["thresholds"] == [
        {"threshold": "max<5ms", "ok": False, "value": 20_000_000},
        {"threshold": "errors<50%", "ok": True, "value": 1002 / 62_004},
    ]


def test_the_json_report_has_the_course_of_the_run() -> None:
    result = make_result()
    slow = Histogram()
    slow.record(20_000_000)
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
                "latency_ns": None,
            },
            {
                "start_s": 0.5,
                "seconds": 0.25,
                "requests": 1,
                "requests_per_s": 4.0,
                "latency_ns": {"p50": 20_000_000, "p99": 20_000_000, "max": 20_000_000},
            },
        ],
    }


# Times


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (0, "0 ns"),
        (1, "1 ns"),
        (0.4, "0.4 ns"),
        (12.34, "12.3 ns"),
        (999.5, "1 us"),
        (999, "999 ns"),
        (1000, "1 us"),
        (1234, "1.23 us"),
        (12_345, "12.3 us"),
        (123_456, "123 us"),
        (999_499, "999 us"),
        (999_500, "1 ms"),
        (999_999, "1 ms"),
        (1_000_000, "1 ms"),
        (1_500_000, "1.5 ms"),
        (999_999_999, "1 s"),
        (1_000_000_000, "1 s"),
        (59_940_000_000, "59.9 s"),
        (123_000_000_000, "123 s"),
        (2_000_000_000_000, "2000 s"),
    ],
)
def test_a_time_has_three_digits_and_a_unit(time_ns: float, text: str) -> None:
    assert format_ns(time_ns) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.04, "0 s"), (1, "1 s"), (60.04, "60 s"), (60.06, "60.1 s"), (100, "100 s")],
)
def test_seconds_are_given_to_a_tenth(seconds: float, text: str) -> None:
    assert format_s(seconds) == text
