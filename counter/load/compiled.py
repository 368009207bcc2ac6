"""The engine in C: counter/turn/load.c behind the interface of engine.py.

A connection is lent to C while it waits for nothing but replies to frames of one amount; what it
has in flight, and its last total, are there then, and not with it. What C does not do itself it
tells, one event of a connection at most. The connection gets all back first and does what the other
engine would have it do. If it then waits for nothing but replies, it is lent again.

The law: nothing is decided here, and nothing done twice. What C has counted joins the process's
account before anything else happens, so that the account is right between turns of the loop.
"""

from __future__ import annotations

import os
from typing import Any, Final, Protocol

from counter.load.engine import Engine, Sender, Served
from counter.turn.library import Library
from protocol import encode_frame

# While something was ready the epoll is asked again, for so long at most: a turn of the loop costs
# as much as a request, and the loop's other work must not wait for longer than that.
LONGEST_NS: Final = 1_000_000

_FIRST_DESCRIPTORS: Final = 64


class Tapes(Protocol):
    """Where additions are recorded."""

    def append(self, bursts: Any, totals: Any) -> None:
        """Records what is in the form of its tapes already, as bytes."""


class CompiledEngine(Engine):
    """The engine whose turn is one call of C."""

    name = "compiled"

    def __init__(
        self, loop: Any, sender: Sender, library: Library, amount: int, tapes: Tapes | None
    ) -> None:
        """For additions of one amount, recorded on `tapes` if there are any."""
        super().__init__(loop, sender)
        self._ffi, self._lib = library.ffi, library.lib
        self._meter, self._tapes = sender.meter, tapes
        load = self._load = self._ffi.new("struct load *")
        load.epoll = self._epoll.fileno()
        load.amount = amount
        # Memory that C is told of lives as long as what is kept here.
        frames = encode_frame(amount) * self._lib.LOAD_FRAMES
        load.frames = self._frames = self._ffi.new("uint8_t[]", frames)
        load.counts = self._counts = self._ffi.from_buffer("uint64_t[]", sender.meter.buckets())
        if tapes is not None:
            replies = self._lib.LOAD_TAPE_REPLIES
            load.bursts = self._bursts = self._ffi.new("struct load_record[]", replies)
            load.totals = self._totals = self._ffi.new("uint64_t[]", replies)
        self._states = self._ffi.new("struct load_connection[]", 0)
        self._make_room(_FIRST_DESCRIPTORS)

    def _make_room(self, descriptors: int) -> None:
        """Has a place for each of so many descriptors."""
        states = self._ffi.new("struct load_connection[]", descriptors)
        self._ffi.memmove(states, self._states, self._ffi.sizeof(self._states))
        self._load.connections = self._states = states
        self._load.descriptors = descriptors

    def watch(self, fd: int, connection: Served) -> None:
        if fd >= self._load.descriptors:
            self._make_room(2 * fd)
        super().watch(fd, connection)

    def turn(self) -> None:
        load = self._load
        load.left = self._sender.allowance()
        events = self._lib.load_exchange(load, LONGEST_NS)
        if load.exchanged:
            self._count()
        if events:
            self._decide([(told.kind, told.fd, told.value) for told in load.event[0:events]])

    def _count(self) -> None:
        """Takes what C has done into the account."""
        load = self._load
        self._meter.exchanged(load.exchanged, load.exchanged)
        if load.measured_at_ns:
            self._meter.measured(load.latency_sum_ns, load.latency_max_ns, load.measured_at_ns)
        self._sender.spend(load.spent)
        if self._tapes is not None:
            bursts = self._ffi.buffer(self._bursts, load.records * 32)
            self._tapes.append(bursts, self._ffi.buffer(self._totals, load.exchanged * 8))

    def _decide(self, events: list[tuple[int, int, int]]) -> None:
        """Has connections do what C does not, and lends them again."""
        for kind, fd, value in events:
            self._take_back(fd)
            self._obey(kind, fd, value)
        self._sender.end_turn()
        if self._sender.sending and self._sender.allowance() > 0:
            self._load.measure_from_ns = self._meter.measure_from_ns
            for _, fd, _ in events:
                if fd in self._connections:
                    self._lend(fd)

    def _obey(self, kind: int, fd: int, value: int) -> None:
        """Has a connection do what an event asks for."""
        lib, connection = self._lib, self._connections[fd]
        if kind == lib.LOAD_POLLED:
            self.serve(fd, value)
        elif kind == lib.LOAD_RECEIVED:
            data = self._ffi.buffer(self._load.received, value)[:]
            connection.received(data, self._load.now_ns)
        elif kind == lib.LOAD_UNSENT:
            connection.left_unsent(value)
        else:
            connection.lose(OSError(value, os.strerror(value)))

    def _lend(self, fd: int) -> None:
        """Lends a connection, unless it waits for anything but replies."""
        connection = self._connections[fd]
        account = connection.hand_over(self._lib.LOAD_BURSTS)
        if account is None:
            return
        state = self._states[fd]
        state.last_total, bursts = account
        state.number = connection.number
        state.in_flight = sum(count for _, count in bursts)
        state.burst[0 : len(bursts)] = bursts
        state.bursts = len(bursts)

    def _take_back(self, fd: int) -> None:
        """Gives a connection back what is in flight, if it was lent."""
        state = self._states[fd]
        if state.bursts:
            bursts = [(burst.sent_ns, burst.count) for burst in state.burst[0 : state.bursts]]
            state.bursts = 0
            self._connections[fd].take_back((state.last_total, bursts))

    def recall(self, sent_before_ns: int) -> None:
        fd = -1
        while (fd := self._lib.load_sent_before(self._load, fd + 1, sent_before_ns)) >= 0:
            self._take_back(fd)
