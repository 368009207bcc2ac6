"""One connection of the load: keeps frames in flight, checks and times each reply.

It is served by turns of its engine, as in the server; only open() waits. It asks of its process
what Generator declares, and counts into the process's Meter. While it waits for nothing but replies
the engine may have what is in flight: hand_over() gives it away, take_back() has it again.

What it always checks: each total is the one before plus at least its own amount. That holds while
all that is sent in the run sums below 2^63; beyond that a rise cannot be told from a fall modulo
2^64, and nothing is claimed.
"""

from __future__ import annotations

import _socket
import errno
from collections import deque
from time import monotonic_ns as clock
from typing import Final, Protocol

from counter.load.dial import LARGE_READ, Dialler
from counter.load.draw import Draw, split_batch
from counter.load.engine import Account, Engine
from counter.load.meter import Meter
from counter.load.patience import is_ready
from counter.results.result import CHECKABLE_SUM
from counter.system.libev import READ
from counter.system.sockets import close_with_reset
from counter.tls.session import Session, TlsError
from protocol import REPLY_SIZE, REQUEST_SIZE, TOTAL_MASK, Batch, decode_totals

SMALL_READ: Final = 64  # one reply, and room to see that there is more

# Before a connection is given up so many reads take what it holds. The replies to 65,536 frames,
# the most that are in flight, are eight.
MOST_READS: Final = 64

decode_total: Final = int.from_bytes
"""The total of one reply; looked up in int for each, it costs 70 ns more."""

Burst = tuple[int, int, Batch]
"""Frames sent together: when they were due, when they were sent (both ns), and their amounts."""


class Generator(Protocol):
    """What a connection may ask of the process that it is part of."""

    engine: Engine
    dialler: Dialler
    draw: Draw
    meter: Meter
    ready: list[LoadConnection]  # whose lone frame was answered in this turn; they say so

    def refill(self, connection: LoadConnection, count: int) -> None:
        """Has `count` further requests sent, now or when they are due."""

    def reopen(self, connection: LoadConnection) -> None:
        """Has a lost connection opened again."""


class LoadConnection:
    """One connection of the run; see above.

    `epoch` changes whenever what was agreed with this connection is void, because it was lost.
    """

    __slots__ = (
        "_amount",
        "_answered_lone",
        "_draw",
        "_engine",
        "_generator",
        "_in_flight",
        "_is_lone",
        "_last_total",
        "_lone",
        "_lone_frame",
        "_meter",
        "_ready",
        "_rest",
        "_session",
        "_sock",
        "_unsent",
        "epoch",
        "number",
    )

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._meter = generator.meter
        self._draw = generator.draw
        # What every lone frame needs, at hand. The first is called for its reply, with when it was
        # due, sent and read, and how many; a subclass has itself called: a method costs 45 ns more.
        self._answered_lone = generator.meter.measure
        self._ready = generator.ready
        self._amount = generator.draw.amount
        self._lone, self._lone_frame = generator.draw.lone, generator.draw.lone_frame
        self._sock: _socket.socket | None = None
        self._session: Session | None = None  # under TLS
        self._engine = generator.engine
        self._rest = b""
        self._unsent = b""
        self._last_total = -1  # none yet
        self._in_flight: deque[Burst] = deque()
        # One frame of the usual amount is in flight and nothing else, and there is a total that
        # its reply can be held against.
        self._is_lone = False
        self.epoch = 0
        self.number = 0  # in the recording

    @property
    def is_open(self) -> bool:
        """Whether it can send."""
        return self._sock is not None

    @property
    def is_waiting(self) -> bool:
        """Whether a reply is due."""
        return bool(self._in_flight)

    def is_overdue(self, late_before: int) -> bool:
        """Whether the oldest reply that is due is to a request that was sent before then."""
        return bool(self._in_flight) and self._in_flight[0][1] < late_before

    def judge(self, late_before: int) -> None:
        """Loses a connection whose reply is overdue, unless the reply, or the end, has come."""
        reads = MOST_READS
        while self.is_overdue(late_before):
            assert self._sock is not None
            if not reads or not is_ready(self._sock.fileno(), READ):
                self.lose(TimeoutError())
                return
            reads -= 1
            self.on_readable()

    def open(self) -> None:
        """Connects; waits. OSError of the last address if none can be connected to."""
        sock, session = self._generator.dialler.connect()
        try:
            self._engine.watch(sock.fileno(), self)
        except OSError:
            sock.close()
            raise
        self._sock, self._session = sock, session

    def send(self, batch: Batch, due_ns: int = 0) -> None:
        """Sends frames of these amounts, due at `due_ns` or now; keeps what the kernel refuses."""
        alone = batch is self._lone and not self._in_flight
        self._is_lone = alone and self._last_total >= 0
        frames = self._draw.frames(batch)
        now = clock()
        self._in_flight.append((due_ns or now, now, batch))
        self._meter.sent(batch)
        if self._session:
            frames = self._session.encrypt(frames)
        assert self._sock is not None
        try:
            sent = 0 if self._unsent else self._sock.send(frames)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.lose(error)
            return
        if sent != len(frames):
            self._keep(frames[sent:])

    def send_lone(self) -> bool:
        """Sends the usual frame where a lone one was answered; not under TLS. Whoever calls it
        counts it as sent; false if the connection is closed.

        What send() does, written out for one frame: of the 8 us that a request costs a client
        send() takes 0.37, this 0.18. In the loop that calls it, instead of a method, it would be
        0.13: half a percent for this text twice. The kernel may refuse these 16 bytes as it may any
        others: a server that answers before it reads has its client fill the socket.
        """
        sock = self._sock
        if sock is None:
            return False
        now = clock()
        self._in_flight.append((now, now, self._lone))
        frame = self._lone_frame
        try:
            sent = 0 if self._unsent else sock.send(frame)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.lose(error)
            return True
        if sent != REQUEST_SIZE:
            self._keep(frame[sent:])
        return True

    def left_unsent(self, size: int) -> None:
        """Has the last `size` bytes of what is in flight, frames of the usual amount, sent as soon
        as the kernel takes them."""
        self._keep((self._lone_frame * (size // REQUEST_SIZE + 1))[-size:])

    def hand_over(self, most: int) -> Account | None:
        """Gives away what is in flight, in so many bursts at most; None where it is more, or where
        anything but its replies is waited for, or no total is there to hold them against."""
        bursts = [(sent_ns, len(batch)) for _, sent_ns, batch in self._in_flight]
        is_steady = self._last_total >= 0 and not self._rest and not self._unsent
        if not is_steady or not 0 < len(bursts) <= most:
            return None
        self._in_flight.clear()
        self._is_lone = False
        return self._last_total, bursts

    def take_back(self, account: Account) -> None:
        """Has this in flight again, frames of the usual amount."""
        self._last_total, bursts = account
        for sent_ns, count in bursts:
            self._in_flight.append((sent_ns, sent_ns, self._draw.batch(count)))

    def _keep(self, frames: bytes) -> None:
        """Has these sent as soon as the kernel takes more."""
        if not self._unsent:
            assert self._sock is not None
            self._engine.watch_room(self._sock.fileno(), True)
        self._unsent += frames

    def on_writable(self) -> None:
        """Sends what the kernel did not take before."""
        assert self._sock is not None
        try:
            self._unsent = self._unsent[self._sock.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError as error:
            self.lose(error)
            return
        if not self._unsent:
            self._engine.watch_room(self._sock.fileno(), False)

    def on_readable(self) -> None:
        """Takes the replies that have arrived and has as many frames sent again."""
        sock = self._sock
        assert sock is not None
        try:
            data = sock.recv(SMALL_READ if self._is_lone else LARGE_READ)
        except BlockingIOError:
            return
        except OSError as error:
            self.lose(error)
            return
        now = clock()
        if self._session and data:
            try:
                data = self._session.receive(data)
            except TlsError as error:
                self.lose(OSError(errno.EPROTO, str(error)))
                return
            if not data and not self._session.ended:
                return
        if self._is_lone and len(data) == REPLY_SIZE and self._in_flight and not self._rest:
            # The reply of a lone frame: what take() and settle() do in 5 us takes 1 here. The
            # process counts it, and has the next frame sent, when this turn has read all that came.
            total = decode_total(data)
            if self._amount <= total - self._last_total < CHECKABLE_SUM:
                self._last_total = total
                due_ns, sent_ns, _ = self._in_flight.popleft()
                self._answered_lone(due_ns, sent_ns, now, 1)
                self._ready.append(self)
                return
        self.received(data, now)

    def received(self, data: bytes, now: int) -> None:
        """Takes what was read at `now`; nothing: the end."""
        if data:
            self.take(self._rest + data, now)
        else:
            self.lose(None)

    def take(self, data: bytes, now: int) -> None:
        """Checks and counts replies, and has as many frames sent again."""
        at, whole = 0, len(data) - len(data) % REPLY_SIZE
        self._rest = data[whole:]
        while at < whole:
            if not self._in_flight:
                self._meter.wrong(f"{(whole - at) // REPLY_SIZE} replies that nothing asked for")
                self.lose(None)
                return
            due_ns, sent_ns, batch = self._in_flight.popleft()
            count = min(len(batch), (whole - at) // REPLY_SIZE)
            if count < len(batch):
                batch, later = split_batch(batch, count)
                self._in_flight.appendleft((due_ns, sent_ns, later))
            self.settle(due_ns, sent_ns, now, batch, data[at : at + count * REPLY_SIZE])
            at += count * REPLY_SIZE
        self._generator.refill(self, whole // REPLY_SIZE)

    def settle(self, due_ns: int, sent_ns: int, now: int, batch: Batch, replies: bytes) -> None:
        """Checks and counts the replies to a batch, read at `now`."""
        self._check(replies, batch)
        self._meter.answered(due_ns, sent_ns, now, batch)

    def _check(self, replies: bytes, batch: Batch) -> None:
        """Finds out whether each total is at least its amount above the one before.

        A server that took the batch as one has answered with what the batch itself says, which one
        comparison shows; otherwise each total is looked at.
        """
        last = None if self._last_total < 0 else self._last_total
        self._last_total = decode_total(replies[-REPLY_SIZE:])
        if not self._meter.rises_are_checkable():
            return
        before = (self._last_total - batch.sum()) & TOTAL_MASK
        has_risen = last is None or (before - last) & TOTAL_MASK < CHECKABLE_SUM
        if has_risen and batch.replies(before) == replies:
            return
        for total, amount in zip(decode_totals(replies)[0], batch.amounts, strict=True):
            if last is not None and not amount <= (total - last) & TOTAL_MASK < CHECKABLE_SUM:
                self._meter.wrong(f"{total} after {last}, where {amount} was added")
            last = total

    def lose(self, error: OSError | None) -> None:
        """Counts a lost connection, and what is unknown with it; it is opened again."""
        # The kernel's own, of a peer that vanished, has a number.
        if isinstance(error, TimeoutError) and error.errno is None:
            kind = "timeout"
        else:
            kind = "connection closed" if error is None else (error.strerror or "error").lower()
        self._meter.error(kind)
        self.close()
        self._generator.reopen(self)

    def close(self) -> None:
        """Closes the socket; what is in flight becomes unknown, and a server is told by RST that
        nobody waits for it: what it has not read is not counted then."""
        gives_up = bool(self._in_flight)
        for _, _, batch in self._in_flight:
            self._meter.unknown(batch)
        self._in_flight.clear()
        self._is_lone = False
        self._rest = self._unsent = b""
        if self._sock is not None:
            self.epoch += 1
            self._engine.forget(self._sock.fileno())
            if gives_up:
                close_with_reset(self._sock)
            else:
                self._sock.close()
            self._sock = None
