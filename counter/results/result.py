"""What a run of the load generator did: counts, latencies, totals. Pure: no socket and no clock.

Results of several processes merge into one, and what merges exactly is kept: counts and buckets,
never percentiles.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from counter.proof.history import Verdict
from counter.results.histogram import Histogram
from counter.results.timeline import Timeline

# Totals are modulo 2^64: a rise can be told from a fall while everything sent sums below this.
CHECKABLE_SUM: Final = 2**63

# The kind of error that makes a run's account incomplete: what it sent last is not known.
PROCESS_DIED: Final = "a load process died"

WRONG_KEPT: Final = 5  # wrong totals that are described; all are counted

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
    engine: str = ""  # that served the connections
    cpu_share: float = 0.0  # of the busiest process, of one core, over the measured part
    interrupted: bool = False
    cut: bool = False  # a second interrupt: what was in flight then was not waited for
    asked_rate: float = 0.0  # open loop: requests a second that were to be sent
    behind: int = 0  # open loop: due when the run ended, and not sent
    proof: Verdict | None = None  # of the whole run, where one was asked for
    timeline: Timeline = field(default_factory=Timeline)  # empty of a process that died

    def merge(self, other: Result) -> None:
        """Adds what another process of the same run did.

        Totals, `processes`, `engine`, `interrupted`, `cut` and `proof` are the run's own: whoever
        merges sets them.
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

    @property
    def rate(self) -> float:
        """Measured requests a second; 0 in no time."""
        return self.measured / self.elapsed_s if self.elapsed_s > 0 else 0.0

    def count_error(self, kind: str) -> None:
        """Counts one error of a kind."""
        self.errors[kind] = self.errors.get(kind, 0) + 1


def merged(results: Iterable[Result]) -> Result:
    """One result of all processes' results."""
    whole = Result()
    for result in results:
        whole.merge(result)
    return whole
