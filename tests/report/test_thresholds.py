"""Thresholds: how they are written, and what holds them."""

from __future__ import annotations

import argparse

import pytest

from counter.options.values import parse_thresholds
from counter.report.thresholds import hold
from counter.results.histogram import Histogram
from counter.results.result import Result


def make_result() -> Result:
    """1,000 requests in 2 s: 990 of 1 ms, 9 of 10 ms, one of 100 ms; 5 errors."""
    latencies = Histogram()
    latencies.count(1_000_000, 990)
    latencies.count(10_000_000, 9)
    latencies.count(100_000_000)
    return Result(
        sent=1995, measured=1000, elapsed_s=2.0, latencies=latencies, errors={"timeout": 5}
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("p99<5ms", "ok: 1 ms"),
        ("p50<=1ms", "BREACHED: 1 ms"),  # known to within 1/128, rounded up: a little more
        ("p90<1.01ms", "ok: 1 ms"),
        ("p99.9<5ms", "BREACHED: 10 ms"),
        ("p99.9 < 0.02s", "ok: 10 ms"),
        ("P75<5MS", "ok: 1 ms"),
        ("p99.95>99ms", "ok: 100 ms"),
        ("max<100ms", "BREACHED: 100 ms"),
        ("max<=100ms", "ok: 100 ms"),
        ("max<=100000us", "ok: 100 ms"),
        ("max<=100000µs", "ok: 100 ms"),
        ("max<100000001ns", "ok: 100 ms"),
        ("max<1m", "ok: 100 ms"),
        ("mean<1.2ms", "ok: 1.18 ms"),
        ("mean<1ms", "BREACHED: 1.18 ms"),
        ("rps>499", "ok: 500"),
        ("rps>=500", "ok: 500"),
        ("rps>500", "BREACHED: 500"),
        ("rate>100", "ok: 500"),
        ("errors<6", "ok: 5"),
        ("errors<=4", "BREACHED: 5"),
        ("errors<0.3%", "ok: 0.25 %"),
        ("errors<0.1%", "BREACHED: 0.25 %"),
    ],
)
def test_a_threshold_is_held_against_what_was_measured(text: str, shown: str) -> None:
    (outcome,) = hold(make_result(), parse_thresholds(text))
    assert str(outcome) == f"{text.lower().replace(' ', '')}  {shown}"
    assert outcome.ok == shown.startswith("ok")


@pytest.mark.parametrize("text", ["p99<1m", "max<1m", "mean<1m", "rps>=0", "errors<1%"])
def test_a_run_that_measured_nothing_has_shown_nothing(text: str) -> None:
    (outcome,) = hold(Result(), parse_thresholds(text))
    assert str(outcome) == f"{text}  BREACHED: nothing was measured"


def test_errors_can_be_counted_without_a_request() -> None:
    assert hold(Result(), parse_thresholds("errors<1"))[0].ok


def test_several_thresholds_keep_their_order() -> None:
    outcomes = hold(make_result(), parse_thresholds("rps>1, p99<1ns ,max<1m"))
    assert [str(outcome.threshold) for outcome in outcomes] == ["rps>1", "p99<1ns", "max<1m"]
    assert [outcome.ok for outcome in outcomes] == [True, False, True]


@pytest.mark.parametrize("text", ["p99<5ms", "p99<5ms,rps>50000,errors<0.1%", ""])
def test_thresholds_print_as_they_are_read(text: str) -> None:
    assert str(parse_thresholds(text)) == text
    assert parse_thresholds(str(parse_thresholds(text))) == parse_thresholds(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("fast", "'fast' is not a threshold; write p99<5ms"),
        ("p99", "not a threshold"),
        ("p99<", "not a threshold"),
        ("p99=5ms", "not a threshold"),
        ("p100<5ms", "not a threshold"),
        ("p99<-5ms", "not a threshold"),
        ("p99<5d", "not a threshold"),
        ("p99<1e3ms", "not a threshold"),
        ("p99<5ms,", "'' is not a threshold"),
        ("p99<5ms;rps>1", "not a threshold"),
        ("p99<٥ms", "not a threshold"),
        ("p99<5", "threshold 'p99<5': write the unit, ns, us, ms, s or m"),
        ("p99<5%", "write the unit"),
        ("rps>50ms", "rps has no unit 'ms'"),
        ("rps>50%", "rps has no unit '%'"),
        ("errors<5s", "errors has no unit 's'"),
        ("p99<5ms,latency<1s", "'latency<1s' is not a threshold"),
    ],
)
def test_what_is_no_threshold_is_refused(text: str, why: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        parse_thresholds(text)
    assert why in str(refused.value)
