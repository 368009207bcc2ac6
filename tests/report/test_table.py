"""The closing table, row by row."""

from __future__ import annotations

import pytest

from counter.options.values import parse_thresholds
from counter.proof.history import Verdict
from counter.report.table import lines
from counter.report.thresholds import hold
from counter.results.result import Result
from kit.runs import minute_of_load


def test_the_first_line_is_the_promised_one() -> None:
    assert lines(minute_of_load())[0] == "All clients finished after 60 s."


def test_an_interrupted_run_says_so_first() -> None:
    result = minute_of_load()
    result.interrupted, result.elapsed_s = True, 12.34
    assert lines(result)[0] == "Interrupted after 12.3 s."


def test_the_table_has_every_row() -> None:
    assert lines(minute_of_load()) == [
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
        "  note      no reply in time: is the store away, or --maxConnections reached?",
    ]


def test_each_threshold_is_a_row_of_the_table() -> None:
    result = minute_of_load()
    rows = lines(result, hold(result, parse_thresholds("p99<5ms,max<=2ms,rps>999")))
    assert rows[10:13] == [
        "  threshold p99<5ms  ok: 1 ms",
        "  threshold max<=2ms  BREACHED: 20 ms",
        "  threshold rps>999  ok: 1,000",
    ]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("connect: too many open files", "raise the descriptor limit (ulimit -n), or lower"),
        ("too many open files", "raise the descriptor limit (ulimit -n), or lower"),
        ("connect: cannot assign requested address", "every local port is taken: lower --conn"),
    ],
)
def test_an_error_that_the_machine_is_the_cause_of_has_its_remedy(error: str, remedy: str) -> None:
    (note,) = [row for row in lines(Result(errors={error: 3})) if row.startswith("  note")]
    assert note.startswith(f"  note      {remedy}")


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
    result = minute_of_load()
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


def test_a_proof_is_a_row_with_its_evidence_below() -> None:
    result = minute_of_load()
    result.proof = Verdict("impossible", "two from one total", ("the first", "the second"))
    assert lines(result)[-4:] == [
        "  verify    impossible: two from one total",
        "            the first",
        "            the second",
        "  note      no reply in time: is the store away, or --maxConnections reached?",
    ]
