"""python server.py: one exact total that any number of connections add to.

Here are the serving process (CounterServer: accepting, workers, deadlines, drain) and the command
that starts one or more of them. What happens on a connection is connection.py's; how processes are
kept alive is prefork.py's.
"""

from __future__ import annotations

import _socket
import errno
import gc
import logging
import math
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import gevent
from gevent.event import Event
from gevent.pool import Pool
from gevent.server import StreamServer

from connection import Connection, Linger, Turn
from counter import Counter
from group_commit import GroupCommit
from keeper import Keeper, make_keeper
from log import LimitedLog, configure_log
from machine import available_cpus, raise_descriptor_limit
from outage import Outage
from prefork import CUT_SIGNAL, EXIT_CANNOT_BOOT, CannotBoot, Master, split_evenly
from protocol import Decoder, format_address
from settings import ServerSettings, read_settings
from slots import CONNECTIONS, LOSSES, REFUSED, REQUESTS, WORKERS, Slots
from stores import Store, StoreError
from values import Seconds

EXIT_CANNOT_START: Final = 1
EXIT_INTERRUPTED: Final = 130
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

# Deadlines are found overdue this late at most; short deadlines are swept more often.
SWEEP_S: Final = 0.25

# After running out of descriptors or memory, accepting pauses so long instead of spinning.
ACCEPT_PAUSE_S: Final = 0.1

# What a process that is ahead of others in connections leaves a new one to them for: long enough
# for an idle process to wake, short beside what a connection costs its peer anyway.
LEAVE_TO_OTHERS_S: Final = 0.001

# A peer that is silent so long is asked whether it is still there, and after so many questions
# without an answer it is gone: 45 s in all.
KEEPALIVE_IDLE_S: Final = 30
KEEPALIVE_INTERVAL_S: Final = 5
KEEPALIVE_PROBES: Final = 3

# Descriptors besides the workers' own: the process's, and sockets that linger.
SPARE_DESCRIPTORS: Final = 64

_TCPI_UNACKED = struct.Struct("24xI")  # of struct tcp_info; a listener's is its queue's length
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

_log = logging.getLogger("server")


class CounterServer(StreamServer):
    """Serves one Counter on one listening socket, to as many connections as it has workers.

    `listener` is a socket from listen(). start() serves, drain() ends: it
    answers what has arrived, within a deadline. Use it where gevent's hub runs.
    """

    # gevent's stubs leave out what a server on plain sockets and bare watchers needs of them.
    hub: Any
    loop: Any
    pool: Any
    socket: Any

    def __init__(
        self,
        listener: Any,
        counter: Counter,
        workers: int,
        settings: ServerSettings,
        slots: Slots | None = None,
        index: int = 0,
    ) -> None:
        self.hub = gevent.get_hub()
        decoder = make_decoder(settings.max_increment)
        self.table, self.decode = decoder.table, decoder.decode
        self.frame_timeout_s = settings.frame_timeout_s
        self.write_timeout_s = settings.write_timeout_s
        self.slots = Slots(1) if slots is None else slots
        self.index = index
        self.slot = self.slots[index]
        self.turn: Turn | GroupCommit = (
            self._make_group(counter, settings)
            if isinstance(counter, Store)
            else Turn(counter, self.slot)
        )
        self.ask = self.turn.ask
        self.incomplete: dict[Connection, float] = {}  # since when a frame is waited for
        self.lingering: set[Linger] = set()
        self.limited_log = LimitedLog(_log)
        self._quiet = Event()
        self._closing = False
        self._waited = False
        if len(self.slots) > 1:
            self.max_accept = 1  # a burst is spread over the processes, not taken by the first
        super().__init__(listener, spawn=Pool(workers))
        sweep_s = max(0.01, min(SWEEP_S, self.frame_timeout_s / 4))
        self._sweeper = self.loop.timer(sweep_s, sweep_s)
        self._before_waiting = self.loop.prepare()

    def start(self) -> None:
        """Starts to serve; gives back at once."""
        super().start()
        self._sweeper.start(self._sweep)
        self._before_waiting.start(self.turn.commit)
        self.slot[WORKERS] = self.pool.size

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
            self._pause_accepting(ACCEPT_PAUSE_S)
            return None
        sock = _socket.socket(self.family, socket.SOCK_STREAM, 0, fd)
        sock.setblocking(False)
        return sock, address

    def _do_read(self) -> None:
        """Accepts what waits; leaves it to the other processes first if this one is ahead of them.

        The kernel wakes whichever process waits, mostly the same one. One that has clearly more
        connections than another with a free worker therefore waits a moment, once, before it
        accepts: the others take the connection meanwhile, or it does after all.
        """
        if not self._waited and self._is_ahead():
            self._waited = True
            self._pause_accepting(LEAVE_TO_OTHERS_S)
        else:
            self._waited = False
            super()._do_read()  # type: ignore[misc]  # gevent's stubs leave it out

    def _is_ahead(self) -> bool:
        fewest = self.slots.fewest_connections(but=self.index)
        return fewest is not None and self.slot[CONNECTIONS] > fewest + max(4, fewest // 4)

    def _pause_accepting(self, seconds: float) -> None:
        self.stop_accepting()
        self._timer = self.loop.timer(seconds)
        self._timer.start(self._resume_accepting)

    def _resume_accepting(self) -> None:
        if self.started:
            self.start_accepting()

    def do_handle(self, *accepted: Any) -> None:
        """Hands an accepted connection to handle(), without starting a greenlet for it."""
        self.handle(*accepted)

    def handle(self, sock: _socket.socket, _address: Any) -> None:
        """Gives a connection a worker; the base class accepts only while the Pool has one."""
        self.pool.add(Connection(self, sock))

    def _make_group(self, store: Store, settings: ServerSettings) -> GroupCommit:
        timeout_s = settings.store_timeout_s
        name, patience = str(settings.store), str(Seconds(timeout_s))
        outage = Outage(self.slots, self.index, _log, name, patience)

        def note_loss() -> None:
            self.slot[LOSSES] += 1
            self.limited_log.warning(
                "loss",
                "store %s lost additions that it had answered: its total went back",
                name,
            )

        return GroupCommit(store, self.slot, timeout_s, outage.begin, outage.end, note_loss)

    def failed(self) -> None:
        """Logs the error that is being handled: a connection ends of it, the others do not."""
        _log.exception("a connection failed")

    def refused(self, reason: str, detail: str) -> None:
        """Counts and logs that a peer was turned away."""
        self.slot[REFUSED] += 1
        self.limited_log.warning(reason, "a peer was refused: %s", detail)

    def count_connections(self, change: int) -> None:
        """Notes that a connection began (+1) or ended (-1)."""
        self.slot[CONNECTIONS] += change

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
                stopped = f"a frame stopped after {len(connection.rest)} bytes"
                self.refused("incomplete", f"{connection.peer()}: {stopped}")
                connection.end("incomplete", lingers=True)
        for linger in [linger for linger in self.lingering if now >= linger.until]:
            linger.close()
        self.turn.sweep(now)
        if not self._closing and self.pool.full():
            self._warn_of_waiting()

    def _warn_of_waiting(self) -> None:
        """Says that connections wait: the first of the processes does, once all are full."""
        first = next(i for i in range(len(self.slots)) if self.slots[i][WORKERS])
        if self.index == first and self.slots.fewest_connections(but=self.index) is None:
            waiting = self.waiting_connections()
            if waiting:
                self.limited_log.warning(
                    "full",
                    "all %d workers are taken and %d connections wait; "
                    "raise --multiplier to serve more at once",
                    self.slots.sum(WORKERS),
                    waiting,
                )

    def drain(self, timeout_s: float, cut: Event) -> None:
        """Stops: counts and answers what every socket holds now, then closes with FIN.

        Connections in the backlog are included. After `timeout_s`, or when `cut` is set, what is
        left is closed as it is. Afterwards nothing is added any more.
        """
        self.stop_accepting()
        self.slot[WORKERS] = 0
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
        self.turn.close()
        self._sweeper.close()
        self._before_waiting.close()
        self.limited_log.flush()

    def _join(self, connections: Sequence[Connection]) -> None:
        gevent.joinall(connections)
        self.check_quiet()
        self._quiet.wait()

    def _accept_backlog(self) -> Iterable[Connection]:
        """Every connection that waits for a worker; a failure to accept ends it."""
        while True:
            try:
                accepted = self.do_read()
            except OSError as error:
                _log.warning("cannot accept what waits in the backlog: %s", error.strerror)
                return
            if not accepted:
                return
            yield Connection(self, accepted[0])


def make_decoder(max_amount: int) -> Decoder:
    """This process's decoder. It imports NumPy, which no process may that is still to fork."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from vector import VectorDecoder

    return VectorDecoder(max_amount)


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """A listening socket; OSError, with a text that says what to do, if there can be none."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", "not a host name")
        raise OSError(f"cannot listen on host {host!r}: {reason}; see --host") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit these: fewer system calls for each. Without the first a reply can
        # wait 40 ms for the acknowledgement of the one before (Nagle's algorithm and delayed ACK);
        # without the others a peer that vanished without a word keeps its worker for ever.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
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
    """Serves as the settings say until SIGTERM or SIGINT; gives back the exit code."""
    cpus = available_cpus()
    workers, processes = settings.workers(cpus), settings.process_count(cpus)
    warn_of_descriptors(math.ceil(workers / max(1, processes)), raise_descriptor_limit())
    try:
        listener = listen(settings.host, settings.port, settings.backlog)
        keeper = make_keeper(settings, processes)
    except (OSError, StoreError) as error:
        sys.stderr.write(f"server.py: {error}\n")
        return EXIT_CANNOT_START
    slots = Slots(max(1, processes))
    host, port = listener.getsockname()[:2]

    def announce() -> None:
        count = f"{processes} processes" if processes > 1 else "1 process"
        where = format_address(host, port)
        total = "" if keeper.found.is_new else f", total: {keeper.found.total:,}"
        say(
            f"Listening on {where} with {workers} workers in {count} "
            f"(store: {settings.store}{total})"
        )

    _log.info("CPUs to use: %g; an answered addition survives %s", cpus, keeper.found.survives)
    for warning in keeper.found.warnings:
        _log.warning("store %s: %s", settings.store, warning)
    if processes:
        if not serve_forked(settings, listener, keeper, workers, slots, announce):
            return EXIT_CANNOT_BOOT
    else:
        serve_here(settings, listener, keeper, workers, slots, 0, announce, STOP_SIGNALS)
    say(f"Counter value: {keeper.last_total(slots):,}")
    say(f"Server stopped after processing total requests: {slots.sum(REQUESTS):,}")
    return 0


def serve_forked(
    settings: ServerSettings,
    listener: socket.socket,
    keeper: Keeper,
    workers: int,
    slots: Slots,
    announce: Callable[[], None],
) -> bool:
    """Serves in forked processes under a master; false, after saying why, if they cannot start."""
    shares = split_evenly(workers, len(slots))

    def serve_share(index: int, ready: Callable[[], None]) -> int:
        # The master ends a process by SIGTERM; Ctrl-C is for the master.
        only = (signal.SIGTERM,)
        serve_here(settings, listener, keeper, shares[index], slots, index, ready, only)
        return 0

    master = Master(len(slots), serve_share, settings.drain_timeout_s, slots.clear_gauges)
    try:
        master.run(announce, on_stop=listener.close)
    except CannotBoot as error:
        sys.stderr.write(f"server.py: {error}\n")
        return False
    return True


def serve_here(
    settings: ServerSettings,
    listener: socket.socket,
    keeper: Keeper,
    workers: int,
    slots: Slots,
    index: int,
    ready: Callable[[], None],
    stop_signals: Sequence[signal.Signals],
) -> None:
    """Serves in this process, from patching it to the end of the drain."""
    from gevent import monkey

    monkey.patch_all()
    # Where each greenlet was spawned is of no use here and costs 2 us a connection.
    gevent.config.track_greenlet_tree = False
    stop, cut = Event(), Event()

    def on_stop() -> None:
        (cut if stop.is_set() else stop).set()

    def on_cut() -> None:
        stop.set()
        cut.set()

    handlers = [gevent.signal_handler(number, on_stop) for number in stop_signals]
    handlers.append(gevent.signal_handler(CUT_SIGNAL, on_cut))
    server = CounterServer(listener, keeper.open(), workers, settings, slots, index)
    server.start()
    # What exists now lives as long as the process: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    ready()
    stop.wait()
    server.drain(settings.drain_timeout_s, cut)
    for handler in handlers:
        handler.cancel()


def say(line: str) -> None:
    """Writes one line of the result to standard output at once, also into a pipe."""
    try:
        print(line, flush=True)
    except OSError as error:
        _log.warning("cannot write to standard output (%s): %s", error.strerror, line)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives back its exit code."""
    settings = read_settings(
        ServerSettings,
        "server.py",
        "A shared counter: one exact total, added to over TCP.",
        arguments,
    )
    configure_log(settings.log_level, settings.log_format)
    try:
        return serve(settings)
    except KeyboardInterrupt:  # before or after the time that it serves
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
