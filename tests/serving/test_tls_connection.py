"""What a connection under TLS decides, and how it ends."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from functools import partial

import pytest

from counter.serving.connection import State
from counter.serving.ending import Ending
from counter.serving.tls_connection import TlsConnection
from counter.system.sockets import close_with_reset, unread_bytes
from counter.tls.session import Session, TlsError
from kit.certificates import trusting
from kit.connection import (
    ONE,
    Bench,
    Held,
    has_asked,
    take,
    tls,
)
from kit.engine import ENGINES
from kit.harness import wait_until
from protocol import decode_totals, encode_frame


@pytest.fixture(params=ENGINES)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.param)
    yield bench
    bench.close()


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


def served(bench: Bench) -> tuple[socket.socket, TlsConnection, Session]:
    """The same, and the server's end is ready too."""
    peer, connection, client = shaken(bench)
    peer.sendall(client.outgoing())
    bench.until(lambda: connection.session.handshaken, "the handshake is done")
    return peer, connection, client


def decrypted(bench: Bench, peer: socket.socket, client: Session, size: int) -> list[int]:
    """The totals in so many bytes that come under TLS."""
    data = b""
    while len(data) < size:
        bench.until(lambda: unread_bytes(peer), "something came")
        data += client.receive(peer.recv(65536))
    assert len(data) == size
    return list(decode_totals(data)[0])


def farewell(bench: Bench, peer: socket.socket, client: Session) -> bytes:
    """What comes until the server says that nothing more does."""
    data = b""
    while not client.ended:
        bench.until(lambda: unread_bytes(peer), "something came")
        data += client.receive(peer.recv(65536))
    return data


def test_the_replies_to_one_record_are_one_record(bench: Bench) -> None:
    peer, _, client = served(bench)
    assert client.receive(peer.recv(65536) if unread_bytes(peer) else b"") == b""
    peer.sendall(client.encrypt(ONE * 3))
    bench.until(lambda: unread_bytes(peer), "it is answered")
    record = peer.recv(65536)
    assert int.from_bytes(record[3:5]) + 5 == len(record)
    assert list(decode_totals(client.receive(record))[0]) == [1, 2, 3]


def test_what_comes_byte_by_byte_under_tls_is_counted_once(bench: Bench) -> None:
    peer, connection = bench.connect(tls)
    client = Session(trusting(), "localhost")
    client.start()

    def send_split(data: bytes) -> None:
        for byte in data:
            peer.sendall(bytes([byte]))
            bench.host.turn()

    send_split(client.outgoing())
    while not client.handshaken:
        bench.until(lambda: unread_bytes(peer), "the server's flight is there")
        client.receive(peer.recv(65536))
    send_split(client.outgoing() + client.encrypt(ONE * 2) + client.encrypt(encode_frame(5)))
    assert decrypted(bench, peer, client, 24) == [1, 2, 7]
    assert connection.state is State.SERVED
    assert not bench.host.frame_deadlines.overdue(float("inf"))


def test_a_frame_may_be_split_over_records_and_has_its_deadline(bench: Bench) -> None:
    peer, connection, client = served(bench)
    deadlines = bench.host.frame_deadlines
    assert not deadlines.overdue(float("inf"))
    peer.sendall(client.encrypt(ONE[:5]))
    bench.until(lambda: deadlines.overdue(float("inf")), "it is waited for")
    assert connection.overdue() == "a frame stopped after 5 bytes"
    peer.sendall(client.encrypt(ONE[5:]))
    assert decrypted(bench, peer, client, 8) == [1]
    assert not deadlines.overdue(float("inf"))


def test_the_deadline_of_a_frame_begins_with_the_record_that_holds_it(bench: Bench) -> None:
    peer, connection, client = served(bench)
    deadlines, record = bench.host.frame_deadlines, client.encrypt(ONE[:5])
    peer.sendall(record[:9])
    bench.until(lambda: deadlines.overdue(float("inf")), "it is waited for")
    moment = time.monotonic()
    peer.sendall(record[9:])
    bench.until(lambda: connection.rest, "the record is whole")
    assert deadlines.overdue(moment + deadlines.timeout_s) == [connection]
    assert connection.overdue() == "a frame stopped after 5 bytes"


def test_a_handshake_has_its_deadline_from_the_connection_on(bench: Bench) -> None:
    _, connection = bench.connect(tls)
    assert bench.host.frame_deadlines.overdue(float("inf")) == [connection]
    assert connection.overdue() == "no TLS handshake in time"


def test_frames_under_tls_are_drained(bench: Bench) -> None:
    peer, connection, client = served(bench)
    peer.sendall(client.encrypt(ONE))
    wait_until(lambda: unread_bytes(connection.sock) > 16, "it has come")
    bench.host.is_draining = True
    connection.drain()
    peer.sendall(client.encrypt(ONE))
    assert farewell(bench, peer, client) == (1).to_bytes(8)
    assert bench.host.counter.total() == 1
    assert bench.host.lingering


def test_a_drain_amid_a_handshake_lingers(bench: Bench) -> None:
    peer, connection = bench.connect(tls)
    client = Session(trusting(), "localhost")
    client.start()
    peer.sendall(client.outgoing()[:50])
    wait_until(lambda: unread_bytes(connection.sock) == 50, "some of it has come")
    bench.host.is_draining = True
    connection.drain()
    bench.until(lambda: bench.host.lingering, "it lingers")
    assert bench.host.refusals == []
    assert not bench.host.frame_deadlines.overdue(float("inf"))


def test_what_came_before_a_bad_frame_under_tls_is_answered(bench: Bench) -> None:
    peer, _, client = served(bench)
    peer.sendall(client.encrypt(ONE * 2 + bytes(16) + ONE))
    assert farewell(bench, peer, client) == (1).to_bytes(8) + (2).to_bytes(8)
    assert bench.host.refusals == [Ending.CHECKSUM]
    assert bench.host.counter.total() == 2
    assert bench.host.lingering


def test_a_peer_that_says_farewell_is_answered_and_gets_one(bench: Bench) -> None:
    peer, connection, client = served(bench)
    peer.sendall(client.encrypt(ONE) + client.farewell())
    assert farewell(bench, peer, client) == (1).to_bytes(8)
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    assert bench.host.lingering == []


def test_a_peer_that_says_farewell_while_a_store_owes_it_is_answered_first(bench: Bench) -> None:
    held = bench.host.additions = Held(bench.host.engine)
    peer, connection, client = served(bench)
    peer.sendall(client.encrypt(ONE) + client.farewell())
    bench.until(lambda: connection.state is State.ENDING, "its end was seen")
    held.answer()
    assert farewell(bench, peer, client) == (1).to_bytes(8)
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")


def test_a_last_look_under_tls_takes_what_has_come_without_a_worker(bench: Bench) -> None:
    peer, connection, client = served(bench)
    bench.host.workers.leave(connection)
    connection.park()
    peer.sendall(client.encrypt(ONE))
    wait_until(lambda: unread_bytes(connection.sock) > 16, "it has come")
    connection.look()
    assert decrypted(bench, peer, client, 8) == [1]


def test_what_a_store_owes_under_tls_is_answered_or_void(bench: Bench) -> None:
    held = bench.host.additions = Held(bench.host.engine)
    peer, connection, client = served(bench)
    peer.sendall(client.encrypt(ONE))
    bench.until(lambda: held.kept, "it is asked for")
    assert connection.owed() == 1
    held.answer()
    assert decrypted(bench, peer, client, 8) == [1]
    assert connection.owed() == 0
    peer.sendall(client.encrypt(ONE))
    bench.until(lambda: held.kept, "more is asked for")
    close_with_reset(peer)
    bench.until(lambda: connection.state is State.CLOSED, "it has ended")
    assert held.voids == 1
    assert sum(turn.amount for turn in held.kept) == 0


def test_one_under_tls_that_is_withdrawn_is_told_and_lingers_unanswered(bench: Bench) -> None:
    held = bench.host.additions = Held(bench.host.engine)
    peer, connection, client = served(bench)
    peer.sendall(client.encrypt(ONE))
    bench.until(lambda: held.kept, "it is asked for")
    connection.withdraw()
    held.answer()
    assert farewell(bench, peer, client) == b""
    assert bench.host.refusals == [Ending.STORE]
    assert bench.host.lingering


def test_one_under_tls_that_is_owed_very_much_is_not_read_until_it_is_answered(
    bench: Bench,
) -> None:
    held = bench.host.additions = Held(bench.host.engine)
    peer, connection, client = served(bench)
    sent = 0
    while connection.state is not State.STALLED:
        peer.sendall(client.encrypt(ONE * 1024))
        sent += 1024
        bench.until(partial(has_asked, held, sent), "they are asked for")
    peer.sendall(client.encrypt(ONE))
    bench.host.turn()
    assert has_asked(held, sent)
    held.answer()
    bench.until(lambda: has_asked(held, 1), "it is read again")
    assert decrypted(bench, peer, client, 8 * sent) == list(range(1, sent + 1))


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


def test_a_record_that_was_changed_on_its_way_is_refused_with_an_alert(bench: Bench) -> None:
    peer, _, client = served(bench)
    record = client.encrypt(ONE)
    peer.sendall(record[:-1] + bytes([record[-1] ^ 1]))
    bench.until(lambda: bench.host.lingering, "it lingers")
    assert bench.host.refusals == [Ending.TLS]
    with pytest.raises(TlsError, match="alert bad record mac"):
        client.receive(peer.recv(65536))
    assert bench.host.counter.total() == 0
