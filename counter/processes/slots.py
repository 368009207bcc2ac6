"""What each serving process says of itself, in memory that outlives it.

A slot is a row of uint64 cells in one anonymous mapping, made before the fork. Only its own
process writes a slot while it lives, each cell by one aligned store, so no lock is needed and a
reader never sees half a number; what has to be decided once for all slots is decided alone().
When a process dies its counts stay, for its successor goes on from them, and the master, its only
writer by then, clears its gauges.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import MutableSequence
from typing import Final

from counter.processes.lock import SharedLock
from protocol import TOTAL_MASK

# Counts, which only grow and survive the process.
REQUESTS: Final = 0  # additions, reads included
CONNECTIONS_TOTAL: Final = 1  # connections that ever began
TOTAL: Final = 2  # the last total that a store told
TOTAL_AT_MS: Final = 3  # when, by the monotonic clock; 0 where none did
LOSSES: Final = 4  # how often a store was found to have lost what it had answered
READS: Final = 5  # reads from sockets that brought frames
STARTS: Final = 6  # processes that served in this place, one after the other
COMMIT_US: Final = 7  # microseconds in commits to a store, all together
REFUSED: Final = 8  # the first of as many as there are REASONS
# The first of as many as there are COMMIT_BOUNDS_S, and one: commits by how long they took.
COMMITS: Final = 16
SESSIONS_OPENED: Final = 28
SESSIONS_RESUMED: Final = 29
SESSIONS_REFUSED: Final = 30  # hellos that no session follows
SESSIONS_EVICTED: Final = 31  # sessions that gave way to others

# Why the server ended a connection that had not ended itself.
REASONS: Final = ("checksum", "limit", "incomplete", "not-reading", "idle", "tls", "store", "hello")
COMMIT_BOUNDS_S: Final = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

# Gauges, which end with the process.
PID: Final = 32
CONNECTIONS: Final = 33  # open connections, those without a worker included
WORKERS: Final = 34  # how many of them may have a worker at once; 0 while it does not accept
AWAY_SINCE_MS: Final = 35  # since when its store is away, by the monotonic clock; 0 where it is not
BACKLOG: Final = 36  # connections in the backlog, as this process saw it last
WORKERS_TAKEN: Final = 37  # connections that have a worker now
WAITING: Final = 38  # connections that wait for one: they have unread bytes and no worker
WAITING_SINCE_MS: Final = 39  # since when the first of those waits, by now_ms(); 0 where none does
MOST_CONNECTIONS: Final = 40  # its share of --maxConnections; 0 while it does not accept

_FIRST_GAUGE: Final = 32
_CELLS: Final = 48  # 384 bytes a slot: two processes never write to the same cache line

# So much later than another may a process note a total that the store told it earlier.
_LATE_MS: Final = 1000


class Slots:
    """The slots of `count` processes; shared with every process forked afterwards."""

    def __init__(self, count: int) -> None:
        self._memory = mmap.mmap(-1, count * _CELLS * 8)
        cells = memoryview(self._memory).cast("Q")
        self._slots = [cells[i * _CELLS : (i + 1) * _CELLS] for i in range(count)]
        self._lock = SharedLock("slots-lock")
        self.began_at_s = time.time()  # with the server that they are made for

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, index: int) -> MutableSequence[int]:
        """A process's own slot, to be read and written by the names above."""
        return self._slots[index]  # type: ignore[return-value]

    def alone(self) -> SharedLock:
        """One process at a time, for what hangs on several slots and seldom happens."""
        return self._lock

    def cells(self, cell: int) -> list[int]:
        """One cell of each process."""
        return [slot[cell] for slot in self._slots]

    def sum(self, cell: int) -> int:
        """One cell over all processes, dead and living."""
        return sum(slot[cell] for slot in self._slots)

    def last_total(self) -> int | None:
        """The last total that a store told any of the processes; None where none did.

        Each notes what it was told a moment later: of those noted at nearly the same time, the
        last is the one that is ahead of the others.
        """
        told = [slot for slot in self._slots if slot[TOTAL_AT_MS]]
        if not told:
            return None
        newest = max(told, key=lambda slot: slot[TOTAL_AT_MS])
        since_ms = max(0, newest[TOTAL_AT_MS] - _LATE_MS)
        recent = [slot[TOTAL] for slot in told if slot[TOTAL_AT_MS] >= since_ms]
        # Ahead modulo 2^64: by less than half of that.
        return max(recent, key=lambda total: (total - newest[TOTAL] + 2**63) & TOTAL_MASK)

    def clear_gauges(self, index: int) -> None:
        """For a process that is dead: it holds nothing any more."""
        for cell in range(_FIRST_GAUGE, _CELLS):
            self._slots[index][cell] = 0

    def fewest_connections(self, but: int) -> int | None:
        """Of the processes that may take one more, leaving out one: the smallest number of open
        connections.

        None where no other can take one: each does not accept, or has its share.
        """
        return min(
            (
                slot[CONNECTIONS]
                for index, slot in enumerate(self._slots)
                if index != but and slot[CONNECTIONS] < slot[MOST_CONNECTIONS]
            ),
            default=None,
        )


def now_ms() -> int:
    """The clock that cells are kept by: monotonic, in milliseconds; never 0, which means never."""
    return to_ms(time.monotonic())


def to_ms(moment_s: float) -> int:
    """A moment of time.monotonic() as now_ms() gives it."""
    return max(1, int(moment_s * 1000))
