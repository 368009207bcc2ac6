"""A connection over a host in the test's hand: what it asks of it, and how it ends."""

from __future__ import annotations

import _socket
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from typing import Any

import gevent
import pytest
from gevent.pool import Pool

from counter.serving.additions import Asker
from counter.serving.connection import Connection
from counter.serving.deadlines import FrameDeadlines
from counter.serving.ending import Ending
from counter.serving.tls_connection import TlsConnection
from counter.system.sockets import unread_bytes
from counter.tls.contexts import server_context
from counter.tls.session import Session
from counter.tls.snapshot import Snapshot
from kit.certificates import kit, trusting
from kit.harness import wait_until
from protocol import MAX_UNREAD_FRAMES, Batch, Decoder, encode_frame


class FakeHost:
    """Keeps what a connection asks of it."""

    def __init__(self) -> None:
        decoder = Decoder()
        self.hub: Any = gevent.get_hub()
        self.loop: Any = self.hub.loop
        self.table = decoder.table
        self.decode: Callable[[bytes], tuple[Batch, bytes]] = decoder.decode
        self.ask: Callable[[Asker, int, Batch | None], None] = self.note_asked
        self.commit: Callable[[], None] = lambda: None
        self.deadlines: FrameDeadlines[Connection] = FrameDeadlines(5.0)
        self.write_timeout_s = 5.0
        self.open = 0
        self.asked: list[int] = []
        self.refusals: list[Ending] = []
        self.lingering: list[_socket.socket] = []
        self.freed: list[Connection] = []

    def note_asked(self, _: Asker, amount: int, __: Batch | None) -> None:
        self.asked.append(amount)

    def note_opened(self) -> None:
        self.open += 1

    def note_closed(self) -> None:
        self.open -= 1

    def free_worker(self, connection: Connection) -> None:
        self.freed.append(connection)

    def linger(self, sock: _socket.socket) -> None:
        self.lingering.append(sock)

    def refused(self, why: Ending, detail: str) -> None:
        self.refusals.append(why)

    def failed(self) -> None:
        raise


class Bench:
    """A connection, and its peer's end."""

    def __init__(self, make: Callable[[FakeHost, _socket.socket], Connection] = Connection) -> None:
        self.host = FakeHost()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.peer = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
        # As the server has it: a plain socket, with nothing of Python's around it.
        plain = _socket.socket(ours.family, ours.type, 0, ours.detach())
        plain.setblocking(False)
        self.connection = make(self.host, plain)
        self.pool = Pool(1)
        self.pool.add(self.connection)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        def has_come() -> bool:
            gevent.sleep(0)
            return condition()

        wait_until(has_come, what)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.peer.close()
    for sock in bench.host.lingering:
        with suppress(OSError):
            sock.close()


def test_one_that_is_owed_very_much_is_not_read(bench: Bench) -> None:
    connection = bench.connection
    connection.owe(MAX_UNREAD_FRAMES - 1)
    assert connection.watcher.active
    connection.owe(1)
    assert not connection.watcher.active
    bench.peer.sendall(encode_frame(7))
    for _ in range(20):
        gevent.sleep(0)
    assert bench.host.asked == []
    connection.answered(MAX_UNREAD_FRAMES)
    bench.until(lambda: bench.host.asked == [7], "it is read again")
    bench.peer.close()
    bench.until(lambda: not bench.host.open, "it has ended")


def test_a_peer_that_ends_between_frames_needs_no_greenlet(bench: Bench) -> None:
    bench.peer.close()
    bench.until(lambda: bench.host.freed == [bench.connection], "its worker is free")
    assert not bench.host.open
    assert not bench.host.lingering


def test_one_that_is_refused_lingers_after_what_came_before_was_asked_for(bench: Bench) -> None:
    bench.peer.sendall(encode_frame(5) + bytes(16) + encode_frame(6))
    bench.until(lambda: bool(bench.host.lingering), "it lingers")
    assert bench.host.asked == [5]
    assert bench.host.refusals == [Ending.CHECKSUM]


def test_the_deadline_of_a_frame_begins_with_its_first_byte_and_ends_with_its_last(
    bench: Bench,
) -> None:
    frame, deadlines = encode_frame(3), bench.host.deadlines
    bench.peer.sendall(frame[:1])
    bench.until(lambda: bool(deadlines.overdue(float("inf"))), "it is waited for")
    bench.peer.sendall(frame[1:])
    bench.until(lambda: bench.host.asked == [3], "it is whole")
    assert not deadlines.overdue(float("inf"))
    bench.peer.close()
    bench.until(lambda: not bench.host.open, "it has ended")


def test_one_that_ends_as_it_is_answered_has_no_deadline_left(bench: Bench) -> None:
    """A full turn is answered while the connection that filled it is still being read."""
    connection, host = bench.connection, bench.host

    def answer(_: Asker, __: int, ___: Batch | None) -> None:
        connection.sock.shutdown(socket.SHUT_WR)  # what is sent then fails, as after a reset
        connection.send(bytes(8))

    host.ask = answer
    bench.peer.sendall(encode_frame(5) + encode_frame(6)[:7])
    bench.until(lambda: host.freed == [connection], "it has ended")
    assert not host.deadlines.overdue(float("inf"))


def test_one_that_is_gone_in_its_handshake_asks_for_nothing_and_has_no_deadline_left() -> None:
    certs = kit()
    snapshot = Snapshot(
        certs.server.cert.read_text(), certs.server.key.read_text(), "", "cert", "key", ""
    )
    context = server_context(snapshot)
    bench = Bench(lambda host, sock: TlsConnection(host, sock, context))
    client = Session(trusting(), "localhost")
    client.start()
    bench.peer.sendall(client.outgoing())
    while not client.handshaken:
        bench.until(lambda: bool(unread_bytes(bench.peer)), "the server's flight is there")
        client.receive(bench.peer.recv(65536))
    bench.connection.sock.shutdown(socket.SHUT_WR)  # its last flight fails, as after a reset
    frames = client.encrypt(encode_frame(5) + encode_frame(6)[:7])
    bench.peer.sendall(frames)
    bench.until(lambda: not bench.host.open, "it has ended")
    assert bench.host.asked == []
    assert not bench.host.deadlines.overdue(float("inf"))
    bench.peer.close()


def test_a_withdrawn_one_is_owed_nothing_and_lingers(bench: Bench) -> None:
    bench.connection.owe(3)
    bench.connection.withdraw()
    assert bench.connection.owed == 0
    bench.until(lambda: bool(bench.host.lingering), "it lingers")


def test_an_ending_without_anybody_to_tell_is_not_replaced() -> None:
    for before, after in product(Ending, Ending):
        if before is not Ending.DRAIN and not before.lingers:
            assert not after.may_follow(before)
        if not after.lingers and before.lingers:
            assert after.may_follow(before)
    assert all(ending.may_follow(None) for ending in Ending)
    assert Ending.CHECKSUM.may_follow(Ending.DRAIN)
    assert not Ending.STORE.may_follow(Ending.CHECKSUM)
