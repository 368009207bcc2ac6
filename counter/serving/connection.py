"""One connection, from its first byte to its last: the hot path, what waits, and the end.

The life of a connection:
  1. accepted, it takes a worker: a Connection is a greenlet in the server's Pool, not yet started;
  2. frames that arrive are verified by a callback of the loop, on_readable, and join the Turn: what
     all connections ask for in one turn of the loop is added once and then answered. Nothing in it
     waits, and no greenlet is switched for it;
  3. the greenlet is started, or woken, for what must wait (replies that the kernel does not take)
     and for the end;
  4. at the end the worker is free. A peer that may still be sending gets FIN, and its socket
     lingers outside the Pool until the peer is quiet, because closing it with unread bytes would
     send RST and could destroy replies that were already sent.

The invariant: a frame is added and answered once, in the order of its connection, or it is not
added at all. Deadlines are kept by the server's one coarse sweep, so a frame costs no timer.
"""

from __future__ import annotations

import _socket
import socket
import time
from collections.abc import MutableSequence
from typing import TYPE_CHECKING, Final

import gevent
from gevent.greenlet import Greenlet
from gevent.timeout import Timeout

from counter.processes.slots import READS, REQUESTS
from counter.system.sockets import silent_for_s, unread_bytes
from counter.totals.counter import Counter
from protocol import TOTAL_MASK, BadFrame, Batch, encode_total, format_address

if TYPE_CHECKING:
    from counter.serving.server import CounterServer

# A buffer of less than 480 bytes comes from Python's own allocator, 0.2 us sooner than one from the
# heap. A read that fills it is followed by large ones for as long as there is much to read; their
# 4,096 frames bound what is pending per connection.
SMALL_READ: Final = 464
LARGE_READ: Final = 65536

# So many connections at most are read before they are answered: with thousands, the first would
# have left the processor's cache by then.
TURN_LENGTH: Final = 64

# How long, and for how many bytes, a peer may go on sending after it was told that it will not be
# answered and still see FIN rather than RST.
LINGER_S: Final = 1.0
LINGER_BYTES: Final = 1 << 20

GONE: Final = "gone"  # how a connection ends whose peer has closed or reset it

READ, WRITE = 1, 2  # libev's event masks


class Turn:
    """What connections ask for in one turn of the loop: added once, then answered in order.

    An addition to the total and to the slot is paid once for all connections that were readable
    together, and reading them all before answering any keeps the processor in one piece of code:
    with 40 connections a request costs a sixth less than if each is added and answered by itself.
    """

    __slots__ = ("_add", "_asked", "_slot")

    def __init__(self, counter: Counter, slot: MutableSequence[int]) -> None:
        self._add = counter.add
        self._slot = slot
        # Of each connection: the sum of its frames, and their batch unless it is a single frame.
        self._asked: list[tuple[Connection, int, Batch | None]] = []

    def ask(self, connection: Connection, amount: int, batch: Batch | None) -> None:
        """Joins the turn; a long one is committed at once, while its sockets are in the cache."""
        asked = self._asked
        asked.append((connection, amount, batch))
        if len(asked) == TURN_LENGTH:
            self.commit()

    def sweep(self, now: float) -> None:
        """Nothing waits from one turn to the next."""

    def close(self) -> None:
        """Nothing is held."""

    def commit(self) -> None:
        """Adds the sum of all that was asked, then replies to each.

        Called by the loop before it waits, and by whoever acts on a connection in between.
        """
        asked = self._asked
        if not asked:
            return
        self._asked = []
        try:
            before = self._add(sum([amount for _, amount, _ in asked]))
            count = sum([1 if batch is None else len(batch) for _, _, batch in asked])
            self._slot[REQUESTS] += count
            self._slot[READS] += len(asked)
        except Exception:
            for connection, _, _ in asked:
                connection.fail()
            return
        for connection, amount, batch in asked:
            after = (before + amount) & TOTAL_MASK
            # An error that left a connection open would leave it one reply behind for ever.
            try:
                connection.send(encode_total(after) if batch is None else batch.replies(before))
            except Exception:
                connection.fail()
            before = after


class Connection(Greenlet):  # type: ignore[type-arg]  # generic in the stubs alone
    """One peer. The callback serves it; the greenlet waits for it and ends it.

    Serving: the watcher is active, the greenlet not started or parked. Awake: the watcher is
    stopped, the greenlet runs. `ending` is empty until the connection has to end, then the reason.
    """

    # A slot is read in 3 ns; an attribute in the dictionary that Greenlet has takes 30.
    __slots__ = (
        "drain_bytes",
        "ending",
        "lingers",
        "owed",
        "parked",
        "read_size",
        "rest",
        "server",
        "sock",
        "unsent",
        "waits_for_answers",
        "watcher",
    )

    def __init__(self, server: CounterServer, sock: _socket.socket) -> None:
        Greenlet.__init__(self)
        self.server = server
        self.sock = sock
        self.rest = b""  # the bytes of an incomplete frame
        self.unsent = b""  # replies that the kernel did not take; nothing is read while there are
        self.owed = 0  # frames that wait for a store
        self.ending = ""
        self.lingers = False
        self.read_size = SMALL_READ
        self.drain_bytes = 0  # what is still to be read and answered before the end
        self.parked = False
        self.waits_for_answers = False
        server.count_connections(+1)
        self.watcher = server.loop.io(sock.fileno(), READ)
        self.watcher.start(self.on_readable)

    def on_readable(self) -> None:
        """Takes what has arrived; runs in the loop and never waits.

        A peer that waits for each reply sends one whole frame at a time. That case is written out:
        1 us beside its two system calls, where the general way takes 4.
        """
        try:
            data = self.sock.recv(self.read_size)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        # gevent stops a watcher whose callback raises: the connection would hang for ever.
        try:
            amount = None if self.rest else self.server.table.get(data)
            if amount is None:
                self.take(data)
            else:
                self.server.ask(self, amount, None)
        except Exception:
            self.fail()

    def take(self, data: bytes) -> None:
        """Takes frames that were read, or notes that the peer has ended."""
        if data:
            self.read_size = LARGE_READ if len(data) >= SMALL_READ else SMALL_READ
            self.decode(data)
        else:
            self.end(GONE)

    def decode(self, data: bytes) -> None:
        """Verifies all whole frames, which then join the turn, and keeps the rest."""
        started = bool(self.rest)
        if started:
            data = self.rest + data
        try:
            batch, self.rest = self.server.decode(data)
        except BadFrame as bad:
            batch, self.rest = bad.batch, b""
            self.server.refused(bad.reason, f"{self.peer()}: {bad}")
            self.end(bad.reason, lingers=True)
        if batch:
            self.server.ask(self, batch.sum(), batch)
        if self.rest:
            if batch or not started:
                self.server.incomplete[self] = time.monotonic()
        elif started:
            del self.server.incomplete[self]

    def transmit(self, data: bytes) -> None:
        """Hands bytes to the kernel; what it does not take is left in `unsent`."""
        if self.unsent:
            self.unsent += data
            return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.end(GONE)
            return
        if sent < len(data):
            self.unsent = data[sent:]
            self.wake()

    # Replies are sent as they are; under TLS something stands between.
    send = transmit

    def overdue(self) -> str:
        """What the frame deadline has ended, for the log."""
        return f"a frame stopped after {len(self.rest)} bytes"

    def answered(self, frames: int) -> None:
        """Notes that so many frames that waited for a store have their replies."""
        self.owed -= frames
        if not self.owed and self.waits_for_answers:
            self.waits_for_answers = False
            self.server.loop.run_callback(self.switch)

    def withdraw(self, reason: str) -> None:
        """Ends the connection without an answer to what waits for a store."""
        self.answered(self.owed)
        self.end(reason, lingers=True)

    def end(self, reason: str, lingers: bool = False) -> None:
        """Has the greenlet end the connection; `lingers` if its peer may still be sending.

        The last word counts: a peer that is gone while it drains does not linger.
        """
        self.ending = reason
        self.lingers = lingers
        self.wake()

    def peer(self) -> str:
        """The peer's address, for the log."""
        try:
            host, port = self.sock.getpeername()[:2]
        except OSError:
            return "a peer that is gone"
        return format_address(host, port)

    def fail(self) -> None:
        """Ends the connection for an error of the server's own, unanswered rather than wrongly."""
        self.server.failed()
        self.answered(self.owed)
        self.end("failed")

    def wake(self) -> None:
        """Stops reading and lets the greenlet do what waits; without effect if it is awake.

        A peer that is gone and is owed nothing needs no greenlet: a third of what a connection
        costs that sends one frame and closes.
        """
        if self.watcher.active:
            self.watcher.stop()
            if self.parked:
                self.server.loop.run_callback(self.switch)
            elif self.ending == GONE and not self.unsent and not self.owed:
                self.release()
                self.server.pool.discard(self)
            else:
                self.start()

    def idle_for_s(self) -> float | None:
        """Seconds since the peer's last byte; None while anything is under way."""
        if not self.watcher.active or self.owed or unread_bytes(self.sock):
            return None
        return silent_for_s(self.sock)

    def release(self) -> None:
        """Lets go of the socket, which may linger, and of everything else."""
        self.owed = 0
        self.watcher.close()
        self.server.count_connections(-1)
        self.server.incomplete.pop(self, None)
        if self.lingers:
            Linger(self.server, self.sock)
        else:
            self.sock.close()

    def drain(self) -> None:
        """Ends the connection after what its socket holds now is counted and answered."""
        if not self.ending:
            self.drain_bytes = unread_bytes(self.sock)
            self.end("drain", lingers=True)

    def _run(self) -> None:
        try:
            self.flush()
            while not self.ending:
                self.park()
                self.flush()
            self.answer_rest()
        except gevent.GreenletExit:
            self.lingers = False
        finally:
            self.release()

    def answer_rest(self) -> None:
        """Counts and answers what the socket held when the drain began."""
        while self.drain_bytes and self.ending == "drain":
            try:
                data = self.sock.recv(min(self.drain_bytes, LARGE_READ))
            except OSError:
                data = b""
            self.drain_bytes -= len(data)
            self.take(data)
            self.flush()

    def park(self) -> None:
        """Gives the connection back to the callback until wake() is called."""
        self.watcher.start(self.on_readable)
        self.parked = True
        self.server.hub.switch()
        self.parked = False

    def flush(self) -> None:
        """Waits until everything is answered and the kernel has taken every reply.

        The deadline of an incomplete frame stands still meanwhile, since nothing is read.
        """
        self.server.turn.commit()
        if not self.unsent and not self.owed:
            return
        frame_started_at = self.server.incomplete.pop(self, None)
        blocked_at = time.monotonic()
        while self.unsent or self.owed:
            if self.unsent:
                self.write()
            else:
                self.waits_for_answers = True
                self.server.hub.switch()
        if frame_started_at is not None:
            self.server.incomplete[self] = frame_started_at + time.monotonic() - blocked_at

    def write(self) -> None:
        """Waits until the kernel has taken every reply; a peer that does not read is dropped."""
        writable = self.server.loop.io(self.sock.fileno(), WRITE)
        timeout = Timeout.start_new(self.server.write_timeout_s)
        try:
            while self.unsent:
                self.server.hub.wait(writable)
                data, self.unsent = self.unsent, b""
                self.transmit(data)
        except Timeout as expired:
            if expired is not timeout:
                raise
            self.unsent = b""
            self.owed = 0
            self.server.refused("not-reading", f"{self.peer()} does not read its replies")
            self.end("not-reading")
        finally:
            timeout.close()
            writable.close()


class Linger:
    """A socket after its FIN: what the peer still sends is thrown away until it is quiet.

    It holds no worker. It ends at the peer's EOF, after LINGER_S, or after LINGER_BYTES.
    """

    __slots__ = ("bytes_left", "server", "sock", "until", "watcher")

    def __init__(self, server: CounterServer, sock: _socket.socket) -> None:
        self.server = server
        self.sock = sock
        self.until = time.monotonic() + LINGER_S
        self.bytes_left = LINGER_BYTES
        self.watcher = server.loop.io(sock.fileno(), READ)
        server.lingering.add(self)
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
        else:
            self.watcher.start(self.on_readable)

    def on_readable(self) -> None:
        try:
            size = len(self.sock.recv(LARGE_READ))
        except BlockingIOError:
            return
        except OSError:
            size = 0
        self.bytes_left -= size
        if not size or self.bytes_left <= 0:
            self.close()

    def close(self) -> None:
        self.watcher.close()
        self.sock.close()
        self.server.lingering.discard(self)
        self.server.check_quiet()
