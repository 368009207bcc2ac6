"""One serving process: accepting, workers, deadlines, drain.

CounterServer is a StreamServer on plain sockets whose Pool holds one Connection for each worker
that is taken. What happens on a connection is connection.py's; what the processes of a server are
to each other is the master's (processes/master.py).
"""

from __future__ import annotations

import _socket
import logging
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import gevent
from gevent.event import Event
from gevent.pool import Pool
from gevent.server import StreamServer

from counter.options.server import ServerSettings
from counter.options.values import Seconds
from counter.processes.slots import (
    BACKLOG,
    CONNECTIONS,
    CONNECTIONS_TOTAL,
    LOSSES,
    MOST_CONNECTIONS,
    PID,
    REASONS,
    REFUSED,
    STARTS,
    WORKERS,
    WORKERS_TAKEN,
    Slots,
)
from counter.serving.additions import Additions, Asker, Turn
from counter.serving.connection import Connection
from counter.serving.deadlines import FrameDeadlines
from counter.serving.ending import Ending
from counter.serving.group_commit import GroupCommit
from counter.serving.idle import Room
from counter.serving.linger import Lingering
from counter.serving.outage import Outage
from counter.system.accepting import PausingServer
from counter.system.log import LimitedLog
from counter.system.sockets import waiting_connections
from counter.tls.certificates import Certificates
from counter.tls.snapshot import CertificateError
from counter.totals.counter import Counter
from counter.totals.store import Store
from protocol import Batch, Decoder

if TYPE_CHECKING:
    import ssl  # which the master must not load before it forks

# Deadlines are found overdue this late at most; short deadlines are swept more often.
SWEEP_S: Final = 0.25

# A sweep that comes so much later than it should says that this process was stopped meanwhile.
STOPPED_S: Final = 0.5

# Between attempts to take certificates that are known to be good.
RELOAD_RETRY_S: Final = 0.5

# What a process that is ahead of others in connections leaves a new one to them for: long enough
# for an idle process to wake, short beside what a connection costs its peer anyway.
LEAVE_TO_OTHERS_S: Final = 0.001

_log = logging.getLogger("server")


class CounterServer(PausingServer, StreamServer):
    """Serves one Counter on one listening socket, to as many connections as it has workers.

    `listener` is a socket from listen(). start() serves, drain() ends: it
    answers what has arrived, within a deadline. Use it where gevent's hub runs.

    It is the Host of its connections, and the Crowd in which room is made.
    """

    # gevent's stubs leave out what a server on plain sockets and bare watchers needs of them.
    hub: Any
    loop: Any
    pool: Any
    socket: Any

    ask: Callable[[Asker, int, Batch | None], None]
    commit: Callable[[], None]
    decode: Callable[[bytes], tuple[Batch, bytes]]

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
        self.slots = Slots(1) if slots is None else slots
        self.index = index
        self.slot = self.slots[index]
        self.limited_log = LimitedLog(_log)
        decoder = make_decoder(settings.max_increment)
        self.table, self.decode = decoder.table, decoder.decode
        self.additions: Additions = (
            self._make_group(counter, settings)
            if isinstance(counter, Store)
            else Turn(counter, self.slot)
        )
        self.ask, self.commit = self.additions.ask, self.additions.commit
        self.write_timeout_s = settings.write_timeout_s
        self.deadlines: FrameDeadlines[Connection] = FrameDeadlines(settings.frame_timeout_s)
        self._lingering = Lingering(self.hub.loop)
        self._room = Room(self, len(self.slots), settings.idle_timeout_s)
        self._certificates = certificates
        self._tls_context: ssl.SSLContext | None = None
        if certificates:
            self.load_certificates()
        self._is_draining = False
        self._has_left_it = False  # what waits to be accepted was left to the others once
        if len(self.slots) > 1:
            self.max_accept = 1  # a burst is spread over the processes, not taken by the first
        super().__init__(listener, spawn=Pool(workers))
        self._sweep_s = max(0.01, min(SWEEP_S, settings.frame_timeout_s / 4))
        self._sweeper = self.loop.timer(self._sweep_s, self._sweep_s)
        self._swept_at = time.monotonic()
        self._has_slept = False
        self._before_waiting = self.loop.prepare()

    def start(self) -> None:
        """Starts to serve; gives back at once."""
        super().start()
        self._sweeper.start(self._sweep)
        self._before_waiting.start(self.commit)
        self.slot[STARTS] += 1
        self.slot[PID] = os.getpid()
        self.slot[WORKERS] = self.slot[MOST_CONNECTIONS] = self.pool.size

    def do_read(self) -> tuple[_socket.socket, Any] | None:  # type: ignore[override]
        """Accepts one connection as a plain non-blocking socket, or gives back None."""
        return self.accept_or_pause(self._accept, self._warn_of_lack)

    def _accept(self) -> tuple[_socket.socket, Any] | None:
        while True:
            try:
                fd, address = self.socket._accept()
            except BlockingIOError:
                return None
            except ConnectionAbortedError:
                continue
            sock = _socket.socket(self.family, socket.SOCK_STREAM, 0, fd)
            sock.setblocking(False)
            return sock, address

    def _warn_of_lack(self, error: OSError) -> None:
        self.limited_log.warning("accept", "cannot accept connections: %s", error.strerror)

    def _do_read(self) -> None:
        """Accepts what waits; leaves it to the other processes first if this one is ahead of them.

        The kernel wakes whichever process waits, mostly the same one. One that has clearly more
        connections than another with a free worker therefore waits a moment, once, before it
        accepts: the others take the connection meanwhile, or it does after all.
        """
        if not self._has_left_it and self._is_ahead():
            self._has_left_it = True
            self.pause_accepting(LEAVE_TO_OTHERS_S)
        else:
            self._has_left_it = False
            super()._do_read()  # type: ignore[misc]  # gevent's stubs leave it out

    def _is_ahead(self) -> bool:
        fewest = self.slots.fewest_connections(but=self.index)
        return fewest is not None and self.slot[CONNECTIONS] > fewest + max(4, fewest // 4)

    def do_handle(self, *accepted: Any) -> None:
        """Hands an accepted connection to handle(), without starting a greenlet for it."""
        self.handle(*accepted)

    def handle(self, sock: _socket.socket, _address: Any) -> None:
        """Gives a connection a worker; the base class accepts only while the Pool has one."""
        self.pool.add(self._make_connection(sock))
        self._room.note_arrival()

    def _make_connection(self, sock: _socket.socket) -> Connection:
        if self._tls_context is None:
            return Connection(self, sock)
        # Here, so that a server without TLS loads nothing of it.
        from counter.serving.tls_connection import TlsConnection

        return TlsConnection(self, sock, self._tls_context)

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

        return GroupCommit(store, self.slot, timeout_s, outage, note_loss)

    def failed(self) -> None:
        """Logs the error that is being handled: a connection ends of it, the others do not."""
        self.limited_log.warning("failed", "a connection failed: %s", traceback.format_exc())

    def refused(self, why: Ending, detail: str) -> None:
        """Counts and logs that a peer was turned away."""
        self.slot[REFUSED + REASONS.index(why.value)] += 1
        self.limited_log.warning(why.value, "a peer was refused: %s", detail)

    def note_opened(self) -> None:
        """Notes that a connection has begun."""
        self.slot[CONNECTIONS] += 1
        self.slot[WORKERS_TAKEN] += 1
        self.slot[CONNECTIONS_TOTAL] += 1

    def note_closed(self) -> None:
        """Notes that a connection has ended."""
        self.slot[CONNECTIONS] -= 1
        self.slot[WORKERS_TAKEN] -= 1

    def free_worker(self, connection: Connection) -> None:
        """Takes the worker back of a connection whose greenlet never ran."""
        self.pool.discard(connection)

    def linger(self, sock: _socket.socket) -> None:
        """Sends FIN, and closes the socket when its peer is quiet."""
        self._lingering.add(sock)

    def count_waiting(self) -> int:
        """Connections in the backlog; none that another process has a free worker for."""
        if self.slots.fewest_connections(but=self.index) is not None:
            return 0
        return waiting_connections(self.socket)

    def holders(self) -> Iterable[Connection]:
        """The connections that hold the workers of this process."""
        connections: Iterable[Connection] = self.pool
        return connections

    def warn_full(self, waiting: int) -> None:
        """Says, for all processes if it is the first of them, that so many wait for a worker."""
        first = next(i for i in range(len(self.slots)) if self.slots[i][WORKERS])
        if self.index == first:
            self.limited_log.warning(
                "full",
                "all %d workers are taken and %s; raise --multiplier to serve more at once",
                self.slots.sum(WORKERS),
                "1 connection waits" if waiting == 1 else f"{waiting} connections wait",
            )

    def end_idle(self, connection: Connection) -> None:
        """Ends an idle connection in favour of one that waits."""
        detail = f"{connection.peer()} was idle while others waited for a worker"
        self.refused(Ending.IDLE, detail)
        connection.end(Ending.IDLE)

    def _sweep(self) -> None:
        """Keeps the deadlines of all connections; runs in the loop."""
        now = time.monotonic()
        if self._was_stopped(now):
            self._sweeper.again(self._sweep)  # the timer would make up for it at once
            return
        for connection in self.deadlines.overdue(now):
            connection.look()
        for connection in self.deadlines.overdue(now):
            self.refused(Ending.INCOMPLETE, f"{connection.peer()}: {connection.overdue()}")
            connection.end(Ending.INCOMPLETE)
        self._lingering.sweep(now)
        self.additions.sweep(now)
        if not self._is_draining:
            self.slot[BACKLOG] = waiting_connections(self.socket)
            if self.pool.full():
                self._room.make(now)

    def _was_stopped(self, now: float) -> bool:
        """Whether this process stood still (docker pause, SIGSTOP, a suspended machine).

        What its deadlines wait for may be in the sockets, and is taken before the next sweep. That
        one judges, however late it is: a loop that is always late has its deadlines too.
        """
        is_late = now - self._swept_at > self._sweep_s + STOPPED_S
        self._swept_at = now
        self._has_slept = is_late and not self._has_slept
        return self._has_slept

    def load_certificates(self) -> None:
        """Takes the certificates that were published last, for connections from now on."""
        from counter.tls.contexts import server_context

        assert self._certificates is not None
        self._tls_context = server_context(self._certificates.snapshot())

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
        self.slot[WORKERS] = self.slot[MOST_CONNECTIONS] = 0
        connections = [*self.pool, *self._accept_backlog()]
        for connection in connections:
            connection.drain()
        self.close()
        self._is_draining = True
        ending = gevent.spawn(self._join, connections)
        either: list[Any] = [ending, cut]
        deadline = time.monotonic() + timeout_s
        gevent.wait(either, timeout=timeout_s, count=1)
        if time.monotonic() - deadline > STOPPED_S:
            gevent.wait(either, timeout=STOPPED_S, count=1)  # as with a sweep
        ending.kill()
        gevent.killall(connections)
        self._lingering.close()
        self.additions.close()
        self._sweeper.close()
        self._before_waiting.close()
        self.limited_log.flush()

    def _join(self, connections: Sequence[Connection]) -> None:
        gevent.joinall(connections)
        self._lingering.join()

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
            yield self._make_connection(accepted[0])


def make_decoder(max_amount: int) -> Decoder:
    """This process's decoder. It imports NumPy, which no process may that is still to fork."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from counter.turn.vector import VectorDecoder

    return VectorDecoder(max_amount)
