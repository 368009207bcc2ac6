"""Load that keeps books, and what it has to survive: every process killed at once, a full disk,
machines of their own on a network of their own.

The books say what each connection was told; check() holds them against a total.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from client import ConnectError, CounterClient, OutcomeUnknown
from kit.harness import PATIENCE_S, ServerCommand, children, is_alive, wait_until

LONG = os.environ.get("LONG") == "1"  # make chaos

# Longer than any outage here: whoever waits so long hangs.
CLIENT_PATIENCE_S = 45.0


def serve(store: str, *arguments: str, inside: Sequence[str] = ()) -> ServerCommand:
    """A server of two processes on a store, with workers for all that the tests connect."""
    return ServerCommand(
        "--processes", "2", "--multiplier", "400", "--store", store, *arguments, inside=inside
    )


@contextmanager
def serve_together(*starts: Callable[[], ServerCommand]) -> Iterator[Sequence[ServerCommand]]:
    """Servers that start at the same time, ended at the end."""
    with ExitStack() as stack, ThreadPoolExecutor(len(starts)) as starters:
        starting = [starters.submit(start) for start in starts]
        # Each is entered before a failure of another is raised.
        for one in as_completed(starting):
            if not one.exception():
                stack.enter_context(one.result())
        yield [one.result() for one in starting]


def stop_together(servers: Sequence[ServerCommand]) -> set[int]:
    """Stops servers at the same time; the totals that they print."""
    for server in servers:
        server.signal(signal.SIGTERM)
    return {server.farewell()[0] for server in servers}


def first_total(server: ServerCommand) -> int:
    """The total that the first line of a server tells, 0 if its store is new."""
    match = re.search(r", total: ([\d,]+)\)$", server.first_line)
    return int(match[1].replace(",", "")) if match else 0


def let_pass(seconds: float) -> None:
    """Has what runs go on for so long."""
    until = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= until, f"{seconds} s are over", seconds + PATIENCE_S)


def kill_everything(server: ServerCommand) -> None:
    """SIGKILL to every process of a server, in any order; back when none is left."""
    pids = [server.process.pid, *children(server.process.pid)]
    random.shuffle(pids)
    for pid in pids:
        with suppress(ProcessLookupError):  # it died with its master already
            os.kill(pid, signal.SIGKILL)
    server.finish()
    wait_until(lambda: not any(map(is_alive, pids)), "all its processes are gone")


def expect_back(server: ServerCommand) -> None:
    """Waits until the log says that the store is back, and not once more that it is away."""
    while "is back after" not in (line := server.error_line()):
        assert "is away" not in line, line


@dataclass
class Books:
    """What one thread has added over one connection after the other, and what it was told."""

    answered: int = 0  # the sum of what was answered
    unknown: int = 0  # the sum of what was sent and not answered
    totals: list[int] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)  # how long each wait in vain was
    resets: int = 0  # of those, how many ended by anything but FIN
    refusals: int = 0  # connections that could not be made
    parked: bool = False

    def add(self, counter: CounterClient, amounts: Sequence[int]) -> None:
        """Adds all the amounts, or as many as can be."""
        started = time.monotonic()
        totals: Sequence[int] = ()
        try:
            totals = counter.add_many(amounts)
        except ConnectError:
            self.refusals += 1
        except OutcomeUnknown as error:
            totals = error.totals
            self.unknown += sum(error.amounts)
            self.waits.append(time.monotonic() - started)
            self.resets += "the server closed the connection" not in str(error)
        self.answered += sum(amounts[: len(totals)])
        self.totals += totals


class Load:
    """Threads that add without end, each over a connection of its own, while the body runs.

    Each adds a few random amounts at once, or ones one by one where `ones` is set. Without
    addresses it waits for resume(). The threads are spread evenly over the addresses.
    """

    def __init__(self, connections: int, *addresses: str, ones: bool = False) -> None:
        self._ones = ones
        self._addresses = addresses
        self._going = threading.Event()
        self._stopping = threading.Event()
        self.books = [Books() for _ in range(connections)]
        self._threads = [
            threading.Thread(target=self._live, args=(number,), daemon=True)
            for number in range(connections)
        ]

    def _live(self, number: int) -> None:
        books = self.books[number]
        draw = random.Random(number)
        while not self._stopping.is_set():
            books.parked = True
            self._going.wait()
            books.parked = False
            address = self._addresses[number % len(self._addresses)]
            with CounterClient(address, timeout=CLIENT_PATIENCE_S) as counter:
                while self._going.is_set() and not self._stopping.is_set():
                    refusals = books.refusals
                    books.add(counter, self._amounts(draw))
                    if books.refusals > refusals:
                        self._stopping.wait(0.01)

    def _amounts(self, draw: random.Random) -> list[int]:
        if self._ones:
            return [1]
        return [draw.randrange(1, 2**32) for _ in range(draw.choice((1, 1, 1, 5)))]

    def pause(self) -> None:
        """Waits until every thread knows what became of its addition and sends no more."""
        self._going.clear()
        wait_until(lambda: all(books.parked for books in self.books), "all threads wait")

    def resume(self, *addresses: str) -> None:
        """Has the threads go on, with other addresses if any are given."""
        self._addresses = addresses or self._addresses
        self._going.set()

    def stop(self) -> None:
        """Has every thread end after the addition it is at."""
        self.leave()
        for thread in self._threads:
            thread.join(CLIENT_PATIENCE_S)
            assert not thread.is_alive()

    def leave(self) -> None:
        """Has every thread end after the addition it is at, without waiting for it."""
        self._stopping.set()
        self._going.set()

    def go_on(self, count: int = 100) -> None:
        """Waits until so many more additions were answered."""
        enough = self.count() + count
        wait_until(lambda: self.count() >= enough, f"{count} more additions are answered")

    def count(self) -> int:
        """How many additions were answered."""
        return sum(len(books.totals) for books in self.books)

    @property
    def answered(self) -> int:
        return sum(books.answered for books in self.books)

    @property
    def unknown(self) -> int:
        return sum(books.unknown for books in self.books)

    @property
    def waits(self) -> list[float]:
        return [wait for books in self.books for wait in books.waits]

    def sum(self, count: Callable[[Books], int]) -> int:
        return sum(map(count, self.books))

    def note(self, amount: int, total: int) -> None:
        """Enters an addition that a test has made itself into the books."""
        self.books.append(Books(answered=amount, totals=[total], parked=True))

    def check(self, total: int) -> None:
        """Checks a total against the books: what was answered is in it, and nothing that was not
        sent; no total was told twice, and those of a connection rise."""
        assert self.answered <= total <= self.answered + self.unknown
        told = [one for books in self.books for one in books.totals]
        assert len(set(told)) == len(told), "a total was told twice"
        assert max(told, default=0) <= total
        for books in self.books:
            assert books.totals == sorted(books.totals)

    def check_permutation(self) -> None:
        """Checks that ones were added, that each was answered, and that they number 1 to N."""
        assert not self.unknown
        told = sorted(one for books in self.books for one in books.totals)
        assert told == list(range(1, len(told) + 1))

    def show(self, what: str, total: int) -> None:
        """The figures of a run, for whoever runs its long form."""
        unanswered = len(self.waits)
        print(
            f"\n{what}: {self.count():,} answered, {unanswered:,} times unanswered "
            f"(resets: {self.sum(lambda books: books.resets):,}); total {total:,}, which is "
            f"{total - self.answered:,} above what was answered, {self.unknown:,} unknown"
        )

    def __enter__(self) -> Load:
        if self._addresses:
            self._going.set()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, *_: object) -> None:
        if error is None:
            self.stop()
        else:  # what they wait for may never come; they end when their server does
            self.leave()


class SmallDisk:
    """A file system of a few megabytes at `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = folder / "counter.db"
        self._filler = folder / "filler"

    def fill(self) -> None:
        """Leaves no space for one more page of the database.

        Its log is emptied before: it writes over what it has once held, which takes no space.
        The writers' own lock keeps them from having any of it in between.
        """
        with open(f"{self.database}-queue") as queue, closing(connect(self.database)) as db:
            fcntl.flock(queue, fcntl.LOCK_EX)
            ((busy, _, _),) = db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            assert not busy
            with open(self._filler, "wb", buffering=0) as filler, suppress(OSError):
                while filler.write(bytes(1 << 16)):
                    pass

    def empty(self) -> None:
        self._filler.unlink()


@contextmanager
def small_disk(folder: Path) -> Iterator[SmallDisk]:
    """A disk that can be filled, mounted at `folder` while the body runs."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "counter-test", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no disk may be mounted here: {mounted.stderr.strip()}")
    try:
        yield SmallDisk(folder)
    finally:
        wait_until(lambda: run("umount", str(folder)), "the disk is free")


def connect(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(database, isolation_level=None)


def kept_total(database: Path) -> int:
    """What a file holds, read without the project's own code."""
    with closing(connect(database)) as db:
        ((total,),) = db.execute("SELECT total FROM counter")
        return int(total)


def check_integrity(database: Path) -> None:
    with closing(connect(database)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def run(*command: str) -> bool:
    """Whether a command succeeds."""
    return not subprocess.run(command, capture_output=True, check=False).returncode


@dataclass(frozen=True)
class Machine:
    """A network namespace: a machine of its own as far as sockets go."""

    name: str
    ours: str  # this side's address on the cable to it
    address: str

    @property
    def inside(self) -> Sequence[str]:
        """What stands before a command that is to run there."""
        return ("ip", "netns", "exec", self.name)


@contextmanager
def machines(count: int) -> Iterator[Sequence[Machine]]:
    """So many namespaces, each with a cable to this one, removed at the end."""
    made = []
    with ExitStack() as stack:
        for number in range(count):
            name = f"c{os.getpid()}-{number}"
            net = f"198.18.{os.getpid() % 256}.{4 * number}"  # addresses set aside for such tests
            start, _, last = net.rpartition(".")
            one = Machine(name, f"{start}.{int(last) + 1}", f"{start}.{int(last) + 2}")
            try:
                _ip("netns", "add", name)
                stack.callback(run, "ip", "netns", "delete", name)
                _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
                stack.callback(run, "ip", "link", "delete", name)
                _ip("address", "add", f"{one.ours}/30", "dev", name)
                _ip("link", "set", name, "up")
                _ip("-netns", name, "address", "add", f"{one.address}/30", "dev", "eth0")
                for link in ("lo", "eth0"):
                    _ip("-netns", name, "link", "set", link, "up")
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", "") or str(error)
                pytest.skip(f"no network may be made here: {said.strip()}")
            made.append(one)
        yield made


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
