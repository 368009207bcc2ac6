"""Who may be read: the workers of one process, and the turns that connections take for them.

A worker is a place in the Pool and the right to be read. As long as there are enough of them nobody
is asked to give one up, idle or not. While connections wait, a worker that is silent for SILENT_S
is given up, then those that were held longest beyond a slice, as many as wait; their connections go
to the tail if they have anything unread, and cost nobody anything if not. So a connection waits at
most for (waiting / workers + 1) slices, whatever the others do.
"""

from __future__ import annotations

import time
from itertools import islice
from typing import Any, Final, Generic, Protocol, TypeVar

# A worker that reads nothing for so long is idle; one that waits for its peer's next frame over
# loopback or a local network is not.
SILENT_S: Final = 0.001

# A look at the workers takes so small a part of the time at most: 0.1 us for each of them.
_LOOK_SHARE: Final = 0.05


class Reader(Protocol):
    """What is asked of a connection that takes turns."""

    def serve(self) -> None:
        """It has a worker: reads from now on."""

    def park(self) -> None:
        """It has none: asks for one as soon as there is something to read."""

    def last_read_at(self) -> float:
        """When something was read last, by time.monotonic()."""


C = TypeVar("C", bound=Reader)


class Workers(Generic[C]):
    """The workers of one process, which are the places of a gevent Pool."""

    def __init__(self, pool: Any, loop: Any, slice_s: float) -> None:
        self._pool = pool
        self._slice_s = slice_s
        self._since: dict[C, float] = {}  # who has a worker, since when: the longest first
        self._waiting: dict[C, float] = {}  # who waits for one, since when: the longest first
        self._look_at = 0.0
        self._timer = loop.timer(SILENT_S, SILENT_S)

    def _any_free(self) -> bool:
        """Whether a worker is free; the Pool's own answer takes 0.3 us."""
        return bool(len(self._since) < self._pool.size)

    @property
    def taken(self) -> int:
        """How many workers are taken."""
        return len(self._since)

    @property
    def waiting(self) -> int:
        """How many connections have something to read and no worker."""
        return len(self._waiting)

    @property
    def waiting_since(self) -> float | None:
        """Since when the first of them waits, by time.monotonic(); None where nobody does."""
        return next(iter(self._waiting.values()), None)

    def admit(self, connection: C) -> None:
        """Gives a connection a worker if one is free, and parks it if not: one that is new, or goes
        on after it was not read for a while."""
        if self._waiting or not self._any_free():
            connection.park()
        else:
            self._give(connection, time.monotonic())

    def request(self, connection: C) -> None:
        """A parked connection has something to read: it gets a worker, now or in its turn."""
        now = time.monotonic()
        if not self._waiting:
            if self._any_free():
                self._give(connection, now)
                return
            self._timer.start(self.look)
        self._waiting[connection] = now
        self.look()

    def leave(self, connection: C) -> None:
        """A connection is not read any more; whoever waits gets its worker."""
        if self._since.pop(connection, None) is not None:
            self._pool.discard(connection)
            self._hand_on()
        elif self._waiting.pop(connection, None) is not None:
            self._rest()

    def look(self) -> None:
        """Has workers given up in favour of those who wait, if any has to be now."""
        now = time.monotonic()
        if now < self._look_at or not self._waiting:
            return
        silent_at = now - SILENT_S
        silent = (
            connection
            for connection, since in self._since.items()
            if since <= silent_at and connection.last_read_at() <= silent_at
        )
        self._give_up(list(islice(silent, len(self._waiting))))
        spent = now - self._slice_s
        over = [connection for connection, since in self._since.items() if since <= spent]
        self._give_up(over[: len(self._waiting)])
        took_s = time.monotonic() - now
        self._look_at = now + max(SILENT_S, took_s / _LOOK_SHARE)

    def close(self) -> None:
        """Gives nobody a worker any more."""
        self._waiting.clear()
        self._timer.close()

    def _give(self, connection: C, now: float) -> None:
        self._pool.add(connection)
        self._since[connection] = now
        connection.serve()

    def _give_up(self, connections: list[C]) -> None:
        for connection in connections:
            del self._since[connection]
            self._pool.discard(connection)
            connection.park()
            self._hand_on()

    def _hand_on(self) -> None:
        if self._waiting and self._any_free():
            first = next(iter(self._waiting))
            del self._waiting[first]
            self._give(first, time.monotonic())
            self._rest()

    def _rest(self) -> None:
        if not self._waiting:
            self._timer.stop()
