"""What a server says of itself, read from the shared slots of its processes.

Nothing here asks a serving process: a slot is memory, so that reading costs the hot path nothing
and an answer comes in milliseconds while every worker is busy. Processes that died have no gauges
any more; their counts stay.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from counter.admin.history import History
from counter.processes.slots import (
    AWAY_SINCE_MS,
    BACKLOG,
    CONNECTIONS,
    CONNECTIONS_TOTAL,
    MOST_CONNECTIONS,
    PID,
    REASONS,
    REFUSED,
    REQUESTS,
    SESSIONS_EVICTED,
    SESSIONS_OPENED,
    SESSIONS_REFUSED,
    SESSIONS_RESUMED,
    STARTS,
    TOTAL_AT_MS,
    WAITING,
    WAITING_SINCE_MS,
    WORKERS,
    WORKERS_TAKEN,
    Slots,
    now_ms,
)
from counter.system.version import VERSION


@dataclass(frozen=True)
class Readiness:
    """Whether new connections should come here; if not, why."""

    ready: bool
    reason: str = ""


class Status:
    """The state of one server. `read_total` gives the total of a server without a store, `address`
    is where it serves, `survives` what an answered addition survives, and `read_sessions` gives how
    many sessions are kept, and how many of those have a connection, where there may be any."""

    def __init__(
        self,
        slots: Slots,
        store: str,
        read_total: Callable[[], int] | None,
        total_at_start: int,
        address: str = "",
        survives: str = "",
        read_sessions: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        self.slots = slots
        self.store = store
        self.address = address
        self.survives = survives
        self.draining = False
        self.history = History(slots)
        self._read_total = read_total
        self._read_sessions = read_sessions
        self._total_at_start = total_at_start
        self._started_ms = now_ms()

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
            return Readiness(False, f"store {self.store} has been away for {away_s:.1f} s")
        return Readiness(True)

    def is_full(self) -> bool:
        """Whether every worker is taken; nobody need wait for one, as idle connections keep theirs
        until somebody does."""
        workers = self.slots.sum(WORKERS)
        return workers > 0 and self.slots.sum(WORKERS_TAKEN) >= workers

    def waiting(self) -> int:
        """Connections that wait for a worker: those with unread bytes and without one."""
        return self.slots.sum(WAITING)

    def longest_wait_s(self) -> float:
        """How long the first of those that wait for a worker has waited; 0 if nobody does."""
        since_ms = [ms for ms in self.slots.cells(WAITING_SINCE_MS) if ms]
        return max(0, now_ms() - min(since_ms)) / 1000 if since_ms else 0.0

    def backlog(self) -> int:
        """Connections in the listen backlog, as the processes saw it last."""
        return max(self.slots.cells(BACKLOG))

    def is_at_limit(self) -> bool:
        """Whether as many connections are open as may be, so that new ones wait in the backlog."""
        most = self.slots.sum(MOST_CONNECTIONS)
        return most > 0 and self.slots.sum(CONNECTIONS) >= most

    def crowd(self) -> str:
        """What to say of more connections than can be served at once: `full: 30 wait` for a
        worker, and how many are not accepted, as --maxConnections is reached; else nothing."""
        waiting, outside = self.waiting(), self.backlog() if self.is_at_limit() else 0
        if waiting and outside:
            return f"full: {waiting:,} wait, {outside:,} more in the backlog"
        if outside:
            return f"full: {outside:,} wait in the backlog"
        return f"full: {waiting:,} wait" if waiting else ""

    def sessions(self) -> dict[str, int]:
        """How many sessions are kept and have a connection, and what became of hellos so far."""
        kept, connected = (0, 0) if self._read_sessions is None else self._read_sessions()
        return {
            "kept": kept,
            "connected": connected,
            "opened": self.slots.sum(SESSIONS_OPENED),
            "resumed": self.slots.sum(SESSIONS_RESUMED),
            "refused": self.slots.sum(SESSIONS_REFUSED),
            "evicted": self.slots.sum(SESSIONS_EVICTED),
        }

    def uptime_s(self) -> float:
        """Seconds since the server began."""
        return max(0.0, time.time() - self.slots.began_at_s)

    def pids(self) -> dict[str, int]:
        """The processes of this server by what they do, for one of them that serves the admin port.

        Names stay when processes are replaced.
        """
        pids = {f"serving-{place}": pid for place, pid in enumerate(self.slots.cells(PID)) if pid}
        if os.getpid() in pids.values():
            return pids  # one process is all
        return {"master": os.getppid(), "admin": os.getpid(), **pids}

    def restarts(self) -> int:
        """How many processes were replaced."""
        return sum(max(0, starts - 1) for starts in self.slots.cells(STARTS))

    def sample(self) -> None:
        """Notes the counts of this moment; to be called once a second."""
        self.history.note()

    def as_json(self) -> dict[str, Any]:
        """Everything that the page shows. Numbers above 2^53 are text."""
        total, age_s = self.total()
        readiness = self.readiness()
        slots, history = self.slots, self.history
        commits = history.commits()
        return {
            "at_s": time.monotonic(),
            "address": self.address,
            "version": VERSION,
            "uptime_s": round(self.uptime_s(), 1),
            "total": str(total),
            "age_s": round(age_s, 3),
            "ready": readiness.ready,
            "reason": readiness.reason,
            "full": self.crowd(),
            "store": self.store,
            "survives": self.survives,
            "requests": slots.sum(REQUESTS),
            "rates": {"minutes": history.minutes(), "hour": history.hour()},
            "commits": commits and finite(asdict(commits)),
            "connections": slots.sum(CONNECTIONS),
            "connections_total": slots.sum(CONNECTIONS_TOTAL),
            "max_connections": slots.sum(MOST_CONNECTIONS),
            "workers": slots.sum(WORKERS),
            "workers_taken": slots.sum(WORKERS_TAKEN),
            "waiting": self.waiting(),
            "longest_wait_s": self.longest_wait_s(),
            "backlog": self.backlog(),
            "refused": {reason: slots.sum(REFUSED + place) for place, reason in enumerate(REASONS)},
            "sessions": self.sessions(),
            "processes": [self._process(index) for index in range(len(slots))],
        }

    def _process(self, index: int) -> dict[str, Any]:
        slot = self.slots[index]
        return {
            "pid": slot[PID],
            "connections": slot[CONNECTIONS],
            "workers": slot[WORKERS],
            "workers_taken": slot[WORKERS_TAKEN],
            "waiting": slot[WAITING],
            "requests": slot[REQUESTS],
            "refused": sum(slot[REFUSED + place] for place in range(len(REASONS))),
            "restarts": max(0, slot[STARTS] - 1),
            "away": bool(slot[AWAY_SINCE_MS]),
        }


def finite(numbers: dict[str, float]) -> dict[str, float | None]:
    """Numbers as JSON can have them: None for infinity."""
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}
