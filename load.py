"""One process of the load generator: connections and their schedule. It fills a Result.

Every connection is served by a callback of gevent's loop, as in the server; greenlets connect.
Times are monotonic nanoseconds. A request is measured if it is sent in the measured part, and its
latency runs from just before it is sent to when its reply is read.

What a connection always checks: each total is the one before plus at least its own amount. That
holds while all that is sent in the run sums below 2^63; beyond that a rise cannot be told from a
fall modulo 2^64, and nothing is claimed.
"""

from __future__ import annotations

import _socket
import random
import socket
import time
from collections import deque
from dataclasses import dataclass
from itertools import chain
from operator import ge, sub
from typing import Any, Final

import gevent
from gevent.event import Event
from gevent.socket import socket as cooperative_socket

from protocol import TOTAL_MASK, decode_totals, encode_frame
from result import CHECKABLE_SUM, WRONG_KEPT, Result
from settings import ClientSettings

clock: Final = time.monotonic_ns

SWEEP_S: Final = 0.25  # how late an overdue reply is noticed at most
RECONNECT_S: Final = 0.1  # between attempts to open a lost connection again
_RECEIVE: Final = 65536
_READ, _WRITE = 1, 2  # libev's event masks

SocketAddress = tuple[int, Any]
"""A family and an address of it, as socket.connect takes it."""


@dataclass(frozen=True)
class Share:
    """One process's part of a run."""

    settings: ClientSettings
    addresses: tuple[SocketAddress, ...]
    connections: int
    requests: int | None
    duration_s: float | None
    processes: int


class LoadConnection:
    """One connection of the run: keeps `pipeline` frames in flight, checks and times each reply."""

    def __init__(self, process: LoadProcess) -> None:
        self.process = process
        self.sock: _socket.socket | None = None
        self.reading: Any = None
        self.writing: Any = None
        self.rest = b""
        self.unsent = b""
        self.last_total: int | None = None
        self.in_flight: deque[tuple[int, list[int]]] = deque()  # sent at (ns), amounts

    def open(self) -> None:
        """Connects; waits. OSError of the last address if none can be connected to."""
        self.sock = self.process.connect()
        loop = self.process.loop
        self.reading = loop.io(self.sock.fileno(), _READ)
        self.writing = loop.io(self.sock.fileno(), _WRITE)
        self.reading.start(self.on_readable)

    def send(self, amounts: list[int]) -> None:
        """Sends frames of these amounts; what the kernel does not take now goes out later."""
        assert self.sock is not None
        frames = self.process.frames_of(amounts)
        self.in_flight.append((clock(), amounts))
        self.process.result.sent += len(amounts)
        if self.unsent:
            self.unsent += frames
            return
        try:
            sent = self.sock.send(frames)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.lose(error)
            return
        if sent < len(frames):
            self.unsent = frames[sent:]
            self.writing.start(self.on_writable)

    def on_writable(self) -> None:
        assert self.sock is not None
        try:
            self.unsent = self.unsent[self.sock.send(self.unsent) :]
        except BlockingIOError:
            return
        except OSError as error:
            self.lose(error)
            return
        if not self.unsent:
            self.writing.stop()

    def on_readable(self) -> None:
        """Takes the replies that have arrived and sends as many frames again."""
        assert self.sock is not None
        try:
            data = self.sock.recv(_RECEIVE)
        except BlockingIOError:
            return
        except OSError as error:
            self.lose(error)
            return
        if not data:
            self.lose(None)
            return
        now = clock()
        if self.rest:
            data = self.rest + data
        totals, self.rest = decode_totals(data)
        answered = 0
        while answered < len(totals):
            if not self.in_flight:
                self.process.wrong(f"{len(totals) - answered} replies that nothing asked for")
                self.lose(None)
                return
            sent_at, amounts = self.in_flight.popleft()
            count = min(len(amounts), len(totals) - answered)
            if count < len(amounts):
                self.in_flight.appendleft((sent_at, amounts[count:]))
                amounts = amounts[:count]
            self.check(totals[answered : answered + count], amounts)
            self.process.take(sent_at, now, amounts)
            answered += count
        self.process.refill(self, answered)

    def check(self, totals: tuple[int, ...], amounts: list[int]) -> None:
        """Finds out whether each total is at least its amount above the one before."""
        last, self.last_total = self.last_total, totals[-1]
        if not self.process.rises_are_checkable():
            return
        if last is None:
            last = (totals[0] - amounts[0]) & TOTAL_MASK
        rising = all(map(ge, map(sub, totals, chain((last,), totals)), amounts))
        if rising and totals[-1] - last < CHECKABLE_SUM:
            return
        for total, amount in zip(totals, amounts, strict=True):
            if not amount <= (total - last) & TOTAL_MASK < CHECKABLE_SUM:
                self.process.wrong(f"{total} after {last}, where {amount} was added")
            last = total

    def overdue(self, now: int, timeout_ns: int) -> bool:
        """Whether the oldest reply has been waited for longer than the timeout."""
        return bool(self.in_flight) and now - self.in_flight[0][0] > timeout_ns

    def lose(self, error: OSError | None) -> None:
        """Counts a lost connection, and what is unknown with it; it is opened again."""
        if isinstance(error, TimeoutError):
            kind = "timeout"
        else:
            kind = "connection closed" if error is None else (error.strerror or "error").lower()
        self.process.result.count_error(kind)
        self.close()
        self.process.reopen(self)

    def close(self) -> None:
        """Closes the socket; what is in flight becomes unknown."""
        for _, amounts in self.in_flight:
            self.process.result.unknown += len(amounts)
            self.process.result.unknown_sum += sum(amounts)
        self.in_flight.clear()
        self.rest = self.unsent = b""
        if self.sock is not None:
            self.reading.close()
            self.writing.close()
            self.sock.close()
            self.sock = None


class LoadProcess:
    """One process's connections, from the first connect to the last reply."""

    def __init__(self, share: Share) -> None:
        self.loop = gevent.get_hub().loop
        self.share = share
        self.result = Result(connections=share.connections)
        self.connections = [LoadConnection(self) for _ in range(share.connections)]
        self.sending = False
        self.measure_from_ns = 0
        self.stop_at_ns: int | None = None
        self.last_reply_ns = 0
        self.requests_left = share.requests
        self.sent_sum = 0
        self.cpu_from_s = 0.0
        self.done = Event()
        amount = share.settings.amount
        self._constant = amount.low if amount.low == amount.high else None
        self._frame = encode_frame(amount.low)
        self._random = random.Random()

    def connect(self) -> _socket.socket:
        """A connected, non-blocking socket; waits."""
        timeout_s = self.share.settings.timeout_s
        for last, (family, address) in enumerate(
            self.share.addresses, 1 - len(self.share.addresses)
        ):
            sock = cooperative_socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(timeout_s)
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # A plain socket serves the callbacks: its recv and send never wait.
                plain = _socket.socket(family, socket.SOCK_STREAM, 0, sock.detach())
                plain.setblocking(False)
                return plain
            except OSError:
                if last == 0:
                    raise
            finally:
                sock.close()
        raise AssertionError("a host without addresses")

    def open_all(self, first: int) -> None:
        """Opens the connections from number `first` on; those that fail are tried again later."""

        def attempt(connection: LoadConnection) -> None:
            try:
                connection.open()
            except OSError as error:
                connection.lose(error)

        gevent.joinall([gevent.spawn(attempt, c) for c in self.connections[first:]])

    def read_total(self) -> int | None:
        """The server's total, read on the first connection that can; None if none can."""
        for connection in self.connections:
            answered = self.result.answered
            try:
                if connection.sock is None:
                    connection.open()
                connection.send([0])
            except OSError:
                continue
            deadline_ns = clock() + int(self.share.settings.timeout_s * 1e9)
            while connection.in_flight and clock() < deadline_ns:
                gevent.sleep(0.001)
            if self.result.answered > answered and not connection.in_flight:
                return connection.last_total
            connection.close()
        return None

    def run(self) -> None:
        """Sends until the run ends, then waits for what is outstanding."""
        settings = self.share.settings
        now = clock()
        self.measure_from_ns = now + int(settings.warmup_s * 1e9)
        self.last_reply_ns = self.measure_from_ns
        if self.share.duration_s is not None:
            self.stop_at_ns = self.measure_from_ns + int(self.share.duration_s * 1e9)
        self.cpu_from_s = time.process_time()
        self.sending = True
        sweeper = self.loop.timer(SWEEP_S, SWEEP_S)
        sweeper.start(self._sweep)
        measuring = self.loop.timer(settings.warmup_s)
        measuring.start(self._note_cpu)
        ending = self.loop.timer(settings.warmup_s + (self.share.duration_s or 0))
        if self.share.duration_s is not None:
            ending.start(self.stop)
        for connection in self.connections:
            if connection.sock is not None:
                self.refill(connection, settings.pipeline)
        self.done.wait()
        gevent.spawn(self._join_outstanding).join()
        for timer in (sweeper, measuring, ending):
            timer.close()
        elapsed_s = (self.last_reply_ns - self.measure_from_ns) / 1e9
        self.result.measured = len(self.result.latencies)
        self.result.elapsed_s = elapsed_s
        if elapsed_s > 0:
            self.result.cpu_share = (time.process_time() - self.cpu_from_s) / elapsed_s

    def stop(self) -> None:
        """No further request is sent."""
        self.sending = False
        self.done.set()

    def close(self) -> None:
        """Closes every connection."""
        for connection in self.connections:
            connection.close()

    def refill(self, connection: LoadConnection, count: int) -> None:
        """Sends `count` further requests, or fewer when the run is about to end."""
        if not self.sending or connection.sock is None:
            return
        if self.requests_left is not None and clock() >= self.measure_from_ns:
            count = min(count, self.requests_left)
            self.requests_left -= count
            if not self.requests_left:
                self.stop()
        if count:
            amounts = self.draw(count)
            self.sent_sum += sum(amounts)
            connection.send(amounts)

    def draw(self, count: int) -> list[int]:
        """The amounts of the next requests."""
        if self._constant is not None:
            return [self._constant] * count
        amount = self.share.settings.amount
        draw, low, high = self._random.randint, amount.low, amount.high
        return [draw(low, high) for _ in range(count)]

    def frames_of(self, amounts: list[int]) -> bytes:
        """The frames that carry these amounts, joined."""
        if self._constant is not None and amounts[0] == self._constant:
            return self._frame * len(amounts)
        return b"".join(map(encode_frame, amounts))

    def take(self, sent_at: int, now: int, amounts: list[int]) -> None:
        """Counts replies, and measures them if they were asked for in the measured part."""
        result = self.result
        result.answered += len(amounts)
        result.answered_sum += sum(amounts)
        if sent_at >= self.measure_from_ns > 0:
            result.latencies.record(now - sent_at, len(amounts))
            self.last_reply_ns = now

    def rises_are_checkable(self) -> bool:
        """Whether what all processes sent is sure to sum below 2^63."""
        checkable = self.sent_sum < CHECKABLE_SUM // self.share.processes
        self.result.rises_checked = self.result.rises_checked and checkable
        return checkable

    def wrong(self, what: str) -> None:
        """Counts a total that cannot be right."""
        self.result.wrong += 1
        if len(self.result.wrong_examples) < WRONG_KEPT:
            self.result.wrong_examples.append(what)

    def reopen(self, connection: LoadConnection) -> None:
        """Opens a lost connection again, for as long as the run sends."""

        def attempt() -> None:
            while not self.done.wait(RECONNECT_S):
                try:
                    connection.open()
                except OSError as error:
                    self.result.count_error(f"connect: {(error.strerror or str(error)).lower()}")
                    continue
                self.refill(connection, self.share.settings.pipeline)
                return

        gevent.spawn(attempt)

    def _note_cpu(self) -> None:
        self.cpu_from_s = time.process_time()

    def _sweep(self) -> None:
        now, timeout_ns = clock(), int(self.share.settings.timeout_s * 1e9)
        for connection in self.connections:
            if connection.overdue(now, timeout_ns):
                connection.lose(TimeoutError())

    def _join_outstanding(self) -> None:
        """Waits for the replies in flight; the sweep ends those that do not come."""
        while any(connection.in_flight for connection in self.connections):
            gevent.sleep(0.002)
