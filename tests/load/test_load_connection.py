"""A connection of the load against a peer that this test plays, byte by byte."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from counter.load.connection import LoadConnection
from counter.load.process import LoadProcess
from counter.load.share import Share
from counter.options.client import ClientSettings
from kit.harness import wait_until
from protocol import REQUEST_SIZE, encode_frame, encode_total

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
        assert connection._sock is not None
        connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        process.sending = True
        peer, _ = listener.accept()
        with peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield process, connection, peer
        process.close()


def receive_available(peer: socket.socket) -> bytes:
    try:
        return peer.recv(65536, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""


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
