"""How many requests took how long: counts by time, which merge exactly, and what they show.

Pure: no clock. Percentiles are computed when somebody asks, and never kept: they do not add up.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, MutableSequence
from fractions import Fraction
from typing import Final


class Histogram:
    """How many requests took how long, each time known to within 1/128 of itself.

    The buckets are log-linear: 128 to each doubling, preallocated up to 2^42 ns (73 minutes); the
    last one takes longer times too. Counting one costs 0.2 us; the hdrhistogram package takes
    1.6 us, a fifth of a request.
    """

    BITS: Final = 7

    def __init__(self) -> None:
        self.counts: MutableSequence[int] = [0] * ((43 - self.BITS) << self.BITS)
        self.max_ns = 0
        self.sum_ns = 0

    def count(self, time_ns: int, requests: int = 1) -> None:
        """Counts so many requests that took `time_ns` each."""
        shift = time_ns.bit_length() - 8
        try:
            self.counts[(shift << 7) + (time_ns >> shift) if shift > 0 else time_ns] += requests
        except IndexError:
            self.counts[-1] += requests
        self.sum_ns += time_ns * requests
        if time_ns > self.max_ns:
            self.max_ns = time_ns

    def share_buckets(self) -> array[int]:
        """Has the buckets in an array of uint64, for others to count into; gives it back."""
        self.counts = shared = array("Q", self.counts)
        return shared

    def merge(self, other: Histogram) -> None:
        """Adds the requests of another histogram to this one."""
        self.counts = [
            ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True)
        ]
        self.max_ns = max(self.max_ns, other.max_ns)
        self.sum_ns += other.sum_ns

    def __len__(self) -> int:
        return sum(self.counts)

    def mean_ns(self) -> float:
        """The arithmetic mean, exact; 0 without requests."""
        return self.sum_ns / max(1, len(self))

    def percentile_ns(self, percent: float) -> int:
        """The time that `percent` of the requests did not exceed, by nearest rank, rounded up."""
        # By its decimal digits: as a float, 99.9 % of 41,000 are a little more than 40,959.
        rank = max(1, math.ceil(Fraction(str(percent)) * len(self) / 100))
        seen = 0
        for index, count in enumerate(self.counts[:-1]):
            seen += count
            if seen >= rank:
                return min(self._upper_ns(index), self.max_ns)
        return self.max_ns  # of the last bucket; 0 without requests

    @classmethod
    def of(cls, counts: Mapping[int, int], longest_ns: int) -> Histogram:
        """A histogram of these buckets, of a run in which nothing took longer than that.

        It knows counts and percentiles; its mean is that of the buckets' upper ends.
        """
        histogram = cls()
        for index, count in counts.items():
            upper_ns = min(histogram._upper_ns(index), longest_ns)
            if index == len(histogram.counts) - 1:
                upper_ns = longest_ns
            histogram.counts[index] += count
            histogram.sum_ns += upper_ns * count
            histogram.max_ns = max(histogram.max_ns, upper_ns)
        return histogram

    def buckets(self) -> Iterator[tuple[int, int]]:
        """The longest time of each bucket that has requests, and how many it has; rising."""
        for index, count in enumerate(self.counts):
            if count:
                is_last = index == len(self.counts) - 1
                yield self.max_ns if is_last else min(self._upper_ns(index), self.max_ns), count

    def _upper_ns(self, index: int) -> int:
        shift = max(0, (index >> self.BITS) - 1)
        return ((index - (shift << self.BITS) + 1) << shift) - 1
