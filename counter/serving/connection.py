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
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import gevent
from gevent.greenlet import Greenlet
from gevent.timeout import Timeout

from counter.serving.additions import Asker
from counter.serving.deadlines import FrameDeadlines
from counter.serving.ending import Ending
from counter.system.libev import READ, WRITE
from counter.system.sockets import silent_for_s, unread_bytes
from protocol import MAX_UNREAD_FRAMES, BadFrame, Batch, format_address

# A buffer of less than 480 bytes comes from Python's own allocator, 0.2 us sooner than one from the
# heap. A read that fills it is followed by large ones for as long as there is much to read; their
# 4,096 frames bound what is pending per connection.
SMALL_READ: Final = 464
LARGE_READ: Final = 65536


class Host(Protocol):
    """What a Connection may ask of the server that holds it.

    What is called for each request is an attribute that holds the function itself, not a method
    that passes the call on.
    """

    hub: Any
    loop: Any
    table: dict[bytes, int]  # the amount of each frame that needs no decoding
    decode: Callable[[bytes], tuple[Batch, bytes]]  # all whole frames, and the rest; BadFrame
    ask: Callable[[Asker, int, Batch | None], None]
    commit: Callable[[], None]  # has what was asked for so far added
    deadlines: FrameDeadlines[Connection]
    write_timeout_s: float

    def note_opened(self) -> None:
        """Notes that a connection has begun."""

    def note_closed(self) -> None:
        """Notes that a connection has ended and its socket is closed, or lingers."""

    def free_worker(self, connection: Connection) -> None:
        """Takes the worker back of a connection whose greenlet never ran."""

    def linger(self, sock: _socket.socket) -> None:
        """Sends FIN, and closes the socket when its peer is quiet."""

    def refused(self, why: Ending, detail: str) -> None:
        """Counts and logs that a peer was turned away."""

    def failed(self) -> None:
        """Logs the error that is being handled."""


class Connection(Greenlet):  # type: ignore[type-arg]  # generic in the stubs alone
    """One peer. The callback serves it; the greenlet waits for it and ends it.

    Serving: the watcher is active, the greenlet not started or parked. Awake: the watcher is
    stopped, the greenlet runs. `ending` is None until the connection has to end, then the reason.
    """

    # A slot is read in 3 ns; an attribute in the dictionary that Greenlet has takes 30.
    __slots__ = (
        "drain_bytes",
        "ending",
        "host",
        "owed",
        "parked",
        "read_size",
        "rest",
        "sock",
        "unsent",
        "waits_for_answers",
        "watcher",
    )

    def __init__(self, host: Host, sock: _socket.socket) -> None:
        Greenlet.__init__(self)
        self.host = host
        self.sock = sock
        self.rest = b""  # the bytes of an incomplete frame
        self.unsent = b""  # replies that the kernel did not take; nothing is read while there are
        self.owed = 0  # frames that wait for a store
        self.ending: Ending | None = None
        self.read_size = SMALL_READ
        self.drain_bytes = 0  # what is still to be read and answered before the end
        self.parked = False
        self.waits_for_answers = False
        host.note_opened()
        self.watcher = host.loop.io(sock.fileno(), READ)
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
            amount = None if self.rest else self.host.table.get(data)
            if amount is None:
                self.take(data)
            else:
                self.host.ask(self, amount, None)
        except Exception:
            self.fail()

    def take(self, data: bytes) -> None:
        """Takes frames that were read, or notes that the peer has ended."""
        if data:
            self.read_size = LARGE_READ if len(data) >= SMALL_READ else SMALL_READ
            self.decode(data)
        else:
            self.end(Ending.GONE)

    def decode(self, data: bytes) -> None:
        """Verifies all whole frames, which then join the turn, and keeps the rest."""
        started = bool(self.rest)
        if started:
            data = self.rest + data
        try:
            batch, self.rest = self.host.decode(data)
        except BadFrame as bad:
            batch, self.rest = bad.batch, b""
            why = Ending(bad.reason)
            self.host.refused(why, f"{self.peer()}: {bad}")
            self.end(why)
        if self.rest:
            if batch or not started:
                self.host.deadlines.begin(self)
        elif started:
            self.host.deadlines.end(self)
        # At last: a turn that is full is answered at once, which may end the connection.
        if batch:
            self.host.ask(self, batch.sum(), batch)

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
            self.end(Ending.GONE)
            return
        if sent < len(data):
            self.unsent = data[sent:]
            self.wake()

    # Replies are sent as they are; under TLS something stands between.
    send = transmit

    def look(self) -> None:
        """Takes what has come, which may be what a deadline waits for, if this one reads at all."""
        if self.watcher.active:
            self.on_readable()

    def overdue(self) -> str:
        """What the frame deadline has ended, for the log."""
        return f"a frame stopped after {len(self.rest)} bytes"

    def owe(self, frames: int) -> None:
        """Notes that so many frames wait for a store; with very many nothing more is read."""
        self.owed += frames
        if self.owed >= MAX_UNREAD_FRAMES:
            self.wake()

    def answered(self, frames: int) -> None:
        """Notes that so many frames that waited for a store have their replies."""
        self.owed -= frames
        if not self.owed and self.waits_for_answers:
            self.waits_for_answers = False
            self.host.loop.run_callback(self.switch)

    def withdraw(self) -> None:
        """Ends the connection without an answer to what waits for a store."""
        self.answered(self.owed)
        self.end(Ending.STORE)

    def end(self, why: Ending) -> None:
        """Has the greenlet end the connection."""
        if why.may_follow(self.ending):
            self.ending = why
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
        self.host.failed()
        self.answered(self.owed)
        self.end(Ending.FAILED)

    def wake(self) -> None:
        """Stops reading and lets the greenlet do what waits; without effect if it is awake.

        A peer that is gone and is owed nothing needs no greenlet: a third of what a connection
        costs that sends one frame and closes.
        """
        if self.watcher.active:
            self.watcher.stop()
            if self.parked:
                self.host.loop.run_callback(self.switch)
            elif self.ending is Ending.GONE and not self.unsent and not self.owed:
                self.release()
                self.host.free_worker(self)
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
        self.host.note_closed()
        self.host.deadlines.end(self)
        if self.lingers():
            self.host.linger(self.sock)
        else:
            self.sock.close()

    def lingers(self) -> bool:
        """Whether the peer may still be sending and has to see the end of the replies."""
        return self.ending is not None and self.ending.lingers

    def drain(self) -> None:
        """Ends the connection after what its socket holds now is counted and answered."""
        if self.ending is None:
            self.drain_bytes = unread_bytes(self.sock)
            self.end(Ending.DRAIN)

    def _run(self) -> None:
        try:
            self.flush()
            while self.ending is None:
                self.park()
                self.flush()
            self.answer_rest()
        except gevent.GreenletExit:
            self.ending = Ending.CUT
        finally:
            self.release()

    def answer_rest(self) -> None:
        """Counts and answers what the socket held when the drain began."""
        while self.drain_bytes and self.ending is Ending.DRAIN:
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
        self.host.hub.switch()
        self.parked = False

    def flush(self) -> None:
        """Waits until everything is answered and the kernel has taken every reply.

        The deadline of an incomplete frame stands still meanwhile, since nothing is read.
        """
        self.host.commit()
        if not self.unsent and not self.owed:
            return
        frame_began_at = self.host.deadlines.end(self)
        blocked_at = time.monotonic()
        while self.unsent or self.owed:
            if self.unsent:
                self.write()
            else:
                self.waits_for_answers = True
                self.host.hub.switch()
        if frame_began_at is not None:
            self.host.deadlines.begin(self, frame_began_at + time.monotonic() - blocked_at)

    def write(self) -> None:
        """Waits until the kernel has taken every reply; a peer that does not read is dropped."""
        writable = self.host.loop.io(self.sock.fileno(), WRITE)
        try:
            while self.unsent:
                timeout = Timeout.start_new(self.host.write_timeout_s)
                is_late = False
                try:
                    self.host.hub.wait(writable)
                except Timeout as expired:
                    if expired is not timeout:
                        raise
                    is_late = True
                finally:
                    timeout.close()
                # Also when the time is over: it may be that this process stood still meanwhile.
                data, self.unsent = self.unsent, b""
                self.transmit(data)
                if is_late and self.unsent == data:
                    self.unsent = b""
                    self.owed = 0
                    detail = f"{self.peer()} does not read its replies"
                    self.host.refused(Ending.NOT_READING, detail)
                    self.end(Ending.NOT_READING)
        finally:
            writable.close()
