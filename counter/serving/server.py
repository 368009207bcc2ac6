"""One serving process: accepting, its connections and workers, deadlines, drain.

CounterServer is a StreamServer on plain sockets whose Pool holds those Connections that have a
worker. One watcher of the loop stands for all of them: it has the engine take and answer what is
ready (counter/turn), and what is to be decided is a connection's (connection.py). What the
processes of a server are to each other is the master's (processes/master.py).
"""

from __future__ import annotations

import _socket
import logging
import os
import time
import traceback
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import gevent
from gevent.event import Event
from gevent.pool import Pool

from counter.options.server import DEFAULT_CONNECTIONS, ServerSettings
from counter.options.values import Seconds
from counter.processes.bells import Bells
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
    WAITING,
    WAITING_SINCE_MS,
    WORKERS,
    WORKERS_TAKEN,
    Slots,
    to_ms,
)
from counter.serving.additions import Additions, InMemory
from counter.serving.connection import Connection
from counter.serving.deadlines import Deadlines
from counter.serving.ending import Ending
from counter.serving.group_commit import GroupCommit
from counter.serving.idle import Room
from counter.serving.linger import Lingering
from counter.serving.outage import Outage
from counter.serving.sessions import MemorySessions, Sessions
from counter.serving.spreading import SpreadingServer
from counter.serving.stored_sessions import StoredSessions
from counter.serving.workers import Workers
from counter.system.accepting import ACCEPT_PAUSE_S
from counter.system.libev import READ
from counter.system.log import LimitedLog
from counter.system.sockets import waiting_connections
from counter.tls.certificates import Certificates
from counter.tls.snapshot import CertificateError
from counter.totals.counter import Counter
from counter.totals.ledger import Ledger, SharedLedger
from counter.totals.memory import AtomicCounter
from counter.totals.session_store import SessionStore
from counter.totals.store import Store
from counter.turn.engines import make_decoder, make_engine
from counter.turn.library import choose
from protocol import BadFrame

if TYPE_CHECKING:
    import ssl  # which the master must not load before it forks

# Deadlines are found overdue this late at most; short deadlines are swept more often.
SWEEP_S: Final = 0.25

# A sweep that comes so much later than it should says that this process was stopped meanwhile.
STOPPED_S: Final = 0.5

# Between attempts to take certificates that are known to be good.
RELOAD_RETRY_S: Final = 0.5

_log = logging.getLogger("server")


class CounterServer(SpreadingServer):
    """Serves one Counter on one listening socket: `workers` connections at once, which take turns
    where more are open, and `most_connections` are at most.

    `listener` is a socket from listen(). start() serves, drain() ends: it answers what has arrived,
    within a deadline. Use it where gevent's hub runs.

    It is the Host of its connections, and the Crowd in which room is made and commits are answered.
    """

    # gevent's stubs leave out what a server on plain sockets and bare watchers needs of them.
    hub: Any
    loop: Any

    def __init__(
        self,
        listener: Any,
        counter: Counter,
        workers: int,
        settings: ServerSettings,
        slots: Slots | None = None,
        index: int = 0,
        certificates: Certificates | None = None,
        most_connections: int = DEFAULT_CONNECTIONS,
        ledger: Ledger | None = None,
        bells: Bells | None = None,
    ) -> None:
        self.hub = gevent.get_hub()
        super().__init__(listener, Pool(workers), Slots(1) if slots is None else slots, index)
        self.slot = self.slots[index]
        self.limited_log = LimitedLog(_log)
        name, _ = choose(settings.engine)
        self._decoder = make_decoder(settings.max_increment, name == "plain" or bool(certificates))
        self.engine = make_engine(name, self._decoder)
        self.sessions: Sessions | None = None
        self.additions = self._make_additions(counter, settings, ledger, bells)
        self.connections: dict[int, Connection] = {}  # by descriptor
        self.most_connections = most_connections
        self.frame_deadlines: Deadlines[Connection] = Deadlines(settings.frame_timeout_s)
        self.write_deadlines: Deadlines[Connection] = Deadlines(settings.write_timeout_s)
        self._lingering = Lingering(self.hub.loop)
        self._room = Room(self, len(self.slots), settings.idle_timeout_s)
        self._certificates = certificates
        self._tls_context: ssl.SSLContext | None = None
        if certificates:
            self.load_certificates()
        self.is_draining = False
        self._all_closed = Event()
        self.workers: Workers[Connection] = Workers(self.pool, self.loop, settings.slice_s)
        shortest_s = min(settings.frame_timeout_s, settings.write_timeout_s)
        self._sweep_s = max(0.01, min(SWEEP_S, shortest_s / 4))
        self._sweeper = self.loop.timer(self._sweep_s, self._sweep_s)
        self._swept_at = time.monotonic()
        self._has_slept = False
        self._turns = self.loop.io(self.engine.fileno(), READ)

    def start(self) -> None:
        """Starts to serve; gives back at once."""
        super().start()
        self._sweeper.start(self._sweep)
        self._turns.start(self._on_ready)
        self.slot[STARTS] += 1
        self.slot[PID] = os.getpid()
        self.slot[WORKERS] = self.pool.size
        self.slot[MOST_CONNECTIONS] = self.most_connections

    def _on_ready(self) -> None:
        """Serves all connections that are ready; runs in the loop and never waits."""
        # gevent stops a watcher whose callback raises: all connections would hang for ever.
        try:
            self.additions.exchange()
            self.decide_events()
            self.additions.commit()
            if self.workers.waiting:
                self.workers.look()
        except Exception:
            self.failed(traceback.format_exc())

    def decide_events(self) -> None:
        """Has each connection act on what the engine has to tell of it."""
        engine = self.engine
        while engine.events:
            for kind, fd, data in engine.told():
                connection = self.connections.get(fd)
                if connection is None:
                    continue
                try:
                    connection.decide(kind, data)
                except Exception:
                    self.failed(traceback.format_exc())
                    connection.cut(Ending.FAILED)

    def is_crowded(self) -> bool:
        """Whether as many connections are open as may be."""
        return len(self.connections) >= self.most_connections

    def warn_of_lack(self, error: OSError) -> None:
        self.limited_log.warning("accept", "cannot accept connections: %s", error.strerror)

    def handle(self, sock: _socket.socket, _address: Any) -> None:
        """Takes a connection in, with a worker if one is free."""
        connection = self._take_in(sock)
        try:
            self.workers.admit(connection)
        except OSError as error:
            self._abandon(connection, error)
            self.pause_accepting(ACCEPT_PAUSE_S)
        self._room.note_arrival()

    def _abandon(self, connection: Connection, error: OSError) -> None:
        """Ends a connection that the machine lacks for."""
        self.warn_of_lack(error)
        connection.abandon()

    def _take_in(self, sock: _socket.socket) -> Connection:
        connection = self._make_connection(sock)
        self.connections[connection.fd] = connection
        self.slot[CONNECTIONS] += 1
        self.slot[CONNECTIONS_TOTAL] += 1
        return connection

    def _make_connection(self, sock: _socket.socket) -> Connection:
        if self._tls_context is None:
            return Connection(self, sock)
        # Here, so that a server without TLS loads nothing of it.
        from counter.serving.tls_connection import TlsConnection

        return TlsConnection(self, sock, self._tls_context, self._decoder)

    def _make_additions(
        self, counter: Counter, settings: ServerSettings, ledger: Ledger | None, bells: Bells | None
    ) -> Additions:
        """What adds, and the sessions that hang on it where `ledger` keeps any."""
        if isinstance(counter, Store):
            return self._make_group(counter, settings)
        if ledger is None or bells is None:
            return InMemory(counter, self.slot, self.engine)
        if isinstance(ledger, SharedLedger) and isinstance(counter, AtomicCounter):
            words = ledger.memory, ledger.before_at(self.index), ledger.notes_at, ledger.places
            if tagged_add := self.engine.tagged_add(counter.address, *words):
                ledger.use(tagged_add)
        limit = settings.max_increment
        sessions = MemorySessions(ledger, self.index, bells, limit, self.slot, self.hub.loop)
        self.sessions = sessions
        return InMemory(counter, self.slot, self.engine, sessions.add)

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

        engine, slot = self.engine, self.slot
        sessions = None
        if isinstance(store, SessionStore) and settings.sessions:
            store.keep_sessions(settings.sessions)
            sessions = self.sessions = StoredSessions(settings.max_increment, slot, timeout_s)
        return GroupCommit(store, slot, engine, self, timeout_s, outage, note_loss, sessions)

    def failed(self, detail: str) -> None:
        """Logs an error of the program's own: a connection ends of it, the others do not."""
        self.limited_log.warning("failed", "a connection failed: %s", detail)

    def explain(self, frame: bytes) -> str:
        """Why a frame is refused, in words."""
        try:
            self._decoder.verify(frame)
        except BadFrame as bad:
            return str(bad)
        raise AssertionError(f"frame {frame.hex()} was refused and is accepted the second time")

    def refused(self, why: Ending, detail: str) -> None:
        """Counts and logs that a peer was turned away."""
        self.slot[REFUSED + REASONS.index(why.value)] += 1
        self.limited_log.warning(why.value, "a peer was refused: %s", detail)

    def note_closed(self, connection: Connection) -> None:
        """A connection has ended: its descriptor is another's next."""
        del self.connections[connection.fd]
        self.slot[CONNECTIONS] -= 1
        if self.is_draining:
            if not self.connections:
                self._all_closed.set()
        elif len(self.connections) == self.most_connections - 1:
            self.start_accepting()

    def withdraw(self, fd: int) -> None:
        """Ends a connection without an answer to what waits for the store."""
        if fd in self.connections:
            self.connections[fd].withdraw()

    def linger(self, sock: _socket.socket) -> None:
        """Sends FIN, and closes the socket when its peer is quiet."""
        self._lingering.add(sock)

    def count_backlog(self) -> int:
        """Connections in the backlog; none that another process has room for."""
        if self.slots.fewest_connections(but=self.index) is not None:
            return 0
        return waiting_connections(self.socket)

    def open_connections(self) -> Iterable[Connection]:
        """The connections of this process."""
        return self.connections.values()

    def warn_crowded(self, waiting: int) -> None:
        """Says, for all processes if it is the first of them, that so many wait in the backlog."""
        if self._speaks_for_all():
            self.limited_log.warning(
                "crowded",
                "all %d connections are open and %s in the backlog; raise --maxConnections",
                self.slots.sum(MOST_CONNECTIONS),
                "1 waits" if waiting == 1 else f"{waiting} wait",
            )

    def _warn_full(self) -> None:
        waiting = self.slots.sum(WAITING)
        if self._speaks_for_all():
            self.limited_log.warning(
                "full",
                "all %d workers are taken and %s, taking turns; "
                "raise --multiplier to serve more at once",
                self.slots.sum(WORKERS),
                "1 connection waits" if waiting == 1 else f"{waiting} connections wait",
            )

    def _speaks_for_all(self) -> bool:
        return self.index == next(i for i in range(len(self.slots)) if self.slots[i][WORKERS])

    def end_idle(self, connection: Connection) -> None:
        """Ends an idle connection in favour of one that waits."""
        connection.refuse(Ending.IDLE, "was idle while others waited for a connection")

    def _sweep(self) -> None:
        """Keeps the deadlines of all connections; runs in the loop."""
        now = time.monotonic()
        if self._was_stopped(now):
            self._sweeper.again(self._sweep)  # the timer would make up for it at once
            return
        try:
            self._judge(now)
        except Exception:
            self.failed(traceback.format_exc())
        self._lingering.sweep(now)
        self.additions.sweep(now)
        if self.sessions is not None:
            self.sessions.sweep(now)
        self._note_gauges()
        if self.workers.waiting:
            self._warn_full()
        if not self.is_draining:
            self.slot[BACKLOG] = waiting_connections(self.socket)
            if self.is_crowded():
                self._room.make(now)

    def _judge(self, now: float) -> None:
        """Ends the connections whose deadlines are over, after a look for what they wait for."""
        for connection in self.frame_deadlines.overdue(now):
            connection.look()
        self.decide_events()
        for connection in self.frame_deadlines.overdue(now):
            connection.refuse(Ending.INCOMPLETE, connection.overdue())
        for connection in self.write_deadlines.overdue(now):
            connection.judge_unread()
        self.additions.commit()

    def _note_gauges(self) -> None:
        workers, slot = self.workers, self.slot
        slot[WORKERS_TAKEN] = workers.taken
        slot[WAITING] = workers.waiting
        since = workers.waiting_since
        slot[WAITING_SINCE_MS] = 0 if since is None else to_ms(since)

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
        self.is_draining = True
        self.slot[WORKERS] = self.slot[MOST_CONNECTIONS] = 0
        self._accept_backlog()
        for connection in list(self.connections.values()):
            try:
                connection.drain()
            except OSError as error:
                self._abandon(connection, error)
        self.decide_events()
        self.close()
        ending = gevent.spawn(self._join)
        either: list[Any] = [ending, cut]
        deadline = time.monotonic() + timeout_s
        gevent.wait(either, timeout=timeout_s, count=1)
        if time.monotonic() - deadline > STOPPED_S:
            gevent.wait(either, timeout=STOPPED_S, count=1)  # as with a sweep
        ending.kill()
        for connection in list(self.connections.values()):
            connection.cut(Ending.CUT)
        self._lingering.close()
        self.additions.close()
        if self.sessions is not None:
            self.sessions.close()
        self.workers.close()
        self._sweeper.close()
        self._turns.close()
        self.engine.close()
        self.limited_log.flush()

    def _join(self) -> None:
        if self.connections:
            self._all_closed.wait()
        self._lingering.join()

    def _accept_backlog(self) -> None:
        """Takes in every connection that waits; a failure to accept ends it."""
        try:
            for sock in self.accept_all():
                self._take_in(sock)
        except OSError as error:
            _log.warning("cannot accept what waits in the backlog: %s", error.strerror)
