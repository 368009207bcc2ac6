"""A load process whose peers the test plays: byte by byte, and turn by turn of its engine."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic_ns as clock
from typing import Any

import pytest

from counter.load.connection import LoadConnection
from counter.load.patience import is_ready
from counter.load.process import LoadProcess
from counter.load.recording import Recording
from counter.load.share import Share
from counter.options.client import ClientSettings
from counter.system.libev import READ
from kit.engine import compiled
from kit.harness import PATIENCE_S, wait_until
from protocol import TOTAL_MASK, encode_total

ENGINES = ("plain", "compiled")


def needs(engine: str) -> None:
    """Skips a test of an engine that cannot be built here, fails it where one should have been."""
    if engine == "compiled":
        compiled()


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """The name of each engine, one after the other."""
    name: str = request.param
    needs(name)
    return name


class Play:
    """A load process that sends, and the other end of each of its connections.

    `total` is what the peers have counted; they answer by it, one addition after another.
    """

    def __init__(self, process: LoadProcess, peers: list[socket.socket]) -> None:
        self.process = process
        self.peers = peers
        self.total = 0
        self.amount = process.draw.amount

    @property
    def connections(self) -> list[LoadConnection]:
        return self.process.connections

    def sock(self, index: int = 0) -> Any:
        """The load's end of a connection, which is open."""
        sock = self.connections[index]._sock
        assert sock is not None
        return sock

    def turn(self) -> None:
        """A turn of the engine."""
        self.process.engine.turn()

    def turn_until(self, condition: Callable[[], bool], what: str) -> None:
        """Turns of the engine until a condition holds."""

        def holds() -> bool:
            self.turn()
            return condition()

        wait_until(holds, what)

    def replies(self, count: int) -> bytes:
        """The next replies of a right server."""
        replies = b""
        for _ in range(count):
            self.total = (self.total + self.amount) & TOTAL_MASK
            replies += encode_total(self.total)
        return replies

    def say(self, data: bytes, index: int = 0) -> None:
        """Has bytes arrive at a connection, and a turn that takes them."""
        self.peers[index].sendall(data)
        self.arrived(index)
        self.turn()

    def answer(self, count: int = 1, index: int = 0) -> None:
        """Answers so many frames rightly."""
        self.say(self.replies(count), index)

    def exchange(self, count: int, index: int = 0) -> None:
        """Answers so many frames rightly, in as many turns as it takes."""
        answered = self.process.result.answered + count
        self.peers[index].sendall(self.replies(count))
        self.turn_until(lambda: self.process.result.answered == answered, "all are answered")

    def arrived(self, index: int = 0) -> None:
        """Waits until a connection has something to read."""
        fd = self.sock(index).fileno()
        wait_until(lambda: is_ready(fd, READ), "it has arrived")

    def asked(self, index: int = 0) -> bytes:
        """What a peer has been sent, as far as it came."""
        peer = self.peers[index]
        return peer.recv(2**20) if is_ready(peer.fileno(), READ) else b""


@contextmanager
def playing(
    engine: str,
    *,
    connections: int = 1,
    recording: Recording | None = None,
    buffer_bytes: int = 0,
    receive_bytes: int = 0,
    requests: int | None = None,
    **options: Any,
) -> Iterator[Play]:
    """A load process with these options that sends from here on, all of it measured.

    `buffer_bytes` bounds what the kernel keeps for the peers, `receive_bytes` what for the load.
    """
    settings = ClientSettings(**options)
    with socket.create_server(("127.0.0.1", 0), backlog=connections) as listener:
        if buffer_bytes:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        addresses = ((socket.AF_INET, listener.getsockname()),)
        share = Share(settings, addresses, connections, requests, 0.0, 1, engine)
        process = LoadProcess(share, recording)
        process.open_all()
        assert process.result.errors == {}
        accepted = {}
        for _ in range(connections):
            peer, address = listener.accept()
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.settimeout(PATIENCE_S)
            accepted[address] = peer
        play = Play(process, [])
        for index in range(connections):
            sock = play.sock(index)
            if buffer_bytes:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
            if receive_bytes:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            play.peers.append(accepted[sock.getsockname()])
    try:
        process.meter.start(clock(), None)
        process.sending = True
        for connection in process.connections:
            process.refill(connection, settings.pipeline)
        yield play
    finally:
        process.close()
        for peer in play.peers:
            peer.close()
