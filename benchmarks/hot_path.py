"""Question: what does the server's own code cost a request, beside its two system calls?

Command: .venv/bin/python benchmarks/hot_path.py

Forty connections, each a Unix socket pair within this process. In each round all of them are sent
the same frames, then either the callbacks and the commit of one turn of the loop run, or a bare
`recv` and `send` for each; the difference is the server's own code, without the loop's call into
it. The smallest of seven rounds counts, as nothing makes code faster than it is.

Invalid if: the smallest of the bare rounds differs much from row to row (something else ran).
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from counter.options.server import ServerSettings
from counter.serving.connection import LARGE_READ, SMALL_READ, Connection
from counter.serving.server import CounterServer
from counter.system.sockets import listen
from counter.totals.counter import Counter
from counter.totals.memory import MemoryCounter, make_shared_counter
from protocol import REPLY_SIZE, encode_frame

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


def measure(counter: Counter, frames: int) -> tuple[float, float]:
    """Microseconds a connection and turn: the server's way, and the bare system calls."""
    server = CounterServer(listen("127.0.0.1", 0, 1), counter, CONNECTIONS, ServerSettings())
    pairs = [socket.socketpair() for _ in range(CONNECTIONS)]
    request, reply = encode_frame(1) * frames, bytes(REPLY_SIZE * frames)
    size = SMALL_READ if len(request) < SMALL_READ else LARGE_READ
    for ours, _ in pairs:
        ours.setblocking(False)
    callbacks = [Connection(server, ours).on_readable for ours, _ in pairs]

    def send() -> None:
        for _, theirs in pairs:
            theirs.sendall(request)

    def serve() -> None:
        for callback in callbacks:
            callback()
        server.commit()
        receive()

    def bare() -> None:
        for ours, _ in pairs:
            ours.recv(size)
        for ours, _ in pairs:
            ours.send(reply)
        receive()

    def receive() -> None:
        for _, theirs in pairs:
            theirs.recv(LARGE_READ)

    turns = max(20, 500 // frames)
    return smallest_us(turns, send, serve), smallest_us(turns, send, bare)


def main() -> None:
    print("frames  total     server's way  bare calls  own code  a frame")
    for frames in (1, 16, 256, 1024, 4096):
        for name, counter in (("plain", MemoryCounter()), ("shared", make_shared_counter())):
            whole, bare = measure(counter, frames)
            own = whole - bare
            print(
                f"{frames:6}  {name:8}  {whole:9.2f} us  {bare:7.2f} us  {own:5.2f} us"
                f"  {own / frames * 1000:7.1f} ns"
            )


if __name__ == "__main__":
    main()
