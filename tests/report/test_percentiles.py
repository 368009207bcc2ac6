"""Percentile curves against HdrHistogram's own package, and the course of a run."""

from __future__ import annotations

import io
import re

import pytest
from hdrh.histogram import HdrHistogram
from hypothesis import given, settings
from hypothesis import strategies as st

from counter.report.percentiles import as_hgrm, moments, percentile_steps
from counter.results.histogram import Histogram
from counter.results.result import Result
from counter.results.timeline import Interval, Timeline

PROPERTY = settings(deadline=None, derandomize=True)

# The longest time of its bucket, so that the exact maximum is the package's as well.
edges_ns = st.builds(
    lambda bits, steps: ((128 + steps) << bits) - 1, st.integers(0, 33), st.integers(1, 127)
)


def write_by_package(times: dict[int, int]) -> str:
    """What the package writes of these times, whose buckets are the same with two digits."""
    theirs = HdrHistogram(1, 2**42 - 1, 2)
    for time_ns, count in times.items():
        theirs.record_value(time_ns, count)
    theirs.significant_figures = 3  # of what is written: microseconds
    written = io.BytesIO()
    theirs.output_percentile_distribution(written, 1e6)
    return written.getvalue().decode()


@PROPERTY
@given(st.dictionaries(edges_ns, st.integers(1, 100_000), min_size=1, max_size=40))
def test_the_percentiles_are_written_as_the_hdrhistogram_package_does(
    times: dict[int, int],
) -> None:
    ours = Histogram()
    for time_ns, count in times.items():
        ours.count(time_ns, count)
    written, expected = as_hgrm(ours), write_by_package(times)
    assert _rows(written) == _rows(expected)
    assert written.splitlines()[:2] == expected.splitlines()[:2], "the head and an empty line"


def _rows(text: str) -> list[str]:
    return [line for line in text.splitlines()[2:] if not line.startswith("#")]


def test_the_footer_has_mean_deviation_maximum_and_buckets_in_milliseconds() -> None:
    histogram = Histogram()
    histogram.count(1_000_000)
    histogram.count(3_000_000)
    assert as_hgrm(histogram).splitlines()[-3:] == [
        "#[Mean    =        2.000, StdDeviation   =        0.998]",
        "#[Max     =        3.000, Total count    =            2]",
        "#[Buckets =           35, SubBuckets     =          256]",
    ]


def test_a_plotter_finds_four_numbers_in_every_row_but_the_last() -> None:
    """HdrHistogram's plotter takes rows of four columns, and leaves out what is no number."""
    histogram = Histogram()
    for time_ns in range(1_000_000, 60_000_000, 7001):
        histogram.count(time_ns)
    *rows, last = _rows(as_hgrm(histogram))
    columns = [[float(word) for word in row.split()] for row in rows]
    assert {len(row) for row in columns} == {4}
    assert [row[0] for row in columns] == sorted(row[0] for row in columns)
    for value_ms, share, count, distance in columns:
        assert distance == pytest.approx(1 / (1 - share), rel=0.01)
        assert count >= share * len(histogram) - 0.001
        assert value_ms >= histogram.percentile_ns(share * 100) / 1e6 - 0.0006
    assert re.fullmatch(r" +59\.99\d 1\.0{12} +8428", last)


def test_an_empty_histogram_has_a_head_and_a_footer() -> None:
    assert list(percentile_steps(Histogram())) == []
    assert _rows(as_hgrm(Histogram())) == []


def test_the_course_of_a_run_has_percentiles_of_each_interval() -> None:
    result = Result()
    intervals = []
    for time_ns, count in ((1000, 99), (2_000_000, 100)):
        part = Histogram()
        part.count(time_ns, count)
        part.count(3_000_001)
        result.latencies.merge(part)
        counts = {bucket: count for bucket, count in enumerate(part.counts) if count}
        intervals.append(Interval(0.5, counts))
    result.timeline = Timeline(0, 0.5, [*intervals, Interval(0.25, {})])
    first, second, last = moments(result)
    assert (first.start_s, first.seconds, first.requests, first.rate) == (0, 0.5, 100, 200)
    assert (first.p50_ns, first.p99_ns, first.max_ns) == (1003, 1003, 3_000_001)
    assert (second.start_s, second.max_ns) == (0.5, 3_000_001)
    assert second.p99_ns == pytest.approx(2_000_000, rel=1 / 128)
    assert (last.start_s, last.rate, last.p50_ns, last.p99_ns, last.max_ns) == (
        *(1.0, 0),
        *(None, None, None),
    )
