"""Any bytes sent to the running server are counted right or refused, and nothing dies of them.

A model says which frames of a stream count: all before the first that is not one. Short forms run
always; LONG=1 (make chaos) runs millions of frames. What was found stays as a case of its own.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xxhash import xxh64_digest

from kit.certificates import SplitPeer, TlsPeer, kit
from kit.harness import Peer, ServerCommand, children
from kit.hostile import memory_kb

pytestmark = pytest.mark.usefixtures("each_engine")

LONG = os.environ.get("LONG") == "1"
FRAMES = 1000  # of a stream
KEPT_WITHIN = 1.05  # what memory may have grown by since the first tenth
LIMIT = 2**48  # of the server whose frames may be too large

Send = Callable[[bytes], bytes]
"""Sends a stream to the end, and gives back every reply."""


def frame(amount: int) -> bytes:
    return struct.pack(">Q", amount) + xxh64_digest(b"%d" % amount)


def model(stream: bytes, limit: int = 2**64 - 1) -> list[int]:
    """The amounts that count."""
    counted = []
    for at in range(0, len(stream) - 15, 16):
        amount = int.from_bytes(stream[at : at + 8])
        if amount > limit or stream[at : at + 16] != frame(amount):
            break
        counted.append(amount)
    return counted


def replies(before: int, amounts: Sequence[int]) -> bytes:
    """What the server has to answer, byte by byte."""
    totals = []
    for amount in amounts:
        before = (before + amount) % 2**64
        totals.append(before)
    return struct.pack(f">{len(totals)}Q", *totals)


@dataclass
class Fuzzed:
    """A server that nobody else adds to, and its total as the model has it."""

    server: ServerCommand
    limit: int = 2**64 - 1
    total: int = 0
    frames: int = 0

    def __post_init__(self) -> None:
        self.pids = children(self.server.process.pid)

    def check(self, stream: bytes, send: Send) -> None:
        amounts = model(stream, self.limit)
        expected = replies(self.total, amounts)
        got = send(stream)
        assert got == expected, f"{len(got) // 8} replies for {len(amounts)} frames"
        self.total = (self.total + sum(amounts)) % 2**64
        self.frames += len(amounts)

    def end(self) -> None:
        """No process has died, the total is the model's, the log is short and without errors."""
        assert children(self.server.process.pid) == self.pids
        requests = self.server.stop()
        log = self.server.errors()
        assert requests == (self.total, self.frames)
        assert "Traceback" not in log
        assert len(log) < 1_000_000
        print(f"\n{self.frames:,} frames counted, log {len(log)} bytes")


def plain(fuzzed: Fuzzed, cuts: Sequence[int] = ()) -> Send:
    """Sends over plain TCP, in pieces, then FIN; a reset would be an error."""

    def send(stream: bytes) -> bytes:
        with fuzzed.server.connect() as peer:
            peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
                peer.send(stream[start:end])
            end_sending(peer)
            return peer.everything()

    return send


def end_sending(peer: Peer) -> None:
    with suppress(OSError):  # the server has refused it and lingers no more
        peer.sock.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module", params=["any", "limited"])
def fuzzed(each_engine: str, request: pytest.FixtureRequest) -> Iterator[Fuzzed]:
    limit = LIMIT if request.param == "limited" else 2**64 - 1
    with ServerCommand("--processes", "1", "--maxIncrement", str(limit)) as server:
        fuzzed = Fuzzed(server, limit)
        yield fuzzed
        fuzzed.end()


# What a stream is made of: frames, and what is almost one.
amounts = st.integers(0, 3) | st.integers(0, 2**20) | st.integers(0, 2**64 - 1)
pieces = st.one_of(
    st.builds(frame, amounts),
    st.builds(lambda amount, count: frame(amount) * count, amounts, st.integers(1, 300)),
    st.binary(max_size=40),
    st.builds(lambda amount, size: frame(amount)[:size], amounts, st.integers(0, 15)),
    st.sampled_from([b"GET / HTTP/1.1\r\n\r\n", b"\0" * 16, b"\xff" * 16, b"a" * 16, b"1\n"]),
)


@settings(
    max_examples=3000 if LONG else 150,
    deadline=None,
    derandomize=not LONG,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
@pytest.mark.timeout(600)
def test_any_bytes_are_counted_as_the_model_says(fuzzed: Fuzzed, data: st.DataObject) -> None:
    stream = b"".join(data.draw(st.lists(pieces, max_size=12)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=4)))
    fuzzed.check(stream, plain(fuzzed, cuts))


def good_stream(pick: random.Random, frames: Sequence[bytes]) -> bytearray:
    """So many frames as one stream: all alike, small ones, or of any size."""
    kind = pick.randrange(3)
    if kind == 0:
        return bytearray(pick.choice(frames) * FRAMES)
    if kind == 1:
        return bytearray(b"".join(pick.choices(frames[:1000], k=FRAMES)))
    return bytearray(b"".join(pick.choices(frames, k=FRAMES)))


def mutate(stream: bytearray, pick: random.Random) -> int:
    """One mutation at a random place; gives back the first frame that may have changed."""
    at = pick.randrange(len(stream))
    match pick.randrange(6):
        case 0:
            stream[at] ^= 1 << pick.randrange(8)
        case 1:
            stream[at] = pick.randrange(256)
        case 2:
            stream[at:at] = pick.randbytes(pick.randrange(1, 40))
        case 3:
            del stream[at : at + pick.randrange(1, 40)]
        case 4:
            stream[at : at + 16] = pick.randbytes(16)
        case 5:
            del stream[at:]
    return at // 16


def frames_of_all_sizes(pick: random.Random) -> list[bytes]:
    small = [frame(pick.randrange(70_000)) for _ in range(1000)]
    return small + [frame(pick.randrange(2 ** pick.randrange(1, 65))) for _ in range(4000)]


def run_streams(fuzzed: Fuzzed, streams: int, send: Callable[[], Send]) -> None:
    """Streams of a thousand frames with one mutation each; memory is flat from a tenth on."""
    pick = random.Random(11)
    frames = frames_of_all_sizes(pick)
    first: dict[int, int] = {}
    started = time.monotonic()
    for number in range(streams):
        stream = good_stream(pick, frames)
        mutate(stream, pick)
        fuzzed.check(bytes(stream), send())
        if number == streams // 10:
            first = memory_kb(fuzzed.pids)
    last = memory_kb(fuzzed.pids)
    seconds = time.monotonic() - started
    print(f"\n{streams * FRAMES:,} frames sent in {seconds:.0f} s, memory {first} KB, then {last}")
    for pid in fuzzed.pids:
        assert last[pid] <= first[pid] * KEPT_WITHIN


@pytest.mark.timeout(1800 if LONG else 120)
def test_what_stands_before_a_mutation_counts_and_nothing_behind_it() -> None:
    with ServerCommand("--processes", "1") as server:
        fuzzed = Fuzzed(server)
        run_streams(fuzzed, 5000 if LONG else 300, lambda: plain(fuzzed))
        fuzzed.end()


@pytest.mark.timeout(1800 if LONG else 120)
def test_the_same_under_tls() -> None:
    """The frames are mutated, the records that hold them are whole."""
    with ServerCommand("--processes", "1", *kit().server.server_flags()) as server:
        fuzzed = Fuzzed(server)

        def send(stream: bytes) -> bytes:
            with SplitPeer(server.address) as peer:
                peer.shake_hands()
                peer.send(peer.session.encrypt(stream) if stream else b"")
                return peer.plain_then_farewell(len(model(stream)) * 8)

        run_streams(fuzzed, 1000 if LONG else 100, lambda: send)
        fuzzed.end()


def test_ciphertext_that_was_tampered_with_counts_nothing() -> None:
    pick = random.Random(5)
    with ServerCommand("--processes", "1", *kit().server.server_flags()) as server:
        pids = children(server.process.pid)
        with TlsPeer(server.address) as good:
            for _ in range(500 if LONG else 60):
                with SplitPeer(server.address) as peer:
                    peer.shake_hands()
                    stream = bytearray(peer.session.encrypt(frame(1) * 100))
                    stream[pick.randrange(5, len(stream))] ^= 1 << pick.randrange(8)
                    peer.send(bytes(stream))
                    while peer.sock.recv(65536):
                        pass
                assert good.add(0) == 0
        assert children(server.process.pid) == pids
        assert server.stop()[0] == 0
        log = server.errors()
        assert "Traceback" not in log
        assert len(log) < 100_000


def test_a_handshake_that_was_tampered_with_kills_nothing() -> None:
    pick = random.Random(6)
    flags = ("--processes", "1", "--frameTimeout", "500ms")
    with ServerCommand(*flags, *kit().server.server_flags()) as server:
        pids = children(server.process.pid)
        for number in range(2000 if LONG else 150):
            with SplitPeer(server.address) as peer:
                peer.session.start()
                hello = bytearray(peer.session.outgoing())
                for _ in range(pick.randrange(1, 4)):
                    hello[pick.randrange(len(hello))] ^= 1 << pick.randrange(8)
                if number % 3 == 0:
                    hello[pick.randrange(len(hello)) :] = pick.randbytes(pick.randrange(2000))
                peer.send(bytes(hello))
                end_sending(peer)
                peer.everything()
        assert children(server.process.pid) == pids
        with TlsPeer(server.address) as good:
            assert good.add(1) == 1
        assert server.stop() == (1, 1)
        assert "Traceback" not in server.errors()


# The corpus: streams at the edges of how a read is decoded. None may ever be counted differently.
CORPUS = {
    "nothing": b"",
    "one byte": b"\0",
    "all but one byte of a frame": frame(1)[:15],
    "a frame and all but one byte": frame(1) * 2 + frame(1)[:15],
    "the amount twice": frame(1)[:8] * 2,
    "the checksum of another amount": frame(1)[:8] + frame(2)[8:],
    "the checksum of the bytes, not of the decimal text": b"aaaaaaaa" + xxh64_digest(b"aaaaaaaa"),
    "the checksum with its bytes reversed": frame(7)[:8] + frame(7)[:7:-1],
    "the amount with its bytes reversed": frame(2**56)[7::-1] + frame(2**56)[8:],
    "the checksum of the text with a zero in front": struct.pack(">Q", 5) + xxh64_digest(b"05"),
    "95 frames": frame(3) * 95,
    "96 frames and a wrong one": frame(3) * 96 + b"x" * 16,
    "97 frames of many sizes": b"".join(frame(10**n) for n in range(20)) * 5,
    "a uniform read with one wrong byte in its middle": frame(1) * 50
    + frame(1)[:15]
    + b"\0"
    + frame(1) * 50,
    "a uniform read with one other frame in its middle": frame(1) * 99 + frame(2) + frame(1) * 99,
    "a uniform read of wrong frames": b"abcdefgh12345678" * 200,
    "the edge of the table of small amounts": b"".join(map(frame, range(65_500, 65_600))),
    "the edges of the numbers": b"".join(map(frame, [0, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 2])),
    "the largest amount, a thousand times": frame(2**64 - 1) * 1000,
    "more than one large read": frame(1) * 4097 + frame(9) * 4097,
    "a small read's length and one byte more": frame(1) * 29 + b"\0",
    "at the limit and one above it": frame(LIMIT) + frame(LIMIT + 1) + frame(1),
}


@pytest.mark.parametrize("name", CORPUS)
def test_the_corpus_is_counted_as_the_model_says(fuzzed: Fuzzed, name: str) -> None:
    stream = CORPUS[name]
    fuzzed.check(stream, plain(fuzzed))
    if len(stream) < 2000:
        for cut in range(1, len(stream), max(1, len(stream) // 40)):
            fuzzed.check(stream, plain(fuzzed, [cut]))
