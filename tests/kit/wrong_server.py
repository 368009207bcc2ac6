"""A counter server that is wrong on purpose: python tests/kit/wrong_server.py MODE.

It speaks the real protocol to any number of connections, and one request in EVERY or so is treated
as MODE says, at random:

    lost    an addition is answered and not counted
    twice   an addition is counted twice and answered with the total after the second
    stale   a read is answered with the total of AGE_S ago
    early   an addition is answered with a total above one that is still to be asked for: the steps
            between go to an addition of the same amount that is sent AGE_S later at the earliest

A history of lost or twice is never that of a right counter. One of stale or early would be if no
addition were answered in those AGE_S, or none were sent after them; so AGE_S is a hundred times a
reply's time and far below a run's, and a run has dozens of wrong answers.
"""

from __future__ import annotations

import random
import sys
import time
from collections import deque
from pathlib import Path
from typing import Final

from gevent.server import StreamServer
from gevent.socket import socket

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from protocol import TOTAL_MASK, Decoder, encode_total

EVERY: Final = 200
AGE_S: Final = 0.1
MODES: Final = ("right", "lost", "twice", "stale", "early")


class WrongCounter:
    """A total, and the ways to get it wrong."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.total = 0
        self.past: deque[tuple[float, int]] = deque([(0.0, 0)])
        self.hole: tuple[float, int, int] | None = None  # since when, its amount and total

    def add(self, amount: int) -> int:
        """The total to answer with."""
        now = time.monotonic()
        if self.mode != "right" and random.random() < 1 / EVERY:
            return self.add_wrongly(amount, now)
        if self.hole and amount == self.hole[1] and now - self.hole[0] > AGE_S:
            total = self.hole[2]
            self.hole = None
            return total
        return self.count(amount, now)

    def count(self, amount: int, now: float) -> int:
        """Adds, as it should be."""
        self.total += amount
        self.past.append((now, self.total))
        return self.total

    def add_wrongly(self, amount: int, now: float) -> int:
        """Adds as the mode says, if it says something of this amount."""
        if self.mode == "lost":
            return self.total + amount
        if self.mode == "twice":
            self.count(amount, now)
        elif self.mode == "stale" and not amount:
            while len(self.past) > 1 and self.past[1][0] < now - AGE_S:
                self.past.popleft()
            return self.past[0][1]
        elif self.mode == "early" and amount and not self.hole:
            self.hole = now, amount, self.total + amount
            self.total += amount
        return self.count(amount, now)


def serve(mode: str) -> None:
    """Serves until it is killed; the first line on standard output names the address."""
    counter, decoder = WrongCounter(mode), Decoder()

    def answer(sock: socket, _address: object) -> None:
        rest = b""
        with sock:
            while data := sock.recv(65536):
                batch, rest = decoder.decode(rest + data)
                totals = map(counter.add, batch.amounts)
                sock.sendall(b"".join(encode_total(total & TOTAL_MASK) for total in totals))

    server = StreamServer(("127.0.0.1", 0), answer)
    server.start()
    print(f"127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    assert sys.argv[1] in MODES, f"the modes are {', '.join(MODES)}"
    serve(sys.argv[1])
