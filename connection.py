"""One connection, from its first byte to its last: the hot path, what waits, and the end.

The life of a connection:
  1. accepted, it takes a worker: a Connection is a greenlet in the server's Pool, not yet started;
  2. frames that arrive are served by a callback of the loop, on_readable: verify all, add once,
     reply. Nothing in it waits, and no greenlet is switched for it;
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
import array
import fcntl
import socket
import termios
import time
from typing import TYPE_CHECKING, Final

import gevent
from gevent.greenlet import Greenlet
from gevent.timeout import Timeout

from protocol import TOTAL_MASK, BadFrame, encode_total
from slots import REQUESTS

if TYPE_CHECKING:
    from server import CounterServer

# A connection with one frame in flight reads 16 bytes: a small buffer is allocated faster. A read
# that fills it is followed by large ones, whose 4,096 frames bound what is pending per connection.
SMALL_READ: Final = 4096
LARGE_READ: Final = 65536

# How long, and for how many bytes, a peer may go on sending after it was told that it will not be
# answered and still see FIN rather than RST.
LINGER_S: Final = 1.0
LINGER_BYTES: Final = 1 << 20

READ, WRITE = 1, 2  # libev's event masks


class Connection(Greenlet):  # type: ignore[type-arg]  # generic in the stubs alone
    """One peer. The callback serves it; the greenlet waits for it and ends it.

    Serving: the watcher is active, the greenlet not started or parked. Awake: the watcher is
    stopped, the greenlet runs. `ending` is empty until the connection has to end, then the reason.
    """

    def __init__(self, server: CounterServer, sock: _socket.socket) -> None:
        Greenlet.__init__(self)
        self.server = server
        self.sock = sock
        self.rest = b""  # the bytes of an incomplete frame
        self.unsent = b""  # replies that the kernel did not take; nothing is read while there are
        self.ending = ""
        self.lingers = False
        self.read_size = SMALL_READ
        self.drain_bytes = 0  # what is still to be read and answered before the end
        self.parked = False
        server.count_connections(+1)
        self.watcher = server.loop.io(sock.fileno(), READ)
        self.watcher.start(self.on_readable)

    def on_readable(self) -> None:
        """Serves what has arrived; runs in the loop and never waits.

        A peer that waits for each reply sends one whole frame at a time. That case is written out:
        it takes 1.5 us beside its two system calls, where serve() takes 4.
        """
        try:
            data = self.sock.recv(self.read_size)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        server = self.server
        amount = None if self.rest else server.table.get(data)
        if amount is None:
            self.take(data)
        else:
            before = server.add(amount)
            server.slot[REQUESTS] += 1
            self.send(encode_total((before + amount) & TOTAL_MASK))
        if self.unsent or self.ending:
            self.wake()

    def take(self, data: bytes) -> None:
        """Serves what was read, or notes that the peer has ended."""
        if data:
            self.read_size = LARGE_READ if len(data) >= self.read_size else SMALL_READ
            self.serve(data)
        else:
            self.end("the peer is gone")

    def serve(self, data: bytes) -> None:
        """A frame's life: verify all, add once, then reply."""
        started = bool(self.rest)
        if started:
            data = self.rest + data
        try:
            batch, self.rest = self.server.decode(data)
        except BadFrame as bad:
            batch, self.rest = bad.batch, b""
            self.server.refused(bad.reason, str(bad))
            self.end(bad.reason, lingers=True)
        if batch:
            before = self.server.add(batch.sum())
            self.server.slot[REQUESTS] += len(batch)
            self.send(batch.replies(before))
        if self.rest:
            if batch or not started:
                self.server.incomplete[self] = time.monotonic()
        elif started:
            del self.server.incomplete[self]

    def send(self, replies: bytes) -> None:
        """Hands replies to the kernel; what it does not take is left in `unsent`."""
        try:
            sent = self.sock.send(replies)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.end("the peer is gone")
            return
        if sent < len(replies):
            self.unsent = replies[sent:]

    def end(self, reason: str, lingers: bool = False) -> None:
        """Marks the connection to be ended; `lingers` if its peer may still be sending.

        The last word counts: a peer that is gone while it drains does not linger.
        """
        self.ending = reason
        self.lingers = lingers

    def wake(self) -> None:
        """Stops reading and lets the greenlet do what waits; without effect if it is awake."""
        if self.watcher.active:
            self.watcher.stop()
            if self.parked:
                self.server.loop.run_callback(self.switch)
            else:
                self.start()

    def drain(self) -> None:
        """Ends the connection after what its socket holds now is counted and answered."""
        if not self.ending:
            waiting = array.array("i", [0])
            fcntl.ioctl(self.sock.fileno(), termios.FIONREAD, waiting)
            self.drain_bytes = waiting[0]
            self.end("drain", lingers=True)
            self.wake()

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
            self.watcher.close()
            self.server.count_connections(-1)
            self.server.incomplete.pop(self, None)
            if self.lingers:
                Linger(self.server, self.sock)
            else:
                self.sock.close()

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
        """Waits until the kernel has taken every reply; a peer that does not read is dropped.

        The deadline of an incomplete frame stands still meanwhile, since nothing is read.
        """
        if not self.unsent:
            return
        frame_started_at = self.server.incomplete.pop(self, None)
        blocked_at = time.monotonic()
        writable = self.server.loop.io(self.sock.fileno(), WRITE)
        timeout = Timeout.start_new(self.server.write_timeout_s)
        try:
            while self.unsent:
                self.server.hub.wait(writable)
                replies, self.unsent = self.unsent, b""
                self.send(replies)
        except Timeout as expired:
            if expired is not timeout:
                raise
            self.unsent = b""
            self.server.refused("not-reading", "a peer does not read its replies")
            self.end("not-reading")
        finally:
            timeout.close()
            writable.close()
        if frame_started_at is not None:
            self.server.incomplete[self] = frame_started_at + time.monotonic() - blocked_at


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
