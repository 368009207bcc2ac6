"""A connection of the load against a peer that this test plays, byte by byte."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic_ns as clock
from typing import Any

from counter.load.connection import LoadConnection
from counter.load.patience import is_ready
from counter.load.process import LoadProcess
from counter.load.share import Share
from counter.options.client import ClientSettings
from counter.system.libev import READ
from counter.system.sockets import unread_bytes
from kit.harness import wait_until
from protocol import REPLY_SIZE, REQUEST_SIZE, encode_frame, encode_total

BUFFER_BYTES = 16384  # of each end: full after a few thousand frames


@contextmanager
def one_connection() -> Iterator[tuple[LoadProcess, LoadConnection, socket.socket]]:
    """A load process that sends on one connection, and the other end of it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        addresses = ((socket.AF_INET, listener.getsockname()),)
        process = LoadProcess(Share(ClientSettings(), addresses, 1, None, 0.0, 1))
        process.open_all()
        (connection,) = process.connections
        socket_of(connection).setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        process.sending = True
        peer, _ = listener.accept()
        with peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield process, connection, peer
        process.close()


def socket_of(connection: LoadConnection) -> Any:
    assert connection._sock is not None
    return connection._sock


def receive_available(peer: socket.socket) -> bytes:
    try:
        return peer.recv(65536, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""


def test_a_connection_is_read_to_its_end_before_it_is_given_up() -> None:
    """The replies to a deep pipeline are more than one read, and the oldest is the last of them."""
    with one_connection() as (process, connection, peer):
        sock, count = socket_of(connection), 10_000
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * count * REPLY_SIZE)
        process.refill(connection, count)
        process.sending = False
        peer.settimeout(20)
        peer.sendall(b"".join(map(encode_total, range(1, count + 1))))
        wait_until(lambda: unread_bytes(sock) == count * REPLY_SIZE, "every reply has come")
        connection.judge(late_before=clock())
        assert process.result.errors == {}
        assert process.result.answered == count


def test_the_end_of_a_connection_is_no_timeout() -> None:
    with one_connection() as (process, connection, peer):
        process.refill(connection, 1)
        process.sending = False
        peer.shutdown(socket.SHUT_WR)
        fd = socket_of(connection).fileno()
        wait_until(lambda: is_ready(fd, READ), "the end has come")
        connection.judge(late_before=clock())
        assert process.result.errors == {"connection closed": 1}


def test_a_server_that_answers_before_it_reads_gets_every_frame_whole() -> None:
    with one_connection() as (process, connection, peer):
        answered, received = 0, b""

        def took_the_reply() -> bool:
            connection.on_readable()
            process.end_turn()
            return connection._last_total == answered

        def sent_everything() -> bool:
            nonlocal received
            received += receive_available(peer)
            if connection._unsent:
                connection.on_writable()
            return len(received) >= (answered + 1) * REQUEST_SIZE

        process.refill(connection, 1)
        while len(connection._unsent) < 10 * REQUEST_SIZE:
            answered += 1
            peer.sendall(encode_total(answered))
            wait_until(took_the_reply, "the reply was taken")
            assert process.result.errors == {}, "a full socket is no lost connection"
        wait_until(sent_everything, "the peer has every frame")
        assert received == encode_frame(1) * (answered + 1)
        assert process.result.sent == answered + 1
