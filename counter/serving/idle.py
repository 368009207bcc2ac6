"""Room for those who wait in the backlog, once as many connections are open as may be.

An idle connection costs nobody anything until then. Then those that were idle for longer than
--idleTimeout are ended, the longest idle first, as many as wait. The kernel tells how long: the
time in which a connection waited in the queue itself counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar


class Idler(Protocol):
    """What is asked of a connection that may be idle."""

    def idle_for_s(self) -> float | None:
        """Seconds since the peer's last byte; None while anything is under way."""


C = TypeVar("C", bound=Idler)


class Crowd(Protocol[C]):
    """What making room may see of those who are connected and those who would like to be."""

    def count_backlog(self) -> int:
        """Connections in the backlog that no process of the server has room for."""

    def open_connections(self) -> Iterable[C]:
        """The connections of this process."""

    def warn_crowded(self, waiting: int) -> None:
        """Says that so many wait, if this process is the one to say it."""

    def end_idle(self, connection: C) -> None:
        """Ends a connection in favour of one that waits."""


class Room(Generic[C]):
    """Makes room in one of `processes` serving processes; make() is called by its sweep while it
    has as many connections as it may."""

    def __init__(self, crowd: Crowd[C], processes: int, idle_timeout_s: float) -> None:
        self._crowd = crowd
        self._processes = processes
        self._idle_timeout_s = idle_timeout_s
        self._look_at = 0.0  # none that was there can have been idle for long enough before

    def note_arrival(self) -> None:
        """A connection came in; it may have waited for longer than any other idles."""
        self._look_at = 0.0

    def make(self, now: float) -> None:
        """Warns that connections wait, if they do, and ends idle ones in their favour."""
        waiting = self._crowd.count_backlog()
        if not waiting:
            return
        self._crowd.warn_crowded(waiting)
        if now >= self._look_at:
            # Every process of a crowded server does this: together they end as many as wait.
            self._end_idle(now, -(-waiting // self._processes))

    def _end_idle(self, now: float, wanted: int) -> None:
        """Ends up to `wanted` connections. Asking the kernel about each takes 1 us or two, so it is
        not done before one of them can be due."""
        asked = [
            (connection.idle_for_s(), connection) for connection in self._crowd.open_connections()
        ]
        idle = [(idle_s, connection) for idle_s, connection in asked if idle_s is not None]
        idle.sort(key=lambda pair: pair[0], reverse=True)
        due = [connection for idle_s, connection in idle if idle_s > self._idle_timeout_s]
        for connection in due[:wanted]:
            self._crowd.end_idle(connection)
        longest_s = idle[len(due)][0] if len(due) < len(idle) else 0.0
        # A busy one may have been silent for long when it is done.
        any_busy = len(idle) < len(asked)
        self._look_at = now if due or any_busy else now + self._idle_timeout_s - longest_s
