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
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import gevent
from gevent.event import Event
from gevent.pool import Pool
from gevent.server import StreamServer

from certificates import CertificateError, Certificates, Snapshot
from connection import Connection, Linger, Turn
from counter import Counter
from group_commit import GroupCommit
from keeper import Keeper, make_keeper
from log import LimitedLog, configure_log
from machine import available_cpus, raise_descriptor_limit
from outage import Outage
from prefork import (
    CUT_SIGNAL,
    EXIT_CANNOT_BOOT,
    CannotBoot,
    ChildError,
    Master,
    ask_child,
    split_evenly,
)
from protocol import Decoder, format_address
from room import Room
from settings import EXIT_USAGE, ServerSettings, read_settings
from slots import CONNECTIONS, LOSSES, REFUSED, REQUESTS, WORKERS, Slots
from sockets import listen
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

# How long the certificate files may take to be looked at, which is done in a helping process.
CERTIFICATE_CHECK_S: Final = 10.0

# Between attempts to take certificates that are known to be good.
RELOAD_RETRY_S: Final = 0.5

# Descriptors besides the workers' own: the process's, and sockets that linger.
SPARE_DESCRIPTORS: Final = 64

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
        certificates: Certificates | None = None,
    ) -> None:
        self.hub = gevent.get_hub()
        decoder = make_decoder(settings.max_increment)
        self.table, self.decode = decoder.table, decoder.decode
        self.frame_timeout_s = settings.frame_timeout_s
        self.write_timeout_s = settings.write_timeout_s
        self._room = Room(self, settings.idle_timeout_s)
        self._certificates = certificates
        self.tls_context: Any = None
        self._connection: type[Connection] = Connection
        if certificates:
            from tls_connection import TlsConnection

            self._connection = TlsConnection
            self.load_certificates()
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
        self.pool.add(self._connection(self, sock))
        self._room.look_at = 0.0  # it may have waited in the queue for longer than any other idles

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

    def gave_up_idle(self, connection: Connection) -> None:
        """Ends an idle connection in favour of one that waits."""
        detail = f"{connection.peer()} was idle while others waited for a worker"
        self.refused("idle", detail)
        connection.end("idle", lingers=True)

    def count_connections(self, change: int) -> None:
        """Notes that a connection began (+1) or ended (-1)."""
        self.slot[CONNECTIONS] += change

    def check_quiet(self) -> None:
        """Wakes drain() when the last lingering socket is gone."""
        if self._closing and not self.lingering:
            self._quiet.set()

    def _sweep(self) -> None:
        """Keeps the deadlines of all connections; runs in the loop."""
        now = time.monotonic()
        for connection, started_at in list(self.incomplete.items()):
            if now - started_at >= self.frame_timeout_s:
                self.refused("incomplete", f"{connection.peer()}: {connection.overdue()}")
                connection.end("incomplete", lingers=True)
        for linger in [linger for linger in self.lingering if now >= linger.until]:
            linger.close()
        self.turn.sweep(now)
        if not self._closing and self.pool.full():
            self._room.make(now)

    def load_certificates(self) -> None:
        """Takes the certificates that were published last, for connections from now on."""
        from tls import server_context

        assert self._certificates is not None
        self.tls_context = server_context(self._certificates.snapshot())

    def take_certificates(self) -> None:
        """The same, in a greenlet that tries until it can.

        They are known to be good: only descriptors or memory can be missing, and all processes
        shall have the same certificates.
        """
        while True:
            try:
                return self.load_certificates()
            except (CertificateError, OSError) as error:
                self.limited_log.warning("reload", "cannot take the certificates yet: %s", error)
                gevent.sleep(RELOAD_RETRY_S)

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
            yield self._connection(self, accepted[0])


def make_decoder(max_amount: int) -> Decoder:
    """This process's decoder. It imports NumPy, which no process may that is still to fork."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from vector import VectorDecoder

    return VectorDecoder(max_amount)


def warn_of_descriptors(workers: int, limit: float) -> None:
    """Warns when the workers need more descriptors than this process may open."""
    if workers + SPARE_DESCRIPTORS > limit:
        _log.warning(
            "%d workers need more than the %d descriptors this process may open; "
            "raise the limit (ulimit -Hn) or lower --multiplier",
            workers,
            limit,
        )


@dataclass(frozen=True)
class Shared:
    """What all processes of one server have in common, made before the first is forked."""

    settings: ServerSettings
    listener: socket.socket
    keeper: Keeper
    certificates: Certificates | None
    slots: Slots


def serve(settings: ServerSettings) -> int:
    """Serves as the settings say until SIGTERM or SIGINT; gives back the exit code."""
    cpus = available_cpus()
    workers, processes = settings.workers(cpus), settings.process_count(cpus)
    warn_of_descriptors(math.ceil(workers / max(1, processes)), raise_descriptor_limit())
    try:
        shared = Shared(
            settings,
            listen(settings.host, settings.port, settings.backlog),
            make_keeper(settings, processes),
            make_certificates(settings),
            Slots(max(1, processes)),
        )
    except (OSError, StoreError, CertificateError) as error:
        return fail(str(error), EXIT_CANNOT_START)
    found = shared.keeper.found
    _log.info("CPUs to use: %g; an answered addition survives %s", cpus, found.survives)
    for warning in found.warnings:
        _log.warning("store %s: %s", settings.store, warning)

    def announce() -> None:
        where = format_address(*shared.listener.getsockname()[:2])
        count = f"{processes} processes" if processes > 1 else "1 process"
        store = f"{settings.store}" if found.is_new else f"{settings.store}, total: {found.total:,}"
        say(f"Listening on {where} with {workers} workers in {count} (store: {store})")

    if processes:
        if not serve_forked(shared, workers, announce):
            return EXIT_CANNOT_BOOT
    else:
        serve_here(shared, 0, workers, announce, STOP_SIGNALS)
    say(f"Counter value: {shared.keeper.last_total(shared.slots):,}")
    say(f"Server stopped after processing total requests: {shared.slots.sum(REQUESTS):,}")
    return 0


def serve_forked(shared: Shared, workers: int, announce: Callable[[], None]) -> bool:
    """Serves in forked processes under a master; false, after saying why, if they cannot start."""
    shares = split_evenly(workers, len(shared.slots))

    def serve_share(index: int, ready: Callable[[], None]) -> int:
        # The master ends a process by SIGTERM; Ctrl-C is for the master.
        serve_here(shared, index, shares[index], ready, (signal.SIGTERM,))
        return 0

    master = Master(
        len(shared.slots),
        serve_share,
        shared.settings.drain_timeout_s,
        shared.slots.clear_gauges,
        partial(reload_certificates, shared, check_aside),
    )
    try:
        master.run(announce, on_stop=shared.listener.close)
    except CannotBoot as error:
        sys.stderr.write(f"server.py: {error}\n")
        return False
    return True


def serve_here(
    shared: Shared,
    index: int,
    workers: int,
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

    def on_reload() -> None:
        # A process that is alone is its own master. A terminal that is closed tells all processes.
        is_alone = signal.SIGINT in stop_signals
        if reload_certificates(shared, check_here) if is_alone else shared.certificates:
            server.take_certificates()

    handlers = [gevent.signal_handler(number, on_stop) for number in stop_signals]
    handlers.append(gevent.signal_handler(CUT_SIGNAL, on_cut))
    handlers.append(gevent.signal_handler(signal.SIGHUP, on_reload))
    server = CounterServer(
        shared.listener,
        shared.keeper.open(),
        workers,
        shared.settings,
        shared.slots,
        index,
        shared.certificates,
    )
    server.start()
    # What exists now lives as long as the process: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    ready()
    stop.wait()
    server.drain(shared.settings.drain_timeout_s, cut)
    for handler in handlers:
        handler.cancel()


def make_certificates(settings: ServerSettings) -> Certificates | None:
    """The certificates that the settings name, loaded; CertificateError if they cannot be used."""
    if not settings.tls_cert or not settings.tls_key:
        return None
    certificates = Certificates(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    certificates.load(check_aside)
    return certificates


def reload_certificates(shared: Shared, check: Callable[[Snapshot], None]) -> bool:
    """Publishes the certificate files as they are now, after SIGHUP; true if all shall take them.

    Files that cannot be used leave everything as it is.
    """
    if shared.certificates is None:
        _log.warning("SIGHUP: there is nothing to load again, TLS is off (--tlsCert)")
        return False
    try:
        shared.certificates.load(check)
    except (CertificateError, OSError) as error:
        _log.error("SIGHUP: the certificates are kept as they were: %s", error)
        return False
    _log.info("SIGHUP: the certificates were loaded again")
    return True


def check_here(snapshot: Snapshot) -> None:
    """CertificateError if these certificates cannot be used."""
    from tls import server_context

    server_context(snapshot)


def check_aside(snapshot: Snapshot) -> None:
    """The same by a helping process: the one that is still to fork must not import ssl."""

    def check() -> str:
        try:
            check_here(snapshot)
        except CertificateError as error:
            return str(error)
        return "good"

    try:
        answer = ask_child(check, CERTIFICATE_CHECK_S)
    except ChildError as error:
        raise CertificateError(f"--tlsCert {snapshot.cert_file}: {error}") from None
    if answer != "good":
        raise CertificateError(answer)


def say(line: str) -> None:
    """Writes one line of the result to standard output at once, also into a pipe."""
    try:
        print(line, flush=True)
    except OSError as error:
        _log.warning("cannot write to standard output (%s): %s", error.strerror, line)


def fail(message: str, code: int) -> int:
    """Says in one line why the program ends; gives back its exit code."""
    sys.stderr.write(f"server.py: {message}\n")
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives back its exit code."""
    settings = read_settings(
        ServerSettings,
        "server.py",
        "A shared counter: one exact total, added to over TCP.",
        arguments,
    )
    configure_log(settings.log_level, settings.log_format)
    if bool(settings.tls_cert) != bool(settings.tls_key):
        return fail("--tlsCert and --tlsKey need each other; give both", EXIT_USAGE)
    if settings.tls_client_ca and not settings.tls_cert:
        return fail("--tlsClientCA needs --tlsCert and --tlsKey", EXIT_USAGE)
    try:
        return serve(settings)
    except KeyboardInterrupt:  # before or after the time that it serves
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
