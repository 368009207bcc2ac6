"""What a server says of itself, read from the shared slots of its processes.

Nothing here asks a serving process: a slot is memory, so that reading costs the hot path nothing
and an answer comes in milliseconds while every worker is busy. Processes that died have no gauges
any more; their counts stay.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from counter.processes.slots import (
    AWAY_SINCE_MS,
    CONNECTIONS,
    PID,
    REASONS,
    REFUSED,
    REQUESTS,
    STARTS,
    TOTAL_AT_MS,
    WAITING,
    WORKERS,
    Slots,
    now_ms,
)

# What the page shows: the requests of each second, for so many minutes.
HISTORY_S: Final = 300


@dataclass(frozen=True)
class Readiness:
    """Whether new connections should come here; if not, why."""

    ready: bool
    reason: str = ""


class Status:
    """The state of one server. `read_total` gives the total of a server without a store."""

    def __init__(
        self,
        slots: Slots,
        store: str,
        read_total: Callable[[], int] | None,
        total_at_start: int,
    ) -> None:
        self.slots = slots
        self.store = store
        self.draining = False
        self._read_total = read_total
        self._total_at_start = total_at_start
        self._started_ms = now_ms()
        self._history: deque[tuple[float, int]] = deque(maxlen=HISTORY_S + 1)

    def total(self) -> tuple[int, float]:
        """The last total that this server saw, and its age in seconds."""
        if self._read_total is not None:
            return self._read_total(), 0.0
        told = self.slots.last_total()
        at_ms = max(self.slots[i][TOTAL_AT_MS] for i in range(len(self.slots)))
        if told is None:
            told, at_ms = self._total_at_start, self._started_ms
        return told, max(0, now_ms() - at_ms) / 1000

    def readiness(self) -> Readiness:
        """What /readyz says."""
        if self.draining:
            return Readiness(False, "draining: the server is stopping")
        if not self.slots.sum(WORKERS):
            has_served = any(self.slots.cells(STARTS))
            why = "no process serves now" if has_served else "starting: no process serves yet"
            return Readiness(False, why)
        away_ms = [ms for ms in self.slots.cells(AWAY_SINCE_MS) if ms]
        if away_ms:
            away_s = (now_ms() - min(away_ms)) / 1000
            return Readiness(False, f"store {self.store} is away since {away_s:.1f} s")
        return Readiness(True)

    def is_full(self) -> bool:
        """Whether every worker is taken."""
        workers = self.slots.sum(WORKERS)
        return workers > 0 and self.slots.sum(CONNECTIONS) >= workers

    def waiting(self) -> int:
        """Connections in the listen backlog, as the processes saw it last."""
        return max(self.slots.cells(WAITING))

    def restarts(self) -> int:
        """How many processes were replaced."""
        return sum(max(0, starts - 1) for starts in self.slots.cells(STARTS))

    def sample(self) -> None:
        """Notes the requests so far; to be called once a second."""
        self._history.append((time.monotonic(), self.slots.sum(REQUESTS)))

    def rates(self) -> list[int]:
        """Requests a second between each two samples, the oldest first."""
        samples = list(self._history)
        pairs = pairwise(samples)
        return [round((r2 - r1) / (t2 - t1)) for (t1, r1), (t2, r2) in pairs if t2 > t1]

    def as_json(self) -> dict[str, Any]:
        """Everything that the page shows. Numbers above 2^53 are text."""
        total, age_s = self.total()
        readiness = self.readiness()
        slots = self.slots
        return {
            "at_s": time.monotonic(),
            "total": str(total),
            "age_s": round(age_s, 3),
            "ready": readiness.ready,
            "reason": readiness.reason,
            "store": self.store,
            "requests": slots.sum(REQUESTS),
            "rates": self.rates(),
            "connections": slots.sum(CONNECTIONS),
            "workers": slots.sum(WORKERS),
            "waiting": self.waiting(),
            "refused": {reason: slots.sum(REFUSED + place) for place, reason in enumerate(REASONS)},
            "processes": [self._process(index) for index in range(len(slots))],
        }

    def _process(self, index: int) -> dict[str, Any]:
        slot = self.slots[index]
        return {
            "pid": slot[PID],
            "connections": slot[CONNECTIONS],
            "workers": slot[WORKERS],
            "requests": slot[REQUESTS],
            "refused": sum(slot[REFUSED + place] for place in range(len(REASONS))),
            "restarts": max(0, slot[STARTS] - 1),
            "away": bool(slot[AWAY_SINCE_MS]),
        }
