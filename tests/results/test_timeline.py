"""The timeline against what was recorded: nothing is lost or counted twice, whatever is merged."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counter.results.timeline import (
    MOST_INTERVALS,
    STEPS_S,
    Interval,
    Sampler,
    Timeline,
    interval_for,
)

PROPERTY = settings(deadline=None, derandomize=True)
START_NS = 5_000_000_000
BUCKETS = 4608


def at(seconds: float) -> int:
    """A moment so long after the start."""
    return START_NS + round(seconds * 1e9)


def counted(line: Timeline) -> dict[int, int]:
    whole: dict[int, int] = {}
    for interval in line.intervals:
        for bucket, count in interval.counts.items():
            whole[bucket] = whole.get(bucket, 0) + count
    return whole


def line_of(*requests: int, start_s: float = 0.0, interval_s: float = 1.0) -> Timeline:
    intervals = [Interval(interval_s, {7: count} if count else {}) for count in requests]
    return Timeline(at(start_s), interval_s, intervals)


def requests_of(line: Timeline) -> list[int]:
    return [interval.requests for interval in line.intervals]


def test_each_interval_has_what_was_counted_since_the_last() -> None:
    counts = [0] * BUCKETS
    sampler = Sampler(counts, START_NS, 60)
    counts[3] += 5
    sampler.tick(at(1))
    counts[3] += 2
    counts[4000] += 1
    sampler.tick(at(2.01))
    sampler.tick(at(3))
    counts[0] += 4
    line = sampler.finish(at(3.9))
    assert (line.start_ns, line.interval_s) == (START_NS, 1.0)
    assert [interval.counts for interval in line.intervals] == [{3: 5}, {3: 2, 4000: 1}, {}, {0: 4}]
    assert [round(interval.seconds, 6) for interval in line.intervals] == [1, 1.01, 0.99, 0.9]
    assert line.intervals[3].rate == pytest.approx(4 / 0.9)


def test_what_was_counted_before_the_start_is_not_in_it() -> None:
    counts = [9] * BUCKETS
    assert counted(Sampler(counts, START_NS, 60).finish(at(1))) == {}


def test_a_short_rest_belongs_to_the_last_interval() -> None:
    counts = [0] * BUCKETS
    sampler = Sampler(counts, START_NS, 60)
    counts[3] = 10
    sampler.tick(at(1))
    counts[3] = 12
    (interval,) = sampler.finish(at(1.1)).intervals
    assert (interval.requests, round(interval.seconds, 6)) == (12, 1.1)


def test_a_run_shorter_than_an_interval_is_one() -> None:
    counts = [0] * BUCKETS
    sampler = Sampler(counts, START_NS, 60)
    counts[3] = 10
    assert requests_of(sampler.finish(at(0.2))) == [10]
    assert Sampler(counts, START_NS, 60).finish(START_NS).intervals == []


def test_a_process_that_stood_still_answered_nothing_meanwhile() -> None:
    counts = [0] * BUCKETS
    sampler = Sampler(counts, START_NS, 60)
    sampler.tick(at(1))
    counts[3] = 6
    sampler.tick(at(4.1))
    counts[3] = 7
    sampler.tick(at(5))
    assert requests_of(sampler.finish(at(5))) == [0, 0, 0, 6, 1]


def test_a_timer_that_is_early_or_doubled_makes_no_interval_of_its_own() -> None:
    counts = [0] * BUCKETS
    sampler = Sampler(counts, START_NS, 60)
    for moment in (0.99, 1.0, 1.01, 1.999, 2.0):
        counts[3] += 1
        sampler.tick(at(moment))
    assert requests_of(sampler.finish(at(2))) == [1, 4]


def test_a_run_without_a_planned_end_never_has_too_many_intervals() -> None:
    counts = [0] * BUCKETS
    sampler = Sampler(counts, START_NS, None)
    for tick in range(1, 10_001):
        counts[tick % 50] += 1
        sampler.tick(at(tick / 10))
    line = sampler.finish(at(1000))
    assert len(line.intervals) < MOST_INTERVALS
    assert line.interval_s == 12.8
    assert sum(requests_of(line)) == 10_000
    assert counted(line) == dict.fromkeys(range(50), 200)
    assert all(interval.rate == pytest.approx(10, rel=0.1) for interval in line.intervals)


@pytest.mark.parametrize(
    ("duration_s", "interval_s"),
    [(None, 0.1), (0.5, 0.1), (6, 0.1), (10, 0.2), (60, 1), (61, 2), (3600, 60), (1e9, 600)],
)
def test_the_intervals_suit_the_length_of_the_run(
    duration_s: float | None, interval_s: float
) -> None:
    assert interval_for(duration_s) == interval_s


def test_the_steps_rise() -> None:
    assert sorted(STEPS_S) == list(STEPS_S)


def test_what_processes_did_at_the_same_time_is_added() -> None:
    line = line_of(1, 2, 3)
    line.merge(line_of(10, 20, 30, 40, start_s=0.02))
    assert requests_of(line) == [11, 22, 33, 40]
    assert line.start_ns == START_NS
    assert [interval.rate for interval in line.intervals] == [11, 22, 33, 40]


def test_a_process_that_started_later_is_put_where_it_belongs() -> None:
    early, late = line_of(1, 1, 1, 1), line_of(10, 10, start_s=2.1)
    early.merge(late)
    assert requests_of(early) == [1, 1, 11, 11]
    late.merge(line_of(1, 1, 1, 1))
    assert requests_of(late) == [1, 1, 11, 11]
    assert late.start_ns == START_NS


def test_finer_intervals_are_joined_before_they_are_added() -> None:
    coarse = line_of(10, 20, interval_s=2.0)
    coarse.merge(line_of(1, 2, 3, 4, 5))
    assert requests_of(coarse) == [13, 27, 5]
    fine = line_of(1, 2, 3, 4, 5)
    fine.merge(line_of(10, 20, interval_s=2.0))
    assert requests_of(fine) == [13, 27, 5]


def test_a_process_without_a_timeline_changes_nothing() -> None:
    line = line_of(1, 2)
    line.merge(Timeline())
    assert requests_of(line) == [1, 2]
    nothing = Timeline()
    nothing.merge(line)
    assert nothing == line


def test_merging_leaves_the_other_as_it_was() -> None:
    line, other = Timeline(), line_of(1, 2, 3, start_s=1.0)
    line.merge(other)
    line.merge(line_of(5, 5, 5, interval_s=2.0))
    assert other == line_of(1, 2, 3, start_s=1.0)


@PROPERTY
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 9), max_size=20), st.integers(0, 3), st.integers(0, 2)),
        max_size=5,
    )
)
def test_no_request_is_lost_or_doubled_by_merging(
    parts: list[tuple[list[int], int, int]],
) -> None:
    whole = Timeline()
    for requests, start_s, doublings in parts:
        whole.merge(line_of(*requests, start_s=start_s, interval_s=float(2**doublings)))
    assert sum(requests_of(whole)) == sum(sum(requests) for requests, _, _ in parts)


def test_errors_belong_to_the_interval_in_which_they_were_counted() -> None:
    counts = [0] * 300
    sampler = Sampler(counts, 0, 6.0)
    sampler.forget_errors(4)
    sampler.tick(10**8, 4)
    sampler.tick(2 * 10**8, 7)
    line = sampler.finish(3 * 10**8, 8)
    assert [interval.errors for interval in line.intervals] == [0, 3, 1]
    line.coarsen()
    assert [interval.errors for interval in line.intervals] == [3, 1]


def test_errors_of_several_processes_are_added() -> None:
    one = Timeline(0, 1.0, [Interval(1.0, {}, 1), Interval(1.0, {}, 2)])
    one.merge(Timeline(0, 1.0, [Interval(1.0, {}, 10), Interval(1.0, {}, 20)]))
    assert [interval.errors for interval in one.intervals] == [11, 22]
