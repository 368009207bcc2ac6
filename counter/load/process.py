"""One process of the load generator: connections and their schedule. It fills a Result.

Every connection is served by a callback of gevent's loop, as in the server; greenlets connect.
Times are monotonic nanoseconds. A request is measured if it is due in the measured part: in a
closed loop when it is sent, in an open one when schedule.py says. Its latency runs from then to
when its reply is read.

What a connection always checks: each total is the one before plus at least its own amount. That
holds while all that is sent in the run sums below 2^63; beyond that a rise cannot be told from a
fall modulo 2^64, and nothing is claimed.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import random
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import gevent
from gevent.event import Event
from gevent.socket import socket as cooperative_socket
from gevent.socket import wait_read

from counter.load.schedule import Pace
from counter.options.client import ClientSettings
from counter.results.result import CHECKABLE_SUM, WRONG_KEPT, Result
from counter.results.timeline import Recorder
from counter.tls.contexts import client_context
from counter.tls.session import Session, TlsError
from protocol import REPLY_SIZE, TOTAL_MASK, Batch, UniformBatch, decode_totals, encode_frame

clock: Final = time.monotonic_ns

SWEEP_S: Final = 0.25  # how late an overdue reply is noticed at most
RECONNECT_S: Final = 0.1  # between attempts to open a lost connection again
SMALL_READ: Final = 64  # one reply, and room to see that there is more
LARGE_READ: Final = 65536
DEEP: Final = 96  # frames in flight from which on NumPy checks the replies faster
_READ, _WRITE = 1, 2  # libev's event masks

Burst = tuple[int, int, Batch]
"""Frames sent together: when they were due, when they were sent (both ns), and their amounts."""

SocketAddress = tuple[int, Any]
"""A family and an address of it, as socket.connect takes it."""


@dataclass(frozen=True)
class Share:
    """One process's part of a run."""

    settings: ClientSettings
    addresses: tuple[SocketAddress, ...]
    connections: int
    requests: int | None
    rate: float  # requests a second, 0 for a closed loop
    duration_s: float | None
    processes: int


class LoadConnection:
    """One connection of the run: keeps frames in flight, checks and times each reply."""

    __slots__ = (
        "in_flight",
        "last_total",
        "lone",
        "process",
        "reading",
        "rest",
        "session",
        "sock",
        "unsent",
        "writing",
    )

    def __init__(self, process: LoadProcess) -> None:
        self.process = process
        self.sock: _socket.socket | None = None
        self.session: Session | None = None  # under TLS
        self.reading: Any = None
        self.writing: Any = None
        self.rest = b""
        self.unsent = b""
        self.last_total: int | None = None
        self.in_flight: deque[Burst] = deque()
        self.lone = False  # one frame of the usual amount is in flight, and nothing else

    def open(self) -> None:
        """Connects; waits. OSError of the last address if none can be connected to."""
        self.sock, self.session = self.process.connect()
        loop = self.process.loop
        self.reading = loop.io(self.sock.fileno(), _READ)
        self.writing = loop.io(self.sock.fileno(), _WRITE)
        self.reading.start(self.on_readable)

    def send(self, batch: Batch, due_ns: int = 0) -> None:
        """Sends frames of these amounts, due at `due_ns` or now; keeps what the kernel refuses."""
        assert self.sock is not None
        process = self.process
        self.lone = batch is process.one and not self.in_flight
        frames = process.frames_of(batch)
        now = clock()
        self.in_flight.append((due_ns or now, now, batch))
        process.result.sent += len(batch)
        process.sent_sum += batch.sum()
        if self.session:
            frames = self.session.encrypt(frames)
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
        """Sends what the kernel did not take before."""
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
            data = self.sock.recv(SMALL_READ if self.lone else LARGE_READ)
        except BlockingIOError:
            return
        except OSError as error:
            self.lose(error)
            return
        now = clock()
        if self.session and data:
            try:
                data = self.session.receive(data)
            except TlsError as error:
                self.lose(OSError(errno.EPROTO, str(error)))
                return
            if not data and not self.session.ended:
                return
        is_lone = self.lone and self.in_flight and not self.rest
        if is_lone and len(data) == REPLY_SIZE and self.last_total is not None:
            # What take() does, written out for the reply of a lone frame: 1 us instead of 5.
            process = self.process
            total = int.from_bytes(data)
            if process.amount <= total - self.last_total < CHECKABLE_SUM:
                self.last_total = total
                due_ns, sent_ns, _ = self.in_flight.popleft()
                process.lone_answers += 1
                process.measure(due_ns, sent_ns, now, 1)
                process.ready.append(self)
                return
        if data:
            self.take(self.rest + data, now)
        else:
            self.lose(None)

    def take(self, data: bytes, now: int) -> None:
        """Checks and counts replies, and has as many frames sent again."""
        at, whole = 0, len(data) - len(data) % REPLY_SIZE
        self.rest = data[whole:]
        while at < whole:
            if not self.in_flight:
                self.process.wrong(f"{(whole - at) // REPLY_SIZE} replies that nothing asked for")
                self.lose(None)
                return
            due_ns, sent_ns, batch = self.in_flight.popleft()
            count = min(len(batch), (whole - at) // REPLY_SIZE)
            if count < len(batch):
                batch, later = split_batch(batch, count)
                self.in_flight.appendleft((due_ns, sent_ns, later))
            self.settle(due_ns, sent_ns, now, batch, data[at : at + count * REPLY_SIZE])
            at += count * REPLY_SIZE
        self.process.refill(self, whole // REPLY_SIZE)

    def settle(self, due_ns: int, sent_ns: int, now: int, batch: Batch, replies: bytes) -> None:
        """Checks and counts the replies to a batch, read at `now`."""
        self.check(replies, batch)
        self.process.count(due_ns, sent_ns, now, batch)

    def check(self, replies: bytes, batch: Batch) -> None:
        """Finds out whether each total is at least its amount above the one before.

        A server that took the batch as one has answered with what the batch itself says, which one
        comparison shows; otherwise each total is looked at.
        """
        last = self.last_total
        self.last_total = int.from_bytes(replies[-REPLY_SIZE:])
        if not self.process.rises_are_checkable():
            return
        before = (self.last_total - batch.sum()) & TOTAL_MASK
        has_risen = last is None or (before - last) & TOTAL_MASK < CHECKABLE_SUM
        if has_risen and batch.replies(before) == replies:
            return
        for total, amount in zip(decode_totals(replies)[0], batch.amounts, strict=True):
            if last is not None and not amount <= (total - last) & TOTAL_MASK < CHECKABLE_SUM:
                self.process.wrong(f"{total} after {last}, where {amount} was added")
            last = total

    def overdue(self, now: int, timeout_ns: int) -> bool:
        """Whether the oldest reply has been waited for longer than the timeout."""
        return bool(self.in_flight) and now - self.in_flight[0][1] > timeout_ns

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
        for _, _, batch in self.in_flight:
            self.process.result.unknown += len(batch)
            self.process.result.unknown_sum += batch.sum()
        self.in_flight.clear()
        self.lone = False
        self.rest = self.unsent = b""
        if self.sock is not None:
            self.reading.close()
            self.writing.close()
            self.sock.close()
            self.sock = None


class LoadProcess:
    """One process's connections, from the first connect to the last reply."""

    def __init__(
        self, share: Share, make: Callable[[LoadProcess], LoadConnection] = LoadConnection
    ) -> None:
        self.loop = gevent.get_hub().loop
        self.share = share
        self.result = Result(connections=share.connections)
        self.connections = [make(self) for _ in range(share.connections)]
        self.sending = False
        self.measure_from_ns = 0
        self.stopped_ns = 0
        self.timeout_s = share.settings.timeout_s
        self.last_reply_ns = 0
        self.requests_left = share.requests
        self.sent_sum = 0
        self.cpu_from_s = 0.0
        self.done = Event()
        self.cut = False  # replies in flight are not waited for
        amounts = share.settings.amount
        self.amount = amounts.low
        self.one: Batch = UniformBatch(amounts.low, 1)
        self._frame = encode_frame(amounts.low)
        self._uniform = deep_batch() if share.settings.pipeline >= DEEP else UniformBatch
        self._random = random.Random()
        self.lone_answers = 0
        self.ready: list[LoadConnection] = []
        self.tls = client_context(share.settings) if share.settings.wants_tls() else None
        self._before_waiting = self.loop.prepare()
        self._before_waiting.start(self.send_again)
        self._pace = Pace(self, share.rate) if share.rate else None

    def connect(self) -> tuple[_socket.socket, Session | None]:
        """A connected, non-blocking socket, and the TLS session on it if there is one; waits."""
        timeout_s = self.share.settings.timeout_s
        for last, (family, address) in enumerate(
            self.share.addresses, 1 - len(self.share.addresses)
        ):
            sock = cooperative_socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(timeout_s)
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                session = self._shake_hands(sock) if self.tls else None
                # A plain socket serves the callbacks: its recv and send never wait.
                plain = _socket.socket(family, socket.SOCK_STREAM, 0, sock.detach())
                plain.setblocking(False)
                return plain, session
            except OSError:
                if last == 0:
                    raise
            finally:
                sock.close()
        raise AssertionError("a host without addresses")

    def _shake_hands(self, sock: cooperative_socket) -> Session:
        """A TLS session on a connected socket; waits. OSError with its text if it is refused."""
        assert self.tls is not None
        session = Session(self.tls, self.share.settings.server_address.host)
        data = b""
        try:
            while True:
                session.receive(data)
                sock.sendall(session.outgoing())
                if session.handshaken:
                    return session
                data = sock.recv(LARGE_READ)
                if not data:
                    raise OSError(errno.EPROTO, "the server ended the TLS handshake")
        except TlsError as error:
            with contextlib.suppress(OSError):  # the reason is worth more
                sock.sendall(session.outgoing())
            raise OSError(errno.EPROTO, str(error)) from None

    def open_all(self) -> None:
        """Opens the connections; those that fail are tried again later."""

        def attempt(connection: LoadConnection) -> None:
            try:
                connection.open()
            except OSError as error:
                connection.lose(error)

        gevent.joinall([gevent.spawn(attempt, connection) for connection in self.connections])

    def read_total(self) -> int | None:
        """The server's total, read on a connection of its own; None if no answer comes in time.

        OSError if there is no connection, EOFError if it ends without a byte.
        """
        data = b""
        sock, session = self.connect()
        with contextlib.closing(sock), gevent.Timeout(self.timeout_s, False):  # type: ignore[arg-type]  # False: no exception
            frame = encode_frame(0)
            sock.send(session.encrypt(frame) if session else frame)
            self.result.sent += 1
            while len(data) < REPLY_SIZE:
                wait_read(sock.fileno())
                try:
                    more = sock.recv(LARGE_READ)
                except ConnectionResetError:
                    more = b""
                if not more and not data:
                    raise EOFError
                if not more:
                    return None
                try:
                    data += session.receive(more) if session else more
                except TlsError as error:
                    raise OSError(errno.EPROTO, str(error)) from None
        if len(data) < REPLY_SIZE:
            return None
        self.result.answered += 1
        return int.from_bytes(data)

    def run(self) -> None:
        """Sends until the run ends, then waits for what is outstanding."""
        settings = self.share.settings
        now = clock()
        self.measure_from_ns = now + int(settings.warmup_s * 1e9)
        self.last_reply_ns = self.measure_from_ns
        self.cpu_from_s = time.process_time()
        if self._pace:
            self._pace.start(now)
        self.sending = True
        sweeper = self.loop.timer(SWEEP_S, SWEEP_S)
        sweeper.start(self._sweep)
        recorder = Recorder(
            self.result.latencies.counts, self.measure_from_ns, self.share.duration_s
        )
        recording = self.loop.timer(settings.warmup_s + recorder.interval_s, recorder.interval_s)
        recording.start(lambda: recorder.tick(clock()))
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
        for timer in (sweeper, recording, measuring, ending):
            timer.close()
        self.result.timeline = recorder.finish(self.last_reply_ns)
        if self._pace:
            self.result.behind = self._pace.behind(self.stopped_ns)
            self._pace.close()
        elapsed_s = (self.last_reply_ns - self.measure_from_ns) / 1e9
        self.result.measured = len(self.result.latencies)
        self.result.elapsed_s = elapsed_s
        if elapsed_s > 0:
            self.result.cpu_share = (time.process_time() - self.cpu_from_s) / elapsed_s

    def so_far(self) -> Result:
        """What was done until now."""
        if self.measure_from_ns:
            self.result.elapsed_s = max(0, clock() - self.measure_from_ns) / 1e9
        return self.result

    def stop(self) -> None:
        """No further request is sent. A server that stalls until the end has its time counted."""
        self.sending = False
        self.stopped_ns = clock()
        self.last_reply_ns = max(self.last_reply_ns, self.stopped_ns)
        self.done.set()

    def close(self) -> None:
        """Closes every connection."""
        for connection in self.connections:
            connection.close()

    def refill(self, connection: LoadConnection, count: int) -> None:
        """Has `count` further requests sent: now, or, in an open loop, when they are due."""
        if not self.sending or connection.sock is None:
            return
        if self._pace:
            self._pace.offer(connection, count)
            return
        count = self.take_requests(count, clock())
        if count:
            connection.send(self.draw(count))

    def take_requests(self, count: int, due_ns: int) -> int:
        """How many of `count` requests may still be sent; the last of the run ends it."""
        if self.requests_left is not None and due_ns >= self.measure_from_ns:
            count = min(count, self.requests_left)
            self.requests_left -= count
            if not self.requests_left:
                self.stop()
        return count

    def draw(self, count: int) -> Batch:
        """The amounts of the next requests."""
        amounts = self.share.settings.amount
        if amounts.low == amounts.high:
            return self.one if count == 1 else self._uniform(self.amount, count)
        draw, low, high = self._random.randint, amounts.low, amounts.high
        return Batch([draw(low, high) for _ in range(count)])

    def frames_of(self, batch: Batch) -> bytes:
        """The frames that carry these amounts, joined."""
        if batch is self.one:
            return self._frame
        if isinstance(batch, UniformBatch):
            return encode_frame(batch.amount) * batch.count
        return b"".join(map(encode_frame, batch.amounts))

    def count(self, due_ns: int, sent_ns: int, now: int, batch: Batch) -> None:
        """Counts replies, and measures them if they were due in the measured part."""
        self.result.answered += len(batch)
        self.result.answered_sum += batch.sum()
        self.measure(due_ns, sent_ns, now, len(batch))

    def measure(self, due_ns: int, sent_ns: int, now: int, count: int) -> None:
        """Records the latency of `count` replies that were asked for together."""
        if due_ns >= self.measure_from_ns > 0:
            self.result.latencies.record(now - due_ns, count)
            if self._pace:
                self.result.raw_latencies.record(now - sent_ns, count)
            self.last_reply_ns = now

    def send_again(self) -> None:
        """Sends the next frame on each connection whose lone frame was answered in this turn.

        As the server, the client reads all that has arrived before it sends.
        """
        ready = self.ready
        if not ready:
            return
        self.ready = []
        self.fold()
        if not self.sending or self._pace or self.tls or self.requests_left is not None:
            for connection in ready:
                self.refill(connection, 1)
            return
        one, frame = self.one, self._frame
        sent = 0
        for connection in ready:
            sock = connection.sock
            if sock is None:
                continue
            now = clock()
            connection.in_flight.append((now, now, one))
            sent += 1
            try:
                sock.send(frame)
            except OSError as error:
                connection.lose(error)
        self.result.sent += sent
        self.sent_sum += sent * self.amount

    def fold(self) -> None:
        """Puts the answers of lone frames, which are counted apart, into the result."""
        self.result.answered += self.lone_answers
        self.result.answered_sum += self.lone_answers * self.amount
        self.lone_answers = 0

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
        """Waits for the replies in flight, until cut; the sweep ends those that do not come."""
        while not self.cut and any(connection.in_flight for connection in self.connections):
            gevent.sleep(0.002)


def split_batch(batch: Batch, count: int) -> tuple[Batch, Batch]:
    """The first `count` frames of a batch, and those behind them."""
    if isinstance(batch, UniformBatch):
        kind = type(batch)
        return kind(batch.amount, count), kind(batch.amount, batch.count - count)
    return Batch(batch.amounts[:count]), Batch(batch.amounts[count:])


def deep_batch() -> type[UniformBatch]:
    """The batch of many frames alike; imports NumPy, which small runs do not need."""
    from counter.turn.vector import VectorUniformBatch

    return VectorUniformBatch
