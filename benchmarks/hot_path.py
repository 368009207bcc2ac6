"""Question: what does the server's own code cost a request, beside its two system calls?

Command: .venv/bin/python benchmarks/hot_path.py

Forty connections, each a Unix socket pair within this process. In each round all of them are sent
the same frames, then either the turns of an engine run until nothing is ready, or a bare `recv` and
`send` for each; the difference is the server's own code, the asking of its epoll included. The
smallest of seven rounds counts, as nothing makes code faster than it is. The bare calls are
Python's: C makes them 0.2 us sooner, so that the compiled engine can be below them.

Invalid if: the smallest of the bare rounds differs much from row to row (something else ran).
"""

from __future__ import annotations

import _socket
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from counter.processes.slots import Slots
from counter.serving.additions import InMemory
from counter.totals.memory import make_shared_counter
from counter.turn.engine import Interest
from counter.turn.engines import make_decoder, make_engine
from counter.turn.plain import LARGE_READ, SMALL_READ
from protocol import MAX_AMOUNT, REPLY_SIZE, encode_frame

CONNECTIONS: Final = 40
ROUNDS: Final = 7


def smallest_us(turns: int, send: Callable[[], None], work: Callable[[], None]) -> float:
    """The time of `work` for one connection, in its fastest round of so many turns."""
    best_s = float("inf")
    for _ in range(ROUNDS):
        spent_s = 0.0
        for _ in range(turns):
            send()
            started_s = time.perf_counter()
            work()
            spent_s += time.perf_counter() - started_s
        best_s = min(best_s, spent_s)
    return best_s / turns / CONNECTIONS * 1e6


def measure(name: str, frames: int) -> tuple[float, float]:
    """Microseconds a connection and turn: the engine's way, and the bare system calls."""
    engine = make_engine(name, make_decoder(MAX_AMOUNT, name == "plain"))
    additions = InMemory(make_shared_counter(), Slots(1)[0], engine)
    pairs = [socket.socketpair() for _ in range(CONNECTIONS)]
    request, reply = encode_frame(1) * frames, bytes(REPLY_SIZE * frames)
    size = SMALL_READ if len(request) < SMALL_READ else LARGE_READ
    plain = [_socket.socket(socket.AF_UNIX, 1, 0, ours.detach()) for ours, _ in pairs]
    for sock in plain:
        sock.setblocking(False)
        engine.open(sock, Interest.FRAMES)

    def send() -> None:
        for _, theirs in pairs:
            theirs.sendall(request)

    def serve() -> None:
        additions.exchange()
        receive()

    def bare() -> None:
        for sock in plain:
            sock.recv(size)
        for sock in plain:
            sock.send(reply)
        receive()

    def receive() -> None:
        for _, theirs in pairs:
            theirs.recv(LARGE_READ)

    turns = max(20, 500 // frames)
    return smallest_us(turns, send, serve), smallest_us(turns, send, bare)


def main() -> None:
    print("frames  engine    its way       bare calls  own code  a frame")
    for frames in (1, 16, 256, 1024, 4096):
        for name in ("compiled", "plain"):
            whole, bare = measure(name, frames)
            own = whole - bare
            print(
                f"{frames:6}  {name:8}  {whole:9.2f} us  {bare:7.2f} us  {own:5.2f} us"
                f"  {own / frames * 1000:7.1f} ns"
            )


if __name__ == "__main__":
    main()
