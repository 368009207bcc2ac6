"""How a run went over time: what was answered in each interval, and how long it took.

Pure: no clock and no timer. The hot path counts into one histogram; whoever owns a Sampler shows
it that histogram now and then, and what was added since is an interval. So an interval is counts,
never percentiles, and those of several processes and of neighbouring intervals add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

# As many points as a chart can show. A run without a planned end has its intervals doubled
# whenever there are more, so that no run needs more memory than another.
MOST_INTERVALS: Final = 120
WANTED_INTERVALS: Final = 60

# What a reader divides by in the head. A snapshot, in which no request is served,
# takes up to 0.4 ms.
STEPS_S: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)

_BLOCK: Final = 128  # buckets compared at once; most blocks have not changed


@dataclass(frozen=True)
class Interval:
    """What was answered within some seconds: the bucket of a Histogram -> requests; and how many
    connections were lost meanwhile, or could not be made."""

    seconds: float
    counts: dict[int, int]
    errors: int = 0

    @property
    def requests(self) -> int:
        """Measured requests that were answered in it."""
        return sum(self.counts.values())

    @property
    def rate(self) -> float:
        """Requests a second; 0 in no time."""
        return self.requests / self.seconds if self.seconds > 0 else 0.0


def _joined(one: Interval, other: Interval, seconds: float) -> Interval:
    counts = dict(one.counts)
    for bucket, requests in other.counts.items():
        counts[bucket] = counts.get(bucket, 0) + requests
    return Interval(seconds, counts, one.errors + other.errors)


@dataclass
class Timeline:
    """Intervals of `interval_s` each, from `start_ns` of the clock that all processes share.

    The last one may be shorter, or longer by less than half.
    """

    start_ns: int = 0
    interval_s: float = STEPS_S[0]
    intervals: list[Interval] = field(default_factory=list)

    def coarsen(self) -> None:
        """Joins each two neighbours: half as many intervals, twice as long."""
        line = self.intervals
        joined = [
            _joined(one, other, one.seconds + other.seconds)
            for one, other in zip(line[::2], line[1::2], strict=False)
        ]
        self.intervals = joined + line[2 * len(joined) :]
        self.interval_s *= 2

    def merge(self, other: Timeline) -> None:
        """Adds what another process did at the same times."""
        if not other.intervals:
            return
        theirs = Timeline(other.start_ns, other.interval_s, list(other.intervals))
        if not self.intervals:
            self.__dict__.update(vars(theirs))
            return
        while self.interval_s < theirs.interval_s:
            self.coarsen()
        while theirs.interval_s < self.interval_s:
            theirs.coarsen()
        late, early = sorted((self, theirs), key=lambda line: line.start_ns, reverse=True)
        shift = round((late.start_ns - early.start_ns) / 1e9 / self.interval_s)
        late.intervals[:0] = [Interval(self.interval_s, {})] * shift
        late.start_ns = early.start_ns
        shared = min(len(self.intervals), len(theirs.intervals))
        self.intervals = [
            _joined(ours, other, max(ours.seconds, other.seconds))
            for ours, other in zip(self.intervals, theirs.intervals, strict=False)
        ] + max(self.intervals, theirs.intervals, key=len)[shared:]


class Sampler:
    """Makes the timeline of one process out of snapshots of its latency histogram."""

    def __init__(self, counts: Sequence[int], start_ns: int, duration_s: float | None) -> None:
        """`counts` is the histogram's own buckets, which the hot path goes on filling.

        `duration_s` is how long the run is planned to last, None where nobody knows.
        """
        self._counts = counts
        self._seen: Any = counts[:]  # of the same type, or they would compare as different
        self._seen_ns = start_ns
        self._seen_errors = 0
        self._timeline = Timeline(start_ns, interval_for(duration_s))

    @property
    def interval_s(self) -> float:
        """How often tick() is due."""
        return self._timeline.interval_s

    def forget_errors(self, errors: int) -> None:
        """Counts no errors of those up to now, of which there were so many."""
        self._seen_errors = errors

    def tick(self, now_ns: int, errors: int = 0) -> None:
        """Ends an interval, if one is due; `errors` is how many there were in all."""
        line = self._timeline
        # A timer may be a little early; after a coarsening every second tick is none.
        due = int((now_ns - line.start_ns) / 1e9 / line.interval_s + 0.25)
        if due <= len(line.intervals):
            return
        # A process that stood still answered nothing meanwhile.
        missed = due - 1 - len(line.intervals)
        line.intervals += [Interval(line.interval_s, {})] * min(missed, 2 * MOST_INTERVALS)
        seconds = (now_ns - self._seen_ns) / 1e9 - missed * line.interval_s
        line.intervals.append(self._interval(seconds, errors))
        self._seen_ns = now_ns
        while len(line.intervals) >= MOST_INTERVALS:
            line.coarsen()

    def finish(self, now_ns: int, errors: int = 0) -> Timeline:
        """The timeline, with what came after the last tick until `now_ns`."""
        line = self._timeline
        rest = self._interval(max(0.0, (now_ns - self._seen_ns) / 1e9), errors)
        if line.intervals and rest.seconds < line.interval_s / 2:
            # The rate of a few milliseconds says nothing.
            last = line.intervals.pop()
            line.intervals.append(_joined(last, rest, last.seconds + rest.seconds))
        elif rest.seconds or rest.counts or rest.errors:
            line.intervals.append(rest)
        return line

    def _interval(self, seconds: float, errors: int) -> Interval:
        """What was answered and went wrong since the last look."""
        new, self._seen_errors = errors - self._seen_errors, errors
        return Interval(seconds, self._news(), new)

    def _news(self) -> dict[int, int]:
        """What was counted since the last look."""
        news: dict[int, int] = {}
        for at in range(0, len(self._counts), _BLOCK):
            now, before = self._counts[at : at + _BLOCK], self._seen[at : at + _BLOCK]
            if now == before:
                continue
            self._seen[at : at + _BLOCK] = now
            news.update(
                (at + index, new - old)
                for index, (new, old) in enumerate(zip(now, before, strict=True))
                if new != old
            )
        return news


def interval_for(duration_s: float | None, steps: Sequence[float] = STEPS_S) -> float:
    """The length of the intervals that suits a run: of 60 s, a second; of 10 s, a fifth of one."""
    for step_s in steps:
        if (duration_s or 0) <= step_s * WANTED_INTERVALS:
            return step_s
    return steps[-1]
