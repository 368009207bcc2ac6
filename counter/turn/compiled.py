"""The engine in C: turn.c behind the interface of engine.py. Nothing is decided here either."""

from __future__ import annotations

import _socket
import errno
import mmap
import os
import struct
import time
from collections.abc import Callable, MutableSequence
from typing import Any, Final

from counter.processes.slots import READS, REQUESTS
from counter.turn.engine import LONGEST_S, Adder, Engine, Interest, KeptTurn, Share, Turn
from counter.turn.library import Library
from protocol import MAX_AMOUNT, TOTAL_MASK

_LONGEST_NS: Final = int(LONGEST_S * 1e9)

# struct turn_event: unpacked at once, a field of a cdata takes as long as a whole event.
_EVENTS: Final = struct.Struct("@iiIP")
_SHARES: Final = struct.Struct("@I4xQQ")  # struct turn_share


class CompiledEngine(Engine):
    """The engine whose turn is one call of C."""

    name = "compiled"

    def __init__(self, library: Library, max_amount: int = MAX_AMOUNT) -> None:
        super().__init__()
        ffi, self.lib = library.ffi, library.lib
        self.ffi = ffi
        self._state: Any = ffi.new("struct turn_state *")
        engine = self.lib.turn_open(self._epoll.fileno(), max_amount, self._state)
        if engine == ffi.NULL:
            raise MemoryError("no memory for the turn")
        self.engine: Any = ffi.gc(engine, self.lib.turn_close)
        self._ready = 0

    def open(self, sock: _socket.socket, interest: Interest) -> None:
        fd = sock.fileno()
        if self.lib.turn_add(self.engine, fd):
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        self.lib.turn_serve_frames(self.engine, fd, interest.is_served)
        self._epoll.register(fd, interest.mask)

    def watch(self, fd: int, interest: Interest) -> None:
        self.lib.turn_serve_frames(self.engine, fd, interest.is_served)
        self._epoll.modify(fd, interest.mask)

    def forget(self, fd: int) -> None:
        self.lib.turn_forget(self.engine, fd)

    def void(self, fd: int) -> None:
        self.lib.turn_void(self.engine, fd)

    def limit(self, fd: int, count: int) -> None:
        self.lib.turn_limit(self.engine, fd, count)

    def hold(self, fd: int, holds: bool) -> None:
        self.lib.turn_hold_replies(self.engine, fd, holds)

    def tell_answered(self, fd: int) -> None:
        self.lib.turn_tell(self.engine, fd)

    def join(self, fd: int, tag: int) -> None:
        self.lib.turn_join(self.engine, fd, tag)

    def owed(self, fd: int) -> int:
        return int(self.lib.turn_owed(self.engine, fd))

    def held(self, fd: int) -> int:
        return int(self.lib.turn_held(self.engine, fd))

    def read_at(self, fd: int) -> float:
        return int(self.lib.turn_read_at(self.engine, fd)) / 1e9

    def receive(self, fd: int = -1) -> Turn | None:
        self._ready = self.lib.turn_receive(self.engine, fd)
        self.take_events()
        state = self._state
        if not state.parts:
            return None
        return _Received(self, state)

    def is_quiet(self) -> bool:
        return self._ready <= 0

    def in_one_call(
        self, counter: Adder, slot: MutableSequence[int], take: Callable[[Turn], None]
    ) -> Callable[[], None] | None:
        address = getattr(counter, "address", 0)
        if not address:
            return None
        cells = self.ffi.from_buffer("uint64_t[]", slot)
        total = self.ffi.cast("uint64_t *", address)
        serve, engine = self.lib.turn_serve, self.engine
        requests, reads = cells + REQUESTS, cells + READS

        def exchange() -> None:
            until = 0.0
            while serve(engine, total, requests, reads, _LONGEST_NS):
                self.take_events()
                if not self._state.tagged:
                    return
                take(_Received(self, self._state))
                until = until or time.monotonic() + LONGEST_S
                if self.events or time.monotonic() > until:
                    return

        return exchange

    def tagged_add(
        self, address: int, memory: mmap.mmap, before_at: int, notes_at: int, places: int
    ) -> Callable[[int, int], None] | None:
        if not self.lib.cell_can_swap():
            return None
        cell_add, cell = self.lib.cell_add, self.ffi.cast("struct cell *", address)
        words = self.ffi.from_buffer("uint64_t[]", memory)
        before, notes = words + before_at, words + notes_at

        def add(amount: int, tag: int) -> None:
            cell_add(cell, amount, tag, before, notes, places)

        return add

    def read_shares(self, parts: Any, count: int) -> list[Share]:
        """What of so many parts bears a tag; NULL: of the turn that was received."""
        shares = self.ffi.new("struct turn_share[]", count)
        found = self.lib.turn_shares(self.engine, parts, count, shares)
        return list(_SHARES.iter_unpack(self.ffi.buffer(shares, found * _SHARES.size)))

    def take_events(self) -> None:
        """Takes over what the last call has to tell."""
        state, ffi = self._state, self.ffi
        count = state.events
        if not count:
            return
        for kind, fd, size, address in _EVENTS.iter_unpack(
            ffi.buffer(state.event, count * _EVENTS.size)
        ):
            data = ffi.buffer(ffi.cast("char *", address), size)[:] if size else b""
            self.events.append((kind, fd, data))


class _Received(Turn):
    """What the last call of C has read; it is there until the next, and nobody can leave before."""

    __slots__ = ("_amounts", "_engine", "amount", "frames", "reads", "tagged")

    def __init__(self, engine: CompiledEngine, state: Any) -> None:
        self._engine = engine
        self.amount, self.frames, self.reads = state.sum, state.frames, state.parts
        self.tagged, self._amounts = state.tagged, state.amounts

    def shares(self) -> list[Share]:
        return self._engine.read_shares(self._engine.ffi.NULL, self.reads)

    def answer(self, before: int) -> None:
        engine = self._engine
        engine.lib.turn_answer(engine.engine, before & TOTAL_MASK)
        engine.take_events()

    def keep(self) -> KeptTurn:
        return _Kept(self._engine, self, self._amounts)


class _Kept(KeptTurn):
    """A turn in memory of its own."""

    __slots__ = ("_amounts", "_count", "_engine", "_parts", "amount", "frames", "reads", "tagged")

    def __init__(self, engine: CompiledEngine, turn: Turn, amounts: int) -> None:
        self._engine = engine
        self.amount, self.frames, self.reads = turn.amount, turn.frames, turn.reads
        self.tagged, self._count = turn.tagged, turn.reads
        self._parts = engine.ffi.new("struct turn_part[]", self._count)
        self._amounts = engine.ffi.new("uint64_t[]", amounts)
        engine.lib.turn_keep(engine.engine, self._parts, self._amounts)
        engine.take_events()

    def answer(self, before: int) -> None:
        engine = self._engine
        engine.lib.turn_answer_kept(engine.engine, self._parts, self._count, before & TOTAL_MASK)
        engine.take_events()

    def keep(self) -> KeptTurn:
        return self

    def shares(self) -> list[Share]:
        return self._engine.read_shares(self._parts, self._count)

    def purge(self) -> None:
        for index in range(self._count):
            part = self._parts[index]
            if part.batch.count and not self._is_live(part):
                self.amount = (self.amount - part.batch.sum) & TOTAL_MASK
                self.frames -= part.batch.count
                self.reads -= 1
                self.tagged -= part.tag != 0
                part.batch.count = part.batch.sum = 0

    def live_frames(self) -> int:
        return int(self._engine.lib.turn_live(self._engine.engine, self._parts, self._count))

    def askers(self) -> list[int]:
        parts = [self._parts[index] for index in range(self._count)]
        return [part.fd for part in parts if part.batch.count and self._is_live(part)]

    def _is_live(self, part: Any) -> bool:
        return bool(self._engine.lib.turn_serial(self._engine.engine, part.fd) == part.serial)
