"""Runs as the tests of results and reports need them."""

from __future__ import annotations

from counter.results.histogram import Histogram
from counter.results.result import Result


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


def minute_of_load() -> Result:
    """A minute of 1,000 requests a second, each of 1 ms but the slowest of 20 ms."""
    latencies = Histogram()
    latencies.count(1_000_000, 59_999)
    latencies.count(20_000_000)
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
