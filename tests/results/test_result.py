"""The histogram against sorted lists, and results of processes merged against one of all."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counter.results.histogram import Histogram
from counter.results.result import WRONG_KEPT, Result, merged

PROPERTY = settings(deadline=None, derandomize=True)

EMPTY = Histogram()
PERCENTS = [0, 1, 50, 90, 99, 99.9, 100]

# Of every magnitude alike, and next to the edges of buckets.
times_ns = (
    st.integers(0, 300)
    | st.integers(0, 2**42 - 1)
    | st.builds(lambda bits, by: max(0, (1 << bits) + by), st.integers(0, 41), st.integers(-2, 2))
)


def record_all(times: Iterable[int]) -> Histogram:
    histogram = Histogram()
    for time_ns in times:
        histogram.count(time_ns)
    return histogram


def pick_nearest_rank(times: list[int], percent: float) -> int:
    """The definition, in exact arithmetic, of the percentile of a list."""
    rank = max(1, math.ceil(Fraction(str(percent)) * len(times) / 100))
    return sorted(times)[rank - 1]


def same_histogram(one: Histogram, other: Histogram) -> bool:
    return vars(one) == vars(other)


# The histogram


@PROPERTY
@given(times_ns)
def test_a_recorded_time_is_known_to_within_one_part_in_128(time_ns: int) -> None:
    histogram = record_all([time_ns, 2**42 - 1])  # a larger one, so that the maximum hides nothing
    known = histogram.percentile_ns(50)
    assert time_ns <= known
    assert (known - time_ns) * 128 <= time_ns


@pytest.mark.parametrize("time_ns", [0, 1, 127, 128, 255])
def test_a_time_below_256_ns_is_known_exactly(time_ns: int) -> None:
    assert record_all([time_ns, 10**9]).percentile_ns(50) == time_ns


def test_every_doubling_has_128_buckets() -> None:
    for bits in range(7, 42):
        size = 1 << (bits - 7)
        edges = range(1 << bits, 2 << bits, size)
        histogram = record_all(edges)
        assert [count for count in histogram.counts if count] == [1] * 128
        histogram.merge(record_all(edge + size - 1 for edge in edges))
        assert [count for count in histogram.counts if count] == [2] * 128


def test_the_longest_time_fills_the_last_bucket() -> None:
    """2^42 ns, as the class says, are 73 minutes."""
    histogram = record_all([2**42 - 1])
    assert histogram.percentile_ns(100) == 2**42 - 1
    assert histogram.counts[-1] == 1


@pytest.mark.parametrize("time_ns", [2**42, 2**43, 2**63])
def test_a_time_beyond_the_range_is_counted_in_the_last_bucket(time_ns: int) -> None:
    histogram = record_all([2**42 - 1, time_ns])
    histogram.count(time_ns, 2)
    assert histogram.counts[-1] == len(histogram) == 4
    assert histogram.percentile_ns(50) == histogram.max_ns == time_ns
    assert histogram.mean_ns() == (2**42 - 1 + 3 * time_ns) / 4


@PROPERTY
@given(times=st.lists(times_ns, min_size=1, max_size=200), percent=st.sampled_from(PERCENTS))
def test_a_percentile_is_the_nearest_rank_of_a_sorted_list(
    times: list[int], percent: float
) -> None:
    exact = pick_nearest_rank(times, percent)
    known = record_all(times).percentile_ns(percent)
    assert exact <= known <= max(times)
    assert (known - exact) * 128 <= exact


@pytest.mark.parametrize("percent", [50, 90, 99, 99.9])
@pytest.mark.parametrize("count", [1, 2, 10, 999, 1000, 1001, 3000, 41_000, 82_000, 10**6])
def test_the_rank_of_a_percentile_is_exact_for_any_count(percent: float, count: int) -> None:
    rank = max(1, math.ceil(Fraction(str(percent)) * count / 100))
    below, above = Histogram(), Histogram()
    below.count(1, rank)
    below.count(100, count - rank)
    above.count(1, rank - 1)
    above.count(100, count - rank + 1)
    assert (below.percentile_ns(percent), above.percentile_ns(percent)) == (1, 100)


def test_a_percentile_never_exceeds_the_longest_time() -> None:
    histogram = record_all([1000, 1_000_001])
    assert histogram.percentile_ns(99.9) == histogram.max_ns == 1_000_001


def test_an_empty_histogram_gives_zeros() -> None:
    empty = Histogram()
    assert (len(empty), empty.max_ns, empty.mean_ns()) == (0, 0, 0)
    assert [empty.percentile_ns(percent) for percent in PERCENTS] == [0] * len(PERCENTS)


@PROPERTY
@given(st.lists(times_ns, min_size=1))
def test_count_mean_and_maximum_are_exact(times: list[int]) -> None:
    histogram = record_all(times)
    assert len(histogram) == len(times)
    assert histogram.max_ns == max(times)
    assert histogram.mean_ns() == sum(times) / len(times)


@PROPERTY
@given(time_ns=times_ns, count=st.integers(1, 50))
def test_recording_several_at_once_is_recording_each(time_ns: int, count: int) -> None:
    at_once = Histogram()
    at_once.count(time_ns, count)
    assert same_histogram(at_once, record_all([time_ns] * count))


@PROPERTY
@given(st.lists(times_ns), st.lists(times_ns))
def test_merging_is_recording_all_in_one(ours: list[int], theirs: list[int]) -> None:
    one, other = record_all(ours), record_all(theirs)
    one.merge(other)
    assert same_histogram(one, record_all(ours + theirs))
    assert same_histogram(other, record_all(theirs))


# Results


def make_result(number: int) -> Result:
    """A result of a process, every count of it told from every other by its digits."""
    return Result(
        sent=1000 * number,
        answered=900 * number,
        answered_sum=800 * number,
        unknown=70 * number,
        unknown_sum=60 * number,
        measured=500 * number,
        elapsed_s=float(number),
        latencies=record_all([number * 1000]),
        errors={"reset": number, f"only {number}": 1},
        connections=4 * number,
        cpu_share=number / 10,
    )


def test_counts_of_processes_are_added() -> None:
    whole = merged([make_result(1), make_result(2), make_result(3)])
    assert (whole.sent, whole.answered, whole.answered_sum) == (6000, 5400, 4800)
    assert (whole.unknown, whole.unknown_sum, whole.measured) == (420, 360, 3000)
    assert whole.connections == 24
    assert whole.errors == {"reset": 6, "only 1": 1, "only 2": 1, "only 3": 1}
    assert same_histogram(whole.latencies, record_all([1000, 2000, 3000]))


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1)])
def test_processes_run_beside_each_other(order: tuple[int, int, int]) -> None:
    """So the longest time is the run's, and the busiest process says whether one was too busy."""
    whole = merged(map(make_result, order))
    assert (whole.elapsed_s, whole.cpu_share) == (3.0, 0.3)


def test_wrong_totals_are_all_counted_and_a_few_described() -> None:
    one = Result(wrong=4, wrong_examples=["a", "b", "c", "d"])
    other = Result(wrong=9, wrong_examples=["e", "f", "g"])
    whole = merged([one, other])
    assert whole.wrong == 13
    assert whole.wrong_examples == ["a", "b", "c", "d", "e", "f", "g"][:WRONG_KEPT]


@pytest.mark.parametrize("checked", [(True, True), (True, False), (False, True), (False, False)])
def test_rises_were_checked_only_if_every_process_did(checked: tuple[bool, bool]) -> None:
    assert merged(Result(rises_checked=one) for one in checked).rises_checked is all(checked)


def test_what_belongs_to_the_whole_run_is_not_merged() -> None:
    whole = merged([Result(total_before=1, total_after=2, processes=3, interrupted=True)])
    assert (whole.total_before, whole.total_after) == (None, None)
    assert (whole.processes, whole.interrupted) == (1, False)


def test_merging_nothing_is_an_empty_result() -> None:
    whole = merged([])
    assert same_histogram(whole.latencies, Histogram())
    assert replace(whole, latencies=EMPTY, raw_latencies=EMPTY) == Result(
        latencies=EMPTY, raw_latencies=EMPTY
    )


def test_merging_leaves_the_other_result_as_it_was() -> None:
    one = make_result(1)
    whole = merged([one, make_result(2)])
    whole.count_error("reset")
    assert one.errors == {"reset": 1, "only 1": 1}
    assert same_histogram(one.latencies, record_all([1000]))


def test_errors_are_counted_by_kind() -> None:
    result = Result()
    for kind in ("timeout", "reset", "timeout"):
        result.count_error(kind)
    assert result.errors == {"timeout": 2, "reset": 1}


def test_the_rate_is_of_the_measured_part() -> None:
    assert Result(sent=10_000, measured=3000, elapsed_s=1.5).rate == 2000
    assert Result(measured=3000).rate == 0
