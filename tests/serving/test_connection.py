"""A connection over a host in the test's hand, on a real engine: what it decides, how it ends."""

from __future__ import annotations

import _socket
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any

import gevent
import pytest
from gevent.pool import Pool

from counter.processes.slots import REQUESTS, Slots
from counter.serving.additions import Additions, InMemory
from counter.serving.connection import Connection, State
from counter.serving.deadlines import Deadlines
from counter.serving.ending import Ending
from counter.serving.tls_connection import TlsConnection
from counter.serving.workers import Workers
from counter.system.sockets import unread_bytes
from counter.tls.contexts import server_context
from counter.tls.session import Session
from counter.tls.snapshot import Snapshot
from counter.totals.counter import Counter
from counter.totals.memory import MemoryCounter, make_shared_counter
from counter.turn.engine import Engine, Turn
from kit.certificates import kit, trusting
from kit.engine import ENGINES, make_engine
from kit.harness import wait_until
from protocol import Decoder, decode_totals, encode_frame

ONE = encode_frame(1)
RESET = b"\1\0\0\0\0\0\0\0"


class Held(Additions):
    """Keeps what is asked, as while a store is away."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.kept: list[Turn] = []
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
        self.workers: Workers[Connection] = Workers(Pool(workers), loop, 0.05)
        self.frame_deadlines: Deadlines[Connection] = Deadlines(5.0)
        self.write_deadlines: Deadlines[Connection] = Deadlines(5.0)
        self.is_draining = False
        self.connections: dict[int, Connection] = {}
        self.refusals: list[Ending] = []
        self.lingering: list[_socket.socket] = []
        self.failures: list[str] = []

    def note_closed(self, connection: Connection) -> None:
        del self.connections[connection.fd]

    def linger(self, sock: _socket.socket) -> None:
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


class Bench:
    """A host and its connections, each with its peer's end."""

    def __init__(self, name: str) -> None:
        self.host = FakeHost(make_engine(name))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.peers: list[socket.socket] = []
        self.made: list[Connection] = []

    def connect(
        self,
        make: Callable[[FakeHost, _socket.socket], Connection] = Connection,
        is_admitted: bool = True,
    ) -> tuple[socket.socket, Connection]:
        peer = socket.create_connection(self.listener.getsockname(), 10)
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


@pytest.fixture(params=ENGINES)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.param)
    yield bench
    bench.close()


def totals(peer: socket.socket, count: int) -> list[int]:
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
    return bench.host.slot[REQUESTS] == frames


def has_asked(held: Held, frames: int) -> bool:
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


def has_room(connection: Connection) -> bool:
    return bool(select.select([], [connection.sock], [], 0)[1])


def is_gone(connection: Connection) -> bool:
    watch = select.poll()
    watch.register(connection.sock, 0)
    return bool(watch.poll(0))


def test_one_with_a_worker_is_served(bench: Bench) -> None:
    peer, connection = bench.connect()
    assert connection.state is State.SERVED
    peer.sendall(ONE * 3)
    bench.until(lambda: holds(peer, 24), "it is answered")
    assert totals(peer, 3) == [1, 2, 3]


def test_one_without_a_worker_gets_it_when_it_has_something_to_read(bench: Bench) -> None:
    (_, first), (peer, second) = bench.connect(), bench.connect()
    assert (first.state, second.state) == (State.SERVED, State.PARKED)
    peer.sendall(ONE)
    bench.until(lambda: holds(peer, 8), "it is answered")
    assert (first.state, second.state) == (State.PARKED, State.SERVED)


def test_a_peer_that_ends_is_answered_before(bench: Bench) -> None:
    peer, connection = bench.connect()
    peer.sendall(ONE)
    peer.shutdown(socket.SHUT_WR)
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    assert peer.recv(100) == (1).to_bytes(8)
    assert peer.recv(100) == b""
    assert bench.host.lingering == []
    assert bench.host.workers.taken == 0


def test_a_peer_that_reset_is_not_counted_and_the_worker_is_free(bench: Bench) -> None:
    (_, _), (peer, connection) = bench.connect(), bench.connect()
    peer.sendall(ONE)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    peer.close()
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    assert bench.host.counter.total() == 0


@pytest.mark.parametrize("before", [0, 1])
def test_one_that_is_refused_lingers_after_what_came_before_is_answered(
    bench: Bench, before: int
) -> None:
    peer, connection = bench.connect()
    peer.sendall(ONE * before + bytes(16) + ONE)
    bench.until(lambda: bench.host.lingering, "it lingers")
    assert bench.host.refusals == [Ending.CHECKSUM]
    assert connection.state is State.CLOSED
    assert bench.host.counter.total() == before
    assert holds(peer, 8 * before)


def test_the_deadline_of_a_frame_begins_with_its_first_byte_and_ends_with_its_last(
    bench: Bench,
) -> None:
    peer, connection = bench.connect()
    deadlines = bench.host.frame_deadlines
    peer.sendall(ONE[:1])
    bench.until(lambda: deadlines.overdue(float("inf")), "it is waited for")
    assert connection.overdue() == "a frame stopped after 1 bytes"
    peer.sendall(ONE[1:])
    bench.until(lambda: holds(peer, 8), "it is answered")
    assert not deadlines.overdue(float("inf"))


def test_a_last_look_takes_what_has_come_without_a_worker(bench: Bench) -> None:
    (_, _), (peer, connection) = bench.connect(), bench.connect()
    assert connection.state is State.PARKED
    peer.sendall(ONE)
    wait_until(lambda: unread_bytes(connection.sock) == 16, "it has come")
    connection.look()
    bench.host.decide()
    assert totals(peer, 1) == [1]
    assert connection.state is State.PARKED


def test_one_whose_replies_stay_is_not_read_and_holds_no_worker(bench: Bench) -> None:
    peer, connection = bench.connect()
    sent = fill(bench, peer, connection)
    assert connection.state is State.STALLED
    assert bench.host.workers.taken == 0
    peer.sendall(ONE)
    for _ in range(5):
        bench.host.turn()
    assert bench.host.slot[REQUESTS] == sent
    received: list[bytes] = []
    bench.until(lambda: take(peer, received) == 8 * (sent + 1), "everything is answered")
    assert list(decode_totals(b"".join(received))[0]) == list(range(1, sent + 2))
    assert bench.host.workers.taken == 1


def test_one_whose_peer_never_reads_is_dropped_when_it_is_judged(bench: Bench) -> None:
    peer, connection = bench.connect()
    fill(bench, peer, connection)
    assert bench.host.write_deadlines.overdue(float("inf")) == [connection]
    while connection.state is not State.CLOSED:
        connection.judge_unread()
    assert bench.host.refusals == [Ending.NOT_READING]
    assert not bench.host.write_deadlines.overdue(float("inf"))


def test_one_whose_peer_has_read_meanwhile_is_not_dropped_when_it_is_judged(bench: Bench) -> None:
    peer, connection = bench.connect()
    fill(bench, peer, connection)
    received: list[bytes] = []
    wait_until(lambda: bool(take(peer, received)) and has_room(connection), "there is room")
    connection.judge_unread()
    assert bench.host.refusals == []
    assert connection.state is not State.CLOSED


def test_one_that_reset_is_not_refused_when_it_is_judged(bench: Bench) -> None:
    peer, connection = bench.connect()
    fill(bench, peer, connection)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    peer.close()
    wait_until(lambda: is_gone(connection), "the reset has come")
    connection.judge_unread()
    assert connection.state is State.CLOSED
    assert bench.host.refusals == []


def test_the_deadline_of_a_frame_stands_still_while_its_connection_is_not_read(
    bench: Bench,
) -> None:
    peer, connection = bench.connect()
    peer.sendall(ONE[:5])
    deadlines = bench.host.frame_deadlines
    bench.until(lambda: deadlines.overdue(float("inf")), "it is waited for")
    connection.stall()
    assert not deadlines.overdue(float("inf"))
    connection.proceed()
    assert deadlines.overdue(float("inf")) == [connection]
    assert connection.state is State.SERVED


def test_one_that_ends_while_a_store_owes_it_is_answered_first(bench: Bench) -> None:
    held = bench.host.additions = Held(bench.host.engine)
    peer, connection = bench.connect()
    peer.sendall(ONE)
    peer.shutdown(socket.SHUT_WR)
    bench.until(lambda: connection.state is State.ENDING, "its end was seen")
    held.answer()
    bench.host.decide()
    assert connection.state is State.CLOSED
    assert peer.recv(100) == (1).to_bytes(8)


def test_what_a_store_owes_to_one_that_reset_is_void(bench: Bench) -> None:
    held = bench.host.additions = Held(bench.host.engine)
    peer, connection = bench.connect()
    peer.sendall(ONE)
    bench.until(lambda: held.kept, "it is asked for")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    peer.close()
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    assert held.voids == 1
    assert sum(turn.amount for turn in held.kept) == 0


def test_one_that_is_withdrawn_lingers_unanswered(bench: Bench) -> None:
    held = bench.host.additions = Held(bench.host.engine)
    peer, connection = bench.connect()
    peer.sendall(ONE)
    bench.until(lambda: held.kept, "it is asked for")
    connection.withdraw()
    assert bench.host.refusals == [Ending.STORE]
    assert bench.host.lingering
    held.answer()
    assert holds(peer, 0)


def test_one_that_is_owed_very_much_is_not_read_until_it_is_answered(bench: Bench) -> None:
    held = bench.host.additions = Held(bench.host.engine)
    peer, connection = bench.connect()
    sent = 0
    while connection.state is not State.STALLED:
        peer.sendall(ONE * 1024)
        sent += 1024
        bench.until(partial(has_asked, held, sent), "they are asked for")
    assert bench.host.workers.taken == 0
    peer.sendall(ONE)
    bench.host.turn()
    assert sum(turn.frames for turn in held.kept) == sent
    held.answer()
    bench.host.decide()
    assert bench.host.workers.taken == 1
    bench.until(lambda: sum(turn.frames for turn in held.kept) == 1, "it is read again")


@pytest.mark.parametrize("state", [State.SERVED, State.PARKED, State.WAITING])
def test_a_drain_reads_what_is_there_and_no_more_without_a_worker(
    bench: Bench, state: State
) -> None:
    if state is not State.SERVED:
        bench.connect()
    peer, connection = bench.connect()
    peer.sendall(ONE * 2 + ONE[:8])
    wait_until(lambda: unread_bytes(connection.sock) == 40, "it has come")
    connection.state = state
    bench.host.is_draining = True
    connection.drain()
    peer.sendall(ONE[8:])
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    assert totals(peer, 2) == [1, 2]
    assert bench.host.counter.total() == 2
    assert bench.host.lingering


def test_a_drain_ends_one_that_has_nothing_unread_at_once(bench: Bench) -> None:
    peer, connection = bench.connect()
    connection.drain()
    assert connection.state is State.CLOSED
    assert bench.host.lingering
    assert holds(peer, 0)


@pytest.mark.parametrize("frames", [0, 1])
def test_a_drain_ends_one_that_comes_from_the_backlog(bench: Bench, frames: int) -> None:
    peer, connection = bench.connect(is_admitted=False)
    peer.sendall(ONE * frames)
    wait_until(lambda: unread_bytes(connection.sock) == 16 * frames, "it has come")
    bench.host.is_draining = True
    connection.drain()
    bench.until(lambda: bench.host.lingering, "it lingers")
    assert bench.host.counter.total() == frames


def test_a_drain_waits_for_replies_that_stay_and_reads_then(bench: Bench) -> None:
    peer, connection = bench.connect()
    sent = fill(bench, peer, connection)
    peer.sendall(ONE)
    wait_until(lambda: unread_bytes(connection.sock) == 16, "it has come")
    bench.host.is_draining = True
    connection.drain()
    assert connection.state is State.STALLED
    received: list[bytes] = []
    bench.until(lambda: take(peer, received) == 8 * (sent + 1), "everything is answered")
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    assert bench.host.counter.total() == sent + 1


@pytest.mark.parametrize("make_counter", [MemoryCounter, make_shared_counter])
@pytest.mark.parametrize("end", ["a bad frame", "the stream's end", "a drain"])
def test_replies_that_stay_are_not_lost_with_the_end_that_came_with_their_frames(
    bench: Bench, make_counter: Callable[[], Counter], end: str
) -> None:
    host = bench.host
    host.counter = make_counter()
    host.additions = InMemory(host.counter, host.slot, host.engine)
    peer, connection = bench.connect()
    host.engine.hold(connection.fd, True)  # as where the kernel takes nothing more
    peer.sendall(ONE * 2 + (bytes(16) if end == "a bad frame" else b""))
    if end == "the stream's end":
        peer.shutdown(socket.SHUT_WR)
    wait_until(lambda: unread_bytes(connection.sock) >= 32, "it has come")
    if end == "a drain":
        host.is_draining = True
        connection.drain()
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    assert totals(peer, 2) == [1, 2]
    assert bool(host.lingering) == (end != "the stream's end")


def test_an_error_of_the_program_ends_its_connection_alone(bench: Bench) -> None:
    (_, first), (_, second) = bench.connect(), bench.connect()
    first.on_failed(b"Traceback")
    assert bench.host.failures == ["Traceback"]
    assert (first.state, second.state) == (State.CLOSED, State.PARKED)


def test_one_that_the_engine_cannot_take_leaves_nothing_behind(bench: Bench) -> None:
    _, connection = bench.connect(tls, is_admitted=False)
    bench.host.engine.close()  # so that nothing can be watched
    with pytest.raises((OSError, ValueError)):
        bench.host.workers.admit(connection)
    connection.abandon()
    assert connection.state is State.CLOSED
    assert bench.host.workers.taken == 0
    assert not bench.host.connections
    assert not bench.host.frame_deadlines.overdue(float("inf"))


def test_only_one_with_nothing_under_way_is_idle(bench: Bench) -> None:
    peer, connection = bench.connect()
    assert connection.idle_for_s() is not None
    peer.sendall(ONE)
    wait_until(lambda: unread_bytes(connection.sock) == 16, "it has come")
    assert connection.idle_for_s() is None
    bench.host.turn()
    connection.stall()
    assert connection.idle_for_s() is None


def tls(host: FakeHost, sock: _socket.socket) -> Connection:
    certs = kit()
    cert, key = certs.server.cert.read_text(), certs.server.key.read_text()
    context = server_context(Snapshot(cert, key, "", "cert", "key", ""))
    return TlsConnection(host, sock, context, Decoder())


def shaken(bench: Bench) -> tuple[socket.socket, TlsConnection, Session]:
    """A connection under TLS, and its client's session, which is ready."""
    peer, connection = bench.connect(tls)
    client = Session(trusting(), "localhost")
    client.start()
    peer.sendall(client.outgoing())
    while not client.handshaken:
        bench.until(lambda: unread_bytes(peer), "the server's flight is there")
        client.receive(peer.recv(65536))
    assert isinstance(connection, TlsConnection)
    return peer, connection, client


def test_frames_under_tls_are_served_and_drained(bench: Bench) -> None:
    peer, connection, client = shaken(bench)
    peer.sendall(client.outgoing() + client.encrypt(ONE * 2))
    data = b""
    while len(data) < 16:
        bench.until(lambda: unread_bytes(peer), "something came")
        data += client.receive(peer.recv(65536))
    assert list(decode_totals(data)[0]) == [1, 2]
    peer.sendall(client.encrypt(ONE))
    wait_until(lambda: unread_bytes(connection.sock) > 16, "it has come")
    bench.host.is_draining = True
    connection.drain()
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    data = b""
    while not client.ended:
        data += client.receive(peer.recv(65536))
    assert data == (3).to_bytes(8)


def test_one_that_is_gone_in_its_handshake_asks_for_nothing_and_has_no_deadline_left(
    bench: Bench,
) -> None:
    peer, connection, client = shaken(bench)
    connection.sock.shutdown(socket.SHUT_WR)  # its last flight fails, as after a reset
    peer.sendall(client.outgoing() + client.encrypt(encode_frame(5) + ONE[:7]))
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    assert bench.host.counter.total() == 0
    assert not bench.host.frame_deadlines.overdue(float("inf"))


def test_the_deadline_of_a_record_stands_still_while_its_connection_is_not_read(
    bench: Bench,
) -> None:
    peer, connection, client = shaken(bench)
    peer.sendall(client.outgoing())
    bench.until(lambda: connection.session.handshaken, "the handshake is done")
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deadlines, rest = bench.host.frame_deadlines, b""
    while not connection.unsent:  # whatever is sent ends within a record
        frames, record = client.encrypt(ONE * 1000), client.encrypt(ONE)
        peer.sendall(rest + frames + record[:9])
        rest = record[9:]
        bench.until(lambda: not unread_bytes(connection.sock), "it is read")
    assert connection.state is State.STALLED
    assert not deadlines.overdue(float("inf"))
    wire: list[bytes] = []
    bench.until(lambda: take(peer, wire) and not connection.unsent, "its replies are read")
    assert deadlines.overdue(float("inf")) == [connection]
    assert connection.overdue() == "a TLS record stopped"


def test_a_handshake_that_is_none_is_refused_and_lingers(bench: Bench) -> None:
    peer, _ = bench.connect(tls)
    peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
    bench.until(lambda: bench.host.lingering, "it lingers")
    assert bench.host.refusals == [Ending.TLS]


def test_an_ending_without_anybody_to_tell_is_not_replaced() -> None:
    for before, after in product(Ending, Ending):
        if before is not Ending.DRAIN and not before.lingers:
            assert not after.may_follow(before)
        if not after.lingers and before.lingers:
            assert after.may_follow(before)
    assert all(ending.may_follow(None) for ending in Ending)
    assert Ending.CHECKSUM.may_follow(Ending.DRAIN)
    assert not Ending.STORE.may_follow(Ending.CHECKSUM)
