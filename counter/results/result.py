"""What a run of the load generator did: counts, latencies, totals. Pure: no socket and no clock.

Results of several processes merge into one, and what merges exactly is kept: counts and buckets,
never percentiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from counter.proof.verify import Proof

from counter.results.timeline import Timeline

# Totals are modulo 2^64: a rise can be told from a fall while everything sent sums below this.
CHECKABLE_SUM: Final = 2**63

# The kind of error that makes a run's account incomplete: what it sent last is not known.
PROCESS_DIED: Final = "a load process died"

WRONG_KEPT: Final = 5  # wrong totals that are described; all are counted


class Histogram:
    """How many requests took how long, each time known to within 1/128 of itself.

    The buckets are log-linear: 128 to each doubling, preallocated up to 2^42 ns (73 minutes); the
    last one takes longer times too. One record costs 0.2 us; the hdrhistogram package takes 1.6 us,
    a fifth of a request.
    """

    BITS: Final = 7

    def __init__(self) -> None:
        self.counts = [0] * ((43 - self.BITS) << self.BITS)
        self.max_ns = 0
        self.sum_ns = 0

    def record(self, time_ns: int, count: int = 1) -> None:
        """Counts `count` requests that took `time_ns` each."""
        shift = time_ns.bit_length() - 8
        try:
            self.counts[(shift << 7) + (time_ns >> shift) if shift > 0 else time_ns] += count
        except IndexError:
            self.counts[-1] += count
        self.sum_ns += time_ns * count
        if time_ns > self.max_ns:
            self.max_ns = time_ns

    def merge(self, other: Histogram) -> None:
        """Adds the records of another histogram to this one."""
        self.counts = [
            ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True)
        ]
        self.max_ns = max(self.max_ns, other.max_ns)
        self.sum_ns += other.sum_ns

    def __len__(self) -> int:
        return sum(self.counts)

    def mean_ns(self) -> float:
        """The arithmetic mean, exact; 0 without records."""
        return self.sum_ns / max(1, len(self))

    def percentile_ns(self, percent: float) -> int:
        """The time that `percent` of the records did not exceed, by nearest rank, rounded up."""
        # By its decimal digits: as a float, 99.9 % of 41,000 are a little more than 40,959.
        rank = max(1, math.ceil(Fraction(str(percent)) * len(self) / 100))
        seen = 0
        for index, count in enumerate(self.counts[:-1]):
            seen += count
            if seen >= rank:
                return min(self._upper_ns(index), self.max_ns)
        return self.max_ns  # of the last bucket; 0 without records

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
        """The longest time of each bucket that has records, and how many it has; rising."""
        for index, count in enumerate(self.counts):
            if count:
                is_last = index == len(self.counts) - 1
                yield self.max_ns if is_last else min(self._upper_ns(index), self.max_ns), count

    def _upper_ns(self, index: int) -> int:
        shift = max(0, (index >> self.BITS) - 1)
        return ((index - (shift << self.BITS) + 1) << shift) - 1


_SUMMED: Final = (
    "sent",
    "answered",
    "answered_sum",
    "unknown",
    "unknown_sum",
    "measured",
    "behind",
)


@dataclass
class Result:
    """What a run, or one process of it, did. Counts in requests, times in seconds."""

    sent: int = 0
    answered: int = 0
    answered_sum: int = 0
    unknown: int = 0  # sent, and the connection lost before the reply
    unknown_sum: int = 0
    measured: int = 0
    elapsed_s: float = 0.0  # from the start of the measured part to its last reply
    latencies: Histogram = field(default_factory=Histogram)  # from when a request was due
    raw_latencies: Histogram = field(default_factory=Histogram)  # open loop: from when it was sent
    errors: dict[str, int] = field(default_factory=dict)
    wrong: int = 0
    wrong_examples: list[str] = field(default_factory=list)
    rises_checked: bool = True
    total_before: int | None = None
    total_after: int | None = None
    connections: int = 0
    processes: int = 1
    cpu_share: float = 0.0  # of the busiest process, of one core, over the measured part
    interrupted: bool = False
    cut: bool = False  # a second interrupt: what was in flight then was not waited for
    asked_rate: float = 0.0  # open loop: requests a second that were to be sent
    behind: int = 0  # open loop: due when the run ended, and not sent
    proof: Proof | None = None  # of the whole run, where one was asked for
    timeline: Timeline = field(default_factory=Timeline)  # empty of a process that died

    def merge(self, other: Result) -> None:
        """Adds what another process of the same run did.

        Totals, `processes`, `interrupted`, `cut` and `proof` are the run's own: whoever merges sets
        them.
        """
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.elapsed_s = max(self.elapsed_s, other.elapsed_s)
        self.latencies.merge(other.latencies)
        self.raw_latencies.merge(other.raw_latencies)
        self.timeline.merge(other.timeline)
        for kind, count in other.errors.items():
            self.errors[kind] = self.errors.get(kind, 0) + count
        self.wrong += other.wrong
        self.wrong_examples = (self.wrong_examples + other.wrong_examples)[:WRONG_KEPT]
        self.rises_checked = self.rises_checked and other.rises_checked
        self.connections += other.connections
        self.cpu_share = max(self.cpu_share, other.cpu_share)

    def count_error(self, kind: str) -> None:
        """Counts one error of a kind."""
        self.errors[kind] = self.errors.get(kind, 0) + 1


def merged(results: Iterable[Result]) -> Result:
    """One result of all processes' results."""
    whole = Result()
    for result in results:
        whole.merge(result)
    return whole
