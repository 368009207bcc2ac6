"""What the admin port remembers: the counts of each second, for as long as the page shows them.

note() takes a sample once a second; the rest is worked out from samples when it is asked for.
Memory is bounded: the last minutes are kept second by second, the last hour in steps of ten.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from counter.processes.slots import (
    COMMIT_BOUNDS_S,
    COMMIT_US,
    COMMITS,
    REQUESTS,
    Slots,
)

MINUTES_S: Final = 300
HOUR_S: Final = 3600
STEP_S: Final = 10.0  # of the hour

# What is told of commits is of so many seconds: enough to be calm, and not old news.
COMMITS_S: Final = 10.0
SHARE: Final = 0.99

# A sample that comes a little early ends a step too: samplers are late now and then, not a second.
_EARLY_S: Final = 0.5

Rates = list[tuple[float, int]]


@dataclass(frozen=True)
class Sample:
    """The counts at one moment of the monotonic clock."""

    at_s: float
    requests: int
    commit_us: int
    commits: tuple[int, ...]  # one for each of COMMIT_BOUNDS_S, and the longer ones


@dataclass(frozen=True)
class Commits:
    """Commits to the store in the last seconds: how many, how long, and within which bound of the
    histogram SHARE of them were; infinity where that was beyond the last."""

    count: int
    mean_s: float
    within_s: float


class History:
    """The recent past of one server."""

    def __init__(self, slots: Slots, clock: Callable[[], float] = time.monotonic) -> None:
        self._slots = slots
        self._clock = clock
        self._seconds: deque[Sample] = deque(maxlen=MINUTES_S + 1)
        self._steps: deque[Sample] = deque(maxlen=int(HOUR_S / STEP_S) + 1)

    def note(self) -> None:
        """Samples the counts."""
        slots, now = self._slots, self._clock()
        commits = tuple(slots.sum(COMMITS + i) for i in range(len(COMMIT_BOUNDS_S) + 1))
        sample = Sample(now, slots.sum(REQUESTS), slots.sum(COMMIT_US), commits)
        self._seconds.append(sample)
        if not self._steps or now - self._steps[-1].at_s >= STEP_S - _EARLY_S:
            self._steps.append(sample)

    def minutes(self) -> Rates:
        """Requests a second in each second of the last MINUTES_S: how long ago it ended, and how
        many; the oldest first."""
        return self._rates(self._seconds)

    def hour(self) -> Rates:
        """The same for each STEP_S of the last HOUR_S, and for what came since."""
        return self._rates([*self._steps, *list(self._seconds)[-1:]])

    def _rates(self, samples: Iterable[Sample]) -> Rates:
        now = self._clock()
        return [
            (round(now - end.at_s, 1), round((end.requests - begin.requests) / span_s))
            for begin, end in pairwise(samples)
            if (span_s := end.at_s - begin.at_s) > 0
        ]

    def commits(self) -> Commits | None:
        """Of the last COMMITS_S; None where there was none."""
        if not self._seconds:
            return None
        last = self._seconds[-1]
        first = next(one for one in self._seconds if last.at_s - one.at_s <= COMMITS_S + _EARLY_S)
        counts = [end - begin for begin, end in zip(first.commits, last.commits, strict=True)]
        count = sum(counts)
        if not count:
            return None
        reached, within_s = 0, float("inf")
        for bound_s, one in zip(COMMIT_BOUNDS_S, counts, strict=False):
            reached += one
            if reached >= SHARE * count:
                within_s = bound_s
                break
        return Commits(count, (last.commit_us - first.commit_us) / count / 1e6, within_s)
