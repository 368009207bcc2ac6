"""One serving process: accepting, workers, deadlines, drain.

CounterServer is a StreamServer on plain sockets whose Pool holds one Connection for each worker
that is taken. What happens on a connection is connection.py's; what the processes of a server are
to each other is the master's (processes/master.py).
"""

from __future__ import annotations

import _socket
import errno
import logging
import os
import socket
import time
import traceback
from collections.abc import Iterable, Sequence
from typing import Any, Final

import gevent
from gevent.event import Event
from gevent.pool import Pool
from gevent.server import StreamServer

from counter.options.server import ServerSettings
from counter.options.values import Seconds
from counter.processes.slots import (
    CONNECTIONS,
    CONNECTIONS_TOTAL,
    LOSSES,
    PID,
    REASONS,
    REFUSED,
    STARTS,
    WAITING,
    WORKERS,
    Slots,
)
from counter.serving.connection import Connection, Linger, Turn
from counter.serving.group_commit import GroupCommit
from counter.serving.idle import Room
from counter.serving.outage import Outage
from counter.system.log import LimitedLog
from counter.system.sockets import waiting_connections
from counter.tls.certificates import CertificateError, Certificates
from counter.totals.counter import Counter
from counter.totals.store import Store
from protocol import Decoder

# Deadlines are found overdue this late at most; short deadlines are swept more often.
SWEEP_S: Final = 0.25

# Between attempts to take certificates that are known to be good.
RELOAD_RETRY_S: Final = 0.5

# After running out of descriptors or memory, accepting pauses so long instead of spinning.
ACCEPT_PAUSE_S: Final = 0.1

# What a process that is ahead of others in connections leaves a new one to them for: long enough
# for an idle process to wake, short beside what a connection costs its peer anyway.
LEAVE_TO_OTHERS_S: Final = 0.001

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
            from counter.serving.tls_connection import TlsConnection

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
        self.slot[STARTS] += 1
        self.slot[PID] = os.getpid()
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
        self.limited_log.warning("failed", "a connection failed: %s", traceback.format_exc())

    def refused(self, reason: str, detail: str) -> None:
        """Counts and logs that a peer was turned away."""
        self.slot[REFUSED + REASONS.index(reason)] += 1
        self.limited_log.warning(reason, "a peer was refused: %s", detail)

    def gave_up_idle(self, connection: Connection) -> None:
        """Ends an idle connection in favour of one that waits."""
        detail = f"{connection.peer()} was idle while others waited for a worker"
        self.refused("idle", detail)
        connection.end("idle", lingers=True)

    def count_connections(self, change: int) -> None:
        """Notes that a connection began (+1) or ended (-1)."""
        self.slot[CONNECTIONS] += change
        if change > 0:
            self.slot[CONNECTIONS_TOTAL] += change

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
        if not self._closing:
            self.slot[WAITING] = waiting_connections(self.socket)
            if self.pool.full():
                self._room.make(now)

    def load_certificates(self) -> None:
        """Takes the certificates that were published last, for connections from now on."""
        from counter.tls.session import server_context

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
    from counter.turn.vector import VectorDecoder

    return VectorDecoder(max_amount)
