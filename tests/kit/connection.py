"""Connections over a host in the test's hand, on a real engine, whose loop is the test."""

from __future__ import annotations

import _socket
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import gevent
from gevent.pool import Pool

from counter.processes.slots import REQUESTS, Slots
from counter.serving.additions import Additions, InMemory
from counter.serving.connection import Connection, State
from counter.serving.deadlines import Deadlines
from counter.serving.ending import Ending
from counter.serving.sessions import Sessions
from counter.serving.tls_connection import TlsConnection
from counter.serving.workers import Workers
from counter.system.sockets import unread_bytes
from counter.tls.contexts import server_context
from counter.tls.snapshot import Snapshot
from counter.totals.counter import Counter
from counter.totals.memory import MemoryCounter
from counter.turn.engine import Engine, KeptTurn, Turn
from kit.certificates import kit
from kit.engine import make_engine
from kit.harness import PATIENCE_S, wait_until
from protocol import MAX_AMOUNT, Decoder, decode_totals, encode_frame

ONE = encode_frame(1)


class Held(Additions):
    """Keeps what is asked, as while a store is away."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.kept: list[KeptTurn] = []
        self.voids = 0

    def exchange(self) -> None:
        self.engine.each_turn(self.ask)

    def ask(self, turn: Turn) -> None:
        self.kept.append(turn.keep())

    def answer(self) -> None:
        """Answers all of it, from 0."""
        before = 0
        for turn in self.kept:
            turn.answer(before)
            before += turn.amount
        self.kept.clear()

    def commit(self) -> None:
        pass

    def note_void(self) -> None:
        self.voids += 1
        for turn in self.kept:
            turn.purge()

    def sweep(self, now: float) -> None:
        pass

    def close(self) -> None:
        pass


class FakeHost:
    """A server with one worker, whose loop is the test."""

    def __init__(self, engine: Engine, workers: int = 1) -> None:
        self.engine = engine
        self.counter: Counter = MemoryCounter()
        self.slot = Slots(1)[0]
        self.additions: Additions = InMemory(self.counter, self.slot, engine)
        loop: Any = gevent.get_hub().loop
        # A slice that no test sees the end of: whose turn it is, is for test_workers.py.
        self.workers: Workers[Connection] = Workers(Pool(workers), loop, PATIENCE_S)
        self.frame_deadlines: Deadlines[Connection] = Deadlines(5.0)
        self.write_deadlines: Deadlines[Connection] = Deadlines(5.0)
        self.is_draining = False
        self.sessions: Sessions | None = None
        self.connections: dict[int, Connection] = {}
        self.refusals: list[Ending] = []
        self.lingering: list[_socket.socket] = []
        self.failures: list[str] = []

    def note_closed(self, connection: Connection) -> None:
        del self.connections[connection.fd]

    def linger(self, sock: _socket.socket) -> None:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
        self.lingering.append(sock)

    def refused(self, why: Ending, detail: str) -> None:
        self.refusals.append(why)

    def failed(self, detail: str) -> None:
        self.failures.append(detail)

    def explain(self, frame: bytes) -> str:
        return frame.hex()

    def turn(self) -> None:
        """What a server does when its engine is ready."""
        self.additions.exchange()
        self.decide()
        self.workers.look()

    def decide(self) -> None:
        while self.engine.events:
            for kind, fd, data in self.engine.told():
                if fd in self.connections:
                    self.connections[fd].decide(kind, data)


class Busy:
    """Holds a worker and is never silent."""

    def serve(self) -> None:
        pass

    def park(self) -> None:
        raise AssertionError("it is not silent, and its slice is not over")

    def last_read_at(self) -> float:
        return time.monotonic()


class Bench:
    """A host and its connections, each with its peer's end."""

    def __init__(self, name: str, max_amount: int = MAX_AMOUNT) -> None:
        self.host = FakeHost(make_engine(name, max_amount))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.peers: list[socket.socket] = []
        self.made: list[Connection] = []

    def connect(
        self,
        make: Callable[[FakeHost, _socket.socket], Connection] = Connection,
        is_admitted: bool = True,
    ) -> tuple[socket.socket, Connection]:
        peer = socket.create_connection(self.listener.getsockname(), 10)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is sent comes at once
        ours, _ = self.listener.accept()
        # As the server has it: a plain socket, with nothing of Python's around it.
        plain = _socket.socket(ours.family, ours.type, 0, ours.detach())
        plain.setblocking(False)
        connection = make(self.host, plain)
        self.host.connections[connection.fd] = connection
        if is_admitted:
            self.host.workers.admit(connection)
        self.peers.append(peer)
        self.made.append(connection)
        return peer, connection

    def occupy(self) -> Any:
        """Takes the one worker for as long as the test does not let it leave."""
        busy: Any = Busy()
        self.host.workers.admit(busy)
        return busy

    def until(self, condition: Callable[[], object], what: str) -> None:
        def has_come() -> bool:
            select.select([self.host.engine.fileno()], [], [], 0.01)
            self.host.turn()
            return bool(condition())

        wait_until(has_come, what)

    def close(self) -> None:
        for connection in self.made:
            if connection.state is not State.CLOSED:
                connection.cut(Ending.CUT)
        for sock in (*self.peers, *self.host.lingering):
            with suppress(OSError):
                sock.close()
        self.host.workers.close()
        self.host.engine.close()
        self.listener.close()


def totals(peer: socket.socket, count: int) -> list[int]:
    """So many totals that a peer receives."""
    data = b""
    while len(data) < 8 * count:
        more = peer.recv(65536)
        assert more, "the stream ended"
        data += more
    return list(decode_totals(data)[0])


def holds(peer: socket.socket, size: int) -> bool:
    """Whether a peer's socket has that many bytes unread."""
    return unread_bytes(peer) == size


def has_counted(bench: Bench, frames: int) -> bool:
    """Whether so many frames are counted, and no more."""
    return bench.host.slot[REQUESTS] == frames


def has_asked(held: Held, frames: int) -> bool:
    """Whether so many frames wait, and no more."""
    return sum(turn.frames for turn in held.kept) == frames


def fill(bench: Bench, peer: socket.socket, connection: Connection) -> int:
    """Has a peer send without reading until its replies stay; gives back how many frames."""
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sent = 0
    while not connection.unsent:
        peer.sendall(ONE * 1000)
        sent += 1000
        bench.until(partial(has_counted, bench, sent), "they are counted")
    return sent


def take(peer: socket.socket, received: list[bytes]) -> int:
    """Takes what a peer has unread; gives back how much that is with what it received before."""
    peer.setblocking(False)
    with suppress(BlockingIOError):
        while more := peer.recv(65536):
            received.append(more)
    return sum(map(len, received))


def state_of(connection: Connection) -> State:
    """The state as it is now, which mypy takes for what it was when it was looked at last."""
    return connection.state


def has_room(connection: Connection) -> bool:
    """Whether the kernel takes more replies."""
    return bool(select.select([], [connection.sock], [], 0)[1])


def is_gone(connection: Connection) -> bool:
    """Whether a reset has come."""
    watch = select.poll()
    watch.register(connection.sock, 0)
    return bool(watch.poll(0))


def tls(host: FakeHost, sock: _socket.socket) -> Connection:
    """A connection under TLS with the kit's certificate."""
    certs = kit()
    cert, key = certs.server.cert.read_text(), certs.server.key.read_text()
    context = server_context(Snapshot(cert, key, "", "cert", "key", ""))
    return TlsConnection(host, sock, context, Decoder())
