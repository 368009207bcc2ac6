"""The sessions of a total in memory: what is known of each, in memory that its processes share.

A session has a slot: its id, its window, who holds it, how many of its frames are in the total, and
the totals after its last batches, in a ring. A ring of as many runs as the window has frames is
enough, since no more frames are unanswered, and each run ends with at least one.

Whoever holds a session writes its slot, and nobody else; who holds it is decided under a lock, that
the kernel drops when the one who locked it dies. A process opens sessions in slots of its own. The
window is the word that makes a slot valid: it is written last when a session is opened, and cleared
first when it ends. So whoever dies inside leaves no half a session.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Final

from counter.processes.lock import SharedLock
from counter.processes.slots import now_ms
from protocol import MAX_WINDOW, Answer, Control, Hello, Refused, Run

# A session without a connection is kept for so long since it had one.
LIFE_MS: Final = 3600_000
# Where there is no room for another one, those give way that had none for so long.
SPARE_MS: Final = 300_000

# So much memory may the rings of all sessions take: 10,000 windows of 4,096 frames would be 655 MB.
RING_BYTES: Final = 64 << 20

_ID_BYTES: Final = 16
_RUN_BYTES: Final = 16
_RING_PLACE: Final = MAX_WINDOW * _RUN_BYTES  # of each slot, of which only pages in use are there
_PAGE: Final = mmap.PAGESIZE
_NORESERVE: Final = 0x4000  # MAP_NORESERVE, which Python names from 3.13 on


@dataclass(frozen=True)
class Claimed:
    """A session is held by who asked for it, unless `slot` is None: it is over then."""

    slot: int | None
    answer: Answer


@dataclass(frozen=True)
class Held:
    """Another connection has the session in that slot, of the process at that place."""

    slot: int
    place: int


class SessionTable:
    """Room for `sessions` of them, a share for each of `places` processes. OSError without memory
    for it.

    What is decided between processes is decided by whoever holds `lock`; what a holder writes of
    its own session needs none.
    """

    def __init__(self, sessions: int, places: int) -> None:
        self._share = -(-sessions // places)
        self._share_bytes = RING_BYTES // places
        count = self._share * places
        columns = 6 * count * 8
        self._ids_at = columns
        rings_at = -(-(columns + count * _ID_BYTES) // _PAGE) * _PAGE
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _NORESERVE
        self._memory = mmap.mmap(-1, rings_at + count * _RING_PLACE, flags=flags)
        self._rings_at = rings_at
        words = memoryview(self._memory).cast("Q")
        column = [words[i * count : (i + 1) * count] for i in range(6)]
        self._window, self._owner, self._wanted, self._applied, self._written, self._used_ms = (
            column
        )
        self._rings = words[rings_at // 8 :]
        # What is in no slot's place, or the id of zeros would be found in every one that is free.
        self._memory[self._ids_at : self._ids_at + count * _ID_BYTES] = os.urandom(16) * count
        self.lock = SharedLock("sessions-lock")
        self._ring_bytes = 0  # of the sessions in this process's slots, or more
        self.evicted = 0  # by this process

    def count(self) -> tuple[int, int]:
        """How many sessions are kept, and how many of them have a connection."""
        return sum(map(bool, self._window)), sum(map(bool, self._owner))

    def claim(self, place: int, hello: Hello, limit: int) -> Claimed | Held | Refused:
        """Has the process at `place` hold the session that a hello names, if nobody else does;
        what to answer, `limit` being the largest amount. For who holds the lock."""
        slot = self._find(hello.session_id)
        if slot is not None and self._is_over(slot):
            self._free(slot)
            slot = None
        if hello.kind is Control.OPEN:
            if slot is None:
                return self._open(place, hello, limit)
            if self._applied[slot]:
                return Refused.UNKNOWN
        if slot is None:
            return Refused.UNKNOWN
        have = 0 if hello.kind is Control.OPEN else hello.value
        applied = self._applied[slot]
        if have + self._window[slot] < applied:
            return Refused.UNKNOWN
        if owner := self._owner[slot]:
            return Held(slot, owner - 1)
        if have > applied:
            # What was answered is not in the total: the client has to learn it, and then knows more
            # than there is here.
            self._free(slot)
            return Claimed(None, Answer(applied, limit))
        self._hold(slot, place)
        return Claimed(slot, Answer(applied, limit, tuple(self._runs_behind(slot, have))))

    def want(self, slot: int, place: int) -> None:
        """Has the holder of a session find that the process at `place` wants it."""
        self._wanted[slot] = place + 1

    def wanted_by(self, slot: int) -> int | None:
        """The place of the process that wants a session which another holds."""
        return self._wanted[slot] - 1 if self._wanted[slot] else None

    def release(self, slot: int) -> None:
        """Lets go of a session, which is kept."""
        self._used_ms[slot] = now_ms()
        self._wanted[slot] = 0
        self._owner[slot] = 0

    def end(self, slot: int) -> int:
        """Ends a session that one holds; gives back how many frames were applied."""
        applied = self._applied[slot]
        self._free(slot)
        return applied

    def release_all(self, place: int) -> None:
        """Lets go of what a process held that is dead."""
        for slot, owner in enumerate(self._owner):
            if owner == place + 1:
                self.release(slot)

    def progress(self, slot: int) -> tuple[int, int]:
        """How many frames of a session are in the total, and how many runs were ever written."""
        return self._applied[slot], self._written[slot]

    def note(self, slot: int, applied: int, number: int, total: int) -> None:
        """Writes that run `number` of a session ended with frame `applied`, and the total then.

        The same again is the same.
        """
        if not self._window[slot]:  # it was ended meanwhile
            return
        at = self._run_at(slot, number)
        self._rings[at] = applied
        self._rings[at + 1] = total
        self._written[slot] = number + 1
        self._applied[slot] = applied

    def _find(self, session_id: int) -> int | None:
        """The slot of a session."""
        key = session_id.to_bytes(_ID_BYTES)
        at, end = self._ids_at, self._ids_at + len(self._window) * _ID_BYTES
        while (at := self._memory.find(key, at, end)) >= 0:
            slot, odd = divmod(at - self._ids_at, _ID_BYTES)
            if not odd and self._window[slot]:
                return slot
            at += 1
        return None

    def _open(self, place: int, hello: Hello, limit: int) -> Claimed | Refused:
        slot = self._free_slot(place, hello.value)
        if slot is None:
            return Refused.NO_ROOM
        at = self._ids_at + slot * _ID_BYTES
        self._memory[at : at + _ID_BYTES] = hello.session_id.to_bytes(_ID_BYTES)
        self._applied[slot] = self._written[slot] = 0
        self._hold(slot, place)
        self._window[slot] = hello.value
        return Claimed(slot, Answer(0, limit))

    def _hold(self, slot: int, place: int) -> None:
        self._wanted[slot] = 0
        self._owner[slot] = place + 1

    def _free_slot(self, place: int, window: int) -> int | None:
        """A slot of the process's own, after those that are spare gave way where there is none."""
        own = range(place * self._share, (place + 1) * self._share)
        needed = _ring_bytes(window)
        slot = self._first_free(own)
        if slot is None or self._ring_bytes + needed > self._share_bytes:
            # What others have ended is not in it yet.
            self._ring_bytes = sum(map(_ring_bytes, self._window[own.start : own.stop]))
            for spare in self._spare(own):
                if slot is not None and self._ring_bytes + needed <= self._share_bytes:
                    break
                self._ring_bytes -= _ring_bytes(self._window[spare])
                self._free(spare)
                self.evicted += 1
                slot = spare
        if slot is None or self._ring_bytes + needed > self._share_bytes:
            return None
        self._ring_bytes += needed
        return slot

    def _first_free(self, own: range) -> int | None:
        """The first slot without a session, by the speed of C."""
        at, end = own.start * 8, own.stop * 8
        while (at := self._memory.find(bytes(8), at, end)) >= 0:
            if at % 8 == 0:
                return at // 8
            at += 8 - at % 8
        return None

    def _spare(self, own: range) -> list[int]:
        """Sessions that give way to another one, those first that had no connection for longest."""
        since = now_ms() - SPARE_MS
        idle = [
            (self._used_ms[slot], slot)
            for slot in own
            if self._window[slot] and not self._owner[slot] and self._used_ms[slot] <= since
        ]
        return [slot for _, slot in sorted(idle)]

    def _is_over(self, slot: int) -> bool:
        """Whether a session had no connection for too long."""
        return not self._owner[slot] and self._used_ms[slot] <= now_ms() - LIFE_MS

    def _free(self, slot: int) -> None:
        large = _ring_bytes(self._window[slot]) > _PAGE
        self._window[slot] = 0
        self._owner[slot] = 0
        if large:  # the others leave a page, which the next one uses
            ring = self._rings_at + slot * _RING_PLACE
            self._memory.madvise(mmap.MADV_REMOVE, ring, _RING_PLACE)

    def _runs_behind(self, slot: int, have: int) -> list[Run]:
        """The runs that end behind frame `have`, the oldest first."""
        runs: list[Run] = []
        written = self._written[slot]
        for number in range(written - 1, max(0, written - self._window[slot]) - 1, -1):
            at = self._run_at(slot, number)
            if self._rings[at] <= have:
                break
            runs.append((self._rings[at], self._rings[at + 1]))
        return runs[::-1]

    def _run_at(self, slot: int, number: int) -> int:
        """Where the words of a run are."""
        return (slot * _RING_PLACE + number % self._window[slot] * _RUN_BYTES) // 8


def _ring_bytes(window: int) -> int:
    """What a ring takes at most, in whole pages; nothing where there is no session."""
    return -(-window * _RUN_BYTES // _PAGE) * _PAGE
