"""What a run's charts and tables of many rows show, computed once: percentiles, and a run's course.

Pure. The steps of the percentiles are HdrHistogram's, so that its tools and this program's page
draw the same curve.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from counter.results.histogram import Histogram
from counter.results.result import Result

PERCENTILES: Final = (50, 90, 99, 99.9)  # that every form of the report has

# Rows for each halving of the distance to 100 %, HdrHistogram's default.
TICKS_PER_HALF: Final = 5

NS_PER_MS: Final = 1e6


@dataclass(frozen=True)
class Step:
    """So much of all requests (0 to 1) took at most this time; `count` of them."""

    value_ns: int
    share: float
    count: int


@dataclass(frozen=True)
class Moment:
    """One interval of a run; the latencies are None where nothing was answered."""

    start_s: float
    seconds: float
    requests: int
    rate: float
    p50_ns: int | None
    p99_ns: int | None
    max_ns: int | None
    errors: int = 0


def percentile_steps(histogram: Histogram) -> Iterator[Step]:
    """The percentile distribution, ever finer towards 100 %, which is the last step."""
    whole, seen, percent = len(histogram), 0, 0.0
    for value_ns, count in histogram.buckets():
        seen += count
        while 100.0 * seen / whole >= percent:
            yield Step(value_ns, percent / 100, seen)
            gap = 100.0 - percent
            if seen == whole or not gap:
                break
            percent += gap / (2 * TICKS_PER_HALF)
    if whole:
        yield Step(histogram.max_ns, 1.0, whole)


def as_hgrm(histogram: Histogram) -> str:
    """The percentile distribution as HdrHistogram writes it, in milliseconds."""
    lines = [f"{'Value':>12} {'Percentile':>14} {'TotalCount':>10} {'1/(1-Percentile)':>14}", ""]
    for step in percentile_steps(histogram):
        line = f"{step.value_ns / NS_PER_MS:12.3f} {step.share:2.12f} {step.count:10d}"
        # A plotter has no place for infinity, and leaves out a row of three columns.
        lines.append(line if step.share == 1 else f"{line} {1 / (1 - step.share):14.2f}")
    mean_ns, deviation_ns = histogram.mean_ns(), _deviation_ns(histogram)
    buckets = len(histogram.counts) >> Histogram.BITS
    lines += [
        f"#[Mean    = {mean_ns / NS_PER_MS:12.3f}, StdDeviation   = "
        f"{deviation_ns / NS_PER_MS:12.3f}]",
        f"#[Max     = {histogram.max_ns / NS_PER_MS:12.3f}, Total count    = {len(histogram):12d}]",
        f"#[Buckets = {buckets - 1:12d}, SubBuckets     = {2 << Histogram.BITS:12d}]",
    ]
    return "\n".join(lines)


def _deviation_ns(histogram: Histogram) -> float:
    mean = histogram.mean_ns()
    squares = sum(count * (value - mean) ** 2 for value, count in histogram.buckets())
    return math.sqrt(squares / max(1, len(histogram)))


def moments(result: Result) -> list[Moment]:
    """The course of a run, interval by interval."""
    line = result.timeline
    found = []
    for index, interval in enumerate(line.intervals):
        latencies = Histogram.of(interval.counts, result.latencies.max_ns)
        answered = bool(interval.counts)
        found.append(
            Moment(
                index * line.interval_s,
                interval.seconds,
                interval.requests,
                interval.rate,
                latencies.percentile_ns(50) if answered else None,
                latencies.percentile_ns(99) if answered else None,
                latencies.max_ns if answered else None,
                interval.errors,
            )
        )
    return found
