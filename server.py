"""python server.py: one exact total that any number of connections add to.

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
added at all. Deadlines are kept by one coarse sweep, so a frame costs no timer.
"""

from __future__ import annotations

import _socket
import array
import errno
import fcntl
import logging
import signal
import socket
import struct
import sys
import termios
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

import gevent
from gevent.event import Event
from gevent.greenlet import Greenlet
from gevent.pool import Pool
from gevent.server import StreamServer
from gevent.timeout import Timeout

from counter import Counter, MemoryCounter
from log import LimitedLog, configure_log
from machine import available_cpus, raise_descriptor_limit
from protocol import BadFrame, Decoder, format_address
from settings import ServerSettings, read_settings

EXIT_CANNOT_START: Final = 1

# A connection with one frame in flight reads 16 bytes: a small buffer is allocated faster. A read
# that fills it is followed by large ones, whose 4,096 frames bound what is pending per connection.
SMALL_READ: Final = 4096
LARGE_READ: Final = 65536

# How long, and for how many bytes, a peer may go on sending after it was told that it will not be
# answered and still see FIN rather than RST.
LINGER_S: Final = 1.0
LINGER_BYTES: Final = 1 << 20

# Deadlines are found overdue this late at most; short deadlines are swept more often.
SWEEP_S: Final = 0.25

# After running out of descriptors or memory, accepting pauses so long instead of spinning.
ACCEPT_PAUSE_S: Final = 0.1

# Descriptors besides the workers' own: the process's, and sockets that linger.
SPARE_DESCRIPTORS: Final = 64

_READ, _WRITE = 1, 2  # libev's event masks
_TCPI_UNACKED = struct.Struct("24xI")  # of struct tcp_info; a listener's is its queue's length
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

_log = logging.getLogger("server")


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
        self.watcher = server.loop.io(sock.fileno(), _READ)
        self.watcher.start(self.on_readable)

    def on_readable(self) -> None:
        """Serves what has arrived; runs in the loop and never waits."""
        self.read(self.read_size)
        if self.unsent or self.ending:
            self.wake()

    def read(self, size: int) -> int:
        """Reads once, up to `size` bytes, and serves them; gives back how many there were."""
        try:
            data = self.sock.recv(size)
        except BlockingIOError:
            return 0
        except OSError:
            data = b""
        if data:
            self.read_size = LARGE_READ if len(data) == size else SMALL_READ
            self.serve(data)
        else:
            self.end("the peer is gone")
        return len(data)

    def serve(self, data: bytes) -> None:
        """A frame's life: verify all, add once, then reply."""
        started = bool(self.rest)
        if started:
            data = self.rest + data
        try:
            batch, self.rest = self.server.decoder.decode(data)
        except BadFrame as bad:
            batch, self.rest = bad.batch, b""
            self.server.refused(bad.reason, str(bad))
            self.end(bad.reason, lingers=True)
        if batch:
            before = self.server.counter.add(batch.sum())
            self.server.requests += len(batch)
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
            while self.drain_bytes > 0 and self.lingers and self.ending == "drain":
                self.drain_bytes -= self.read(min(self.drain_bytes, LARGE_READ)) or 1
                self.flush()
        except gevent.GreenletExit:
            self.lingers = False
        finally:
            self.watcher.close()
            self.server.incomplete.pop(self, None)
            if self.lingers:
                Linger(self.server, self.sock)
            else:
                self.sock.close()

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
        writable = self.server.loop.io(self.sock.fileno(), _WRITE)
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
        self.watcher = server.loop.io(sock.fileno(), _READ)
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


class CounterServer(StreamServer):
    """Serves one Counter on one listening socket, to as many connections as it has workers.

    `listener` is an address or a socket that listens already. start() serves, drain() ends: it
    answers what has arrived, within a deadline. Use it where gevent's hub runs.
    """

    # gevent's stubs leave out what a server on plain sockets and bare watchers needs of them.
    hub: Any
    loop: Any
    pool: Any
    socket: Any

    def __init__(
        self, listener: Any, counter: Counter, workers: int, settings: ServerSettings
    ) -> None:
        self.hub = gevent.get_hub()
        self.counter = counter
        self.decoder = Decoder(settings.max_increment)
        self.frame_timeout_s = settings.frame_timeout_s
        self.write_timeout_s = settings.write_timeout_s
        self.requests = 0  # additions, reads included
        self.incomplete: dict[Connection, float] = {}  # since when a frame is waited for
        self.lingering: set[Linger] = set()
        self.limited_log = LimitedLog(_log)
        self._quiet = Event()
        self._closing = False
        super().__init__(listener, spawn=Pool(workers))
        sweep_s = max(0.01, min(SWEEP_S, self.frame_timeout_s / 4))
        self._sweeper = self.loop.timer(sweep_s, sweep_s)

    def start(self) -> None:
        """Starts to serve; gives back at once."""
        super().start()
        # Accepted sockets inherit it: a system call less for each. Without it a reply can wait
        # 40 ms for the acknowledgement of the one before (Nagle's algorithm and delayed ACK).
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sweeper.start(self._sweep)

    def do_read(self) -> tuple[_socket.socket, Any] | None:  # type: ignore[override]
        """Accepts one connection as a plain non-blocking socket, or gives back None."""
        try:
            fd, address = self.socket._accept()
        except BlockingIOError:
            return None
        except ConnectionAbortedError:
            return self.do_read()
        except OSError as error:
            if error.errno not in _OUT_OF_RESOURCES:
                raise
            self.limited_log.warning("accept", "cannot accept connections: %s", error.strerror)
            self.stop_accepting()
            self._timer = self.loop.timer(ACCEPT_PAUSE_S)
            self._timer.start(self._resume_accepting)
            return None
        sock = _socket.socket(self.family, socket.SOCK_STREAM, 0, fd)
        sock.setblocking(False)
        return sock, address

    def _resume_accepting(self) -> None:
        if self.started:
            self.start_accepting()

    def do_handle(self, *accepted: Any) -> None:
        """Hands an accepted connection to handle(), without starting a greenlet for it."""
        self.handle(*accepted)

    def handle(self, sock: _socket.socket, _address: Any) -> None:
        """Gives a connection a worker; the base class accepts only while the Pool has one."""
        self.pool.add(Connection(self, sock))

    def refused(self, reason: str, detail: str) -> None:
        """Logs that a peer was turned away."""
        self.limited_log.warning(reason, "connection refused: %s", detail)

    def check_quiet(self) -> None:
        """Wakes drain() when the last lingering socket is gone."""
        if self._closing and not self.lingering:
            self._quiet.set()

    def waiting_connections(self) -> int:
        """How many connections wait in the listen backlog."""
        info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCPI_UNACKED.size)
        return int(_TCPI_UNACKED.unpack(info)[0])

    def _sweep(self) -> None:
        """Keeps the deadlines of all connections; runs in the loop."""
        now = time.monotonic()
        for connection, started_at in list(self.incomplete.items()):
            if now - started_at >= self.frame_timeout_s:
                self.refused("incomplete", f"a frame stopped after {len(connection.rest)} bytes")
                connection.end("incomplete", lingers=True)
                connection.wake()
        for linger in [linger for linger in self.lingering if now >= linger.until]:
            linger.close()
        if not self._closing and self.pool.full():
            waiting = self.waiting_connections()
            if waiting:
                self.limited_log.warning(
                    "full",
                    "all %d workers are taken and %d connections wait; "
                    "raise --multiplier to serve more at once",
                    self.pool.size,
                    waiting,
                )

    def drain(self, timeout_s: float, cut: Event) -> None:
        """Stops: counts and answers what every socket holds now, then closes with FIN.

        Connections in the backlog are included. After `timeout_s`, or when `cut` is set, what is
        left is closed as it is. Afterwards nothing is added any more.
        """
        self.stop_accepting()
        connections = [*self.pool, *self._accept_backlog()]
        for connection in connections:
            connection.drain()
        self.close()
        self._closing = True
        ending = gevent.spawn(self._join, connections)
        either: list[Any] = [ending, cut]
        gevent.wait(either, timeout=timeout_s, count=1)
        ending.kill()
        gevent.killall(connections)
        for linger in list(self.lingering):
            linger.close()
        self._sweeper.close()
        self.limited_log.flush()

    def _join(self, connections: Sequence[Connection]) -> None:
        gevent.joinall(connections)
        self.check_quiet()
        self._quiet.wait()

    def _accept_backlog(self) -> Iterable[Connection]:
        """Every connection that waits for a worker; a failure to accept ends it."""
        while True:
            accepted = self.do_read()
            if not accepted:
                return
            yield Connection(self, accepted[0])


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """A listening socket; OSError, with a text that says what to do, if there can be none."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
    except socket.gaierror as error:
        raise OSError(f"cannot listen on host {host!r}: {error.strerror}; see --host") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        remedy = {
            errno.EADDRINUSE: "; stop the program that has it, or choose another --port"
            " (0 takes a free one)",
            errno.EACCES: "; ports below 1024 need root",
            errno.EADDRNOTAVAIL: "; no interface has it, --host 0.0.0.0 serves all",
        }.get(error.errno or 0, "")
        where = format_address(host, port)
        reason = (error.strerror or str(error)).lower()
        raise OSError(f"cannot listen on {where}: {reason}{remedy}") from None
    listener.setblocking(False)
    return listener


def warn_of_descriptors(workers: int, limit: float) -> None:
    """Warns when the workers need more descriptors than this process may open."""
    if workers + SPARE_DESCRIPTORS > limit:
        _log.warning(
            "%d workers need more than the %d descriptors this process may open; "
            "raise the limit (ulimit -Hn) or lower --multiplier",
            workers,
            limit,
        )


def serve(settings: ServerSettings) -> int:
    """Serves in this process until SIGTERM or SIGINT; gives back the exit code."""
    workers = settings.workers(available_cpus())
    warn_of_descriptors(workers, raise_descriptor_limit())
    try:
        listener = listen(settings.host, settings.port, settings.backlog)
    except OSError as error:
        sys.stderr.write(f"server.py: {error}\n")
        return EXIT_CANNOT_START
    counter = MemoryCounter(settings.set_total or 0)
    stop, cut = Event(), Event()

    def on_signal() -> None:
        (cut if stop.is_set() else stop).set()

    handlers = [
        gevent.signal_handler(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)
    ]
    server = CounterServer(listener, counter, workers, settings)
    server.start()
    host, port = listener.getsockname()[:2]
    say(
        f"Listening on {format_address(host, port)} with {workers} workers in 1 process "
        f"(store: {settings.store})"
    )
    stop.wait()
    server.drain(settings.drain_timeout_s, cut)
    say(f"Counter value: {counter.total():,}")
    say(f"Server stopped after processing total requests: {server.requests:,}")
    counter.close()
    for handler in handlers:
        handler.cancel()
    return 0


def say(line: str) -> None:
    """Writes one line of the result to standard output at once, also into a pipe."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        _log.warning("nobody reads standard output any more: %s", line)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives back its exit code."""
    settings = read_settings(
        ServerSettings,
        "server.py",
        "A shared counter: one exact total, added to over TCP.",
        arguments,
    )
    configure_log(settings.log_level, settings.log_format)
    from gevent import monkey

    monkey.patch_all()
    return serve(settings)


if __name__ == "__main__":
    sys.exit(main())
