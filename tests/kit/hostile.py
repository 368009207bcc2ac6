"""Peers that mean harm: eight ways to be a nuisance, thousands of connections in one process.

All they add is 0, so the total is what the good clients make of it. They come back whenever they
are turned away.
"""

from __future__ import annotations

import errno
import heapq
import os
import random
import select
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

from protocol import encode_frame, parse_address

READ = encode_frame(0)
MANY_READS = READ * 1024
RESET = struct.pack("ii", 1, 0)
BIND_ADDRESS_NO_PORT = 24  # IP_BIND_ADDRESS_NO_PORT: a port is free unless the same peer has it
SOURCES = 200  # addresses of the loopback, each with ports of its own

WAYS = ("drip", "half", "leave", "reset", "deaf", "mute", "garbage", "connect")


@dataclass(order=True)
class Nuisance:
    """One hostile connection, and when it acts next."""

    at: float
    number: int
    way: str = field(compare=False)
    sock: socket.socket | None = field(default=None, compare=False)
    sent: int = field(default=0, compare=False)
    is_due: bool = field(default=True, compare=False)  # it is in the schedule


class Nuisances:
    """So many of them, each way as often as the others, until somebody ends the process."""

    def __init__(self, address: str, many: int, seed: int) -> None:
        self.address = parse_address(address)
        self.random = random.Random(seed)
        self.garbage = self.random.randbytes(4096)
        self.poll = select.epoll()
        self.open: dict[int, Nuisance] = {}
        self.sources = count(seed)
        self.done: Counter[str] = Counter()
        now = time.monotonic()
        # Spread over a second: thousands at the same instant would only fill the listen queue.
        self.due = [Nuisance(now + i / many, i, WAYS[i % len(WAYS)]) for i in range(many)]

    def run(self, told: int) -> None:
        """Goes on until the pipe `told` ends."""
        self.poll.register(told, select.EPOLLIN)
        while True:
            wait_s = max(0.0, min(0.5, self.due[0].at - time.monotonic())) if self.due else 0.5
            for fd, _ in self.poll.poll(wait_s):
                if fd == told:
                    return
                self.hear(self.open[fd])
            now = time.monotonic()
            while self.due and self.due[0].at <= now:
                self.act(heapq.heappop(self.due))

    def act(self, one: Nuisance) -> None:
        """The next misdeed of one of them."""
        one.is_due = False
        if one.sock is None and not self.connect(one):
            self.again(one, 0.5)
            return
        try:
            again_s = self.misbehave(one)
        except BlockingIOError:
            again_s = 0.3
        except OSError:
            again_s = None
        if again_s is None:
            self.leave(one)
        elif again_s:
            self.again(one, again_s)

    def misbehave(self, one: Nuisance) -> float | None:
        """Seconds to the next act, 0 for none before something is heard, None to leave."""
        assert one.sock is not None
        if one.way == "drip":
            one.sock.send(READ[one.sent % 16 : one.sent % 16 + 1])
            one.sent += 1
            return 1.0
        if one.way == "half" and not one.sent:
            one.sent = one.sock.send(READ[:8])
        elif one.way == "leave" and not one.sent:
            one.sent = one.sock.send(READ * 200)
        elif one.way == "reset":
            one.sock.send(READ * 50)
            one.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            return None
        elif one.way == "deaf":
            one.sent += one.sock.send(MANY_READS[one.sent % 16 :])
            # Whoever reads nothing does not learn that the server has closed: it gives up one day.
            return 0.05 if self.random.random() < 0.98 else None
        elif one.way == "garbage":
            one.sock.send(self.garbage[: self.random.randrange(16, 4096)])
        elif one.way == "connect":
            return None
        return 0.0

    def hear(self, one: Nuisance) -> None:
        """Something came, or the end; who is deaf hears the end alone."""
        assert one.sock is not None
        if one.way == "deaf":
            self.leave(one)
            return
        try:
            data = one.sock.recv(4)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or one.way == "leave":
            self.leave(one)

    def connect(self, one: Nuisance) -> bool:
        try:
            sock = socket.socket()
        except OSError:
            return False
        sock.setblocking(False)
        if one.way == "deaf":  # a few frames fill it, so that thousands of the kind are possible
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        sock.setsockopt(socket.IPPROTO_IP, BIND_ADDRESS_NO_PORT, 1)
        sock.bind((f"127.0.0.{2 + next(self.sources) % SOURCES}", 0))
        if sock.connect_ex(self.address) not in (0, errno.EINPROGRESS):
            sock.close()
            return False
        one.sock, one.sent = sock, 0
        self.open[sock.fileno()] = one
        events = select.EPOLLRDHUP if one.way == "deaf" else select.EPOLLIN
        self.poll.register(sock.fileno(), events)
        return True

    def leave(self, one: Nuisance) -> None:
        """Closes, and comes back soon."""
        assert one.sock is not None
        self.done[one.way] += 1
        del self.open[one.sock.fileno()]
        self.poll.unregister(one.sock.fileno())
        one.sock.close()
        one.sock = None
        if not one.is_due:
            self.again(one, self.random.uniform(0.1, 0.5))

    def again(self, one: Nuisance, seconds: float) -> None:
        one.is_due = True
        one.at = time.monotonic() + seconds
        heapq.heappush(self.due, one)


@contextmanager
def nuisances(address: str, many: int, processes: int = 1) -> Iterator[Counter[str]]:
    """So many hostile connections while the body runs; then what each way has done how often."""
    pids = []
    sums: Counter[str] = Counter()
    told, teller = os.pipe()
    report, reporter = os.pipe()
    for seed in range(processes):
        pid = os.fork()
        if not pid:
            try:
                os.close(teller)
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                gang = Nuisances(address, many // processes, seed)
                gang.run(told)
                os.write(reporter, "".join(f"{k} {n}\n" for k, n in gang.done.items()).encode())
            finally:
                os._exit(0)
        pids.append(pid)
    os.close(reporter)
    try:
        yield sums
    finally:
        os.close(teller)
        with open(report, encoding="ascii") as lines:
            for line in lines:
                way, number = line.split()
                sums[way] += int(number)
        for pid in pids:
            os.waitpid(pid, 0)
        os.close(told)


def memory_kb(pids: Sequence[int]) -> dict[int, int]:
    """What each process has resident."""
    page_kb = os.sysconf("SC_PAGE_SIZE") // 1024
    found = {}
    for pid in pids:
        with open(f"/proc/{pid}/statm", encoding="ascii") as statm:
            found[pid] = int(statm.read().split()[1]) * page_kb
    return found
