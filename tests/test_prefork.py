"""Serving processes under their master: replaced, balanced, stopped; killed at any instant."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial

import pytest

from client import ConnectError, CounterClient, OutcomeUnknown
from harness import (
    PATIENCE_S,
    ROOT,
    ServerCommand,
    children,
    is_alive,
    peers,
    wait_until,
)
from prefork import split_evenly


@pytest.mark.parametrize(("whole", "parts"), [(40, 2), (7, 3), (3, 3), (1000, 8), (5, 1)])
def test_workers_are_split_evenly(whole: int, parts: int) -> None:
    shares = split_evenly(whole, parts)
    assert sum(shares) == whole
    assert len(shares) == parts
    assert max(shares) - min(shares) <= 1


def test_the_first_line_tells_workers_and_processes() -> None:
    with ServerCommand("--processes", "3", workers=10) as server:
        assert server.first_line.endswith("with 10 workers in 3 processes (store: memory)")
        assert len(children(server.process.pid)) == 3
    with ServerCommand("--processes", "50", workers=4) as server:
        assert server.first_line.endswith("with 4 workers in 4 processes (store: memory)")
    with ServerCommand("--processes", "0", workers=4) as server:
        assert server.first_line.endswith("with 4 workers in 1 process (store: memory)")
        assert not children(server.process.pid)


def test_a_killed_process_is_replaced_and_the_total_goes_on() -> None:
    with ServerCommand("--processes", "2") as server:
        with server.connect() as peer:
            assert peer.add(5) == 5
        before = children(server.process.pid)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: replaced(server, before), "both processes are replaced")
        server.error_line_with("was killed by signal 9 and is replaced")
        with server.connect() as peer:
            assert peer.add(1) == 6
        assert server.stop() == (6, 2)


def replaced(server: ServerCommand, before: Sequence[int]) -> bool:
    now = children(server.process.pid)
    return len(now) == len(before) and not set(now) & set(before)


def test_when_the_master_is_killed_its_processes_end_and_the_port_is_free() -> None:
    with ServerCommand("--processes", "3") as server, server.connect() as peer:
        peer.add(1)
        forked = children(server.process.pid)
        server.signal(signal.SIGKILL)
        server.finish()
        wait_until(lambda: not any(map(is_alive, forked)), "they are gone", patience_s=2)
        port = server.address.rpartition(":")[2]
        with ServerCommand(port=port) as second, second.connect() as other:
            assert other.add(1) == 1


def test_connections_are_spread_over_the_processes() -> None:
    with ServerCommand("--processes", "4", workers=800) as server:
        with peers(server.address, 200) as clients:
            for peer in clients:
                peer.add(1)
            taken = [len(os.listdir(f"/proc/{pid}/fd")) for pid in children(server.process.pid)]
            idle = min_descriptors(server)
            connections = [count - idle for count in taken]
            assert sum(connections) >= 200
            assert max(connections) <= 2 * min(connections)


def min_descriptors(server: ServerCommand) -> int:
    """What a serving process has open without a connection: what its fresh twin has."""
    with ServerCommand("--processes", "4", workers=800) as fresh:
        return min(len(os.listdir(f"/proc/{pid}/fd")) for pid in children(fresh.process.pid))


def test_no_connection_waits_while_any_process_has_a_free_worker() -> None:
    with ServerCommand("--processes", "4", workers=12) as server:
        with peers(server.address, 12) as clients:
            for peer in clients:
                peer.add(1)
            clients[7].close()
            with server.connect() as next_peer:
                assert next_peer.add(1) == 13


@pytest.mark.parametrize("processes", ["1", "3"])
def test_a_second_signal_ends_everything_at_once(processes: str) -> None:
    with ServerCommand("--processes", processes, "--drainTimeout", "1h") as server:
        with server.connect() as peer:
            peer.add(1)
            server.signal(signal.SIGTERM)
            peer.expect_eof()
            server.signal(signal.SIGTERM)
            assert server.farewell() == (1, 1)


def test_killing_random_processes_under_load_loses_no_answered_addition() -> None:
    kills, clients = 10, 20
    with ServerCommand("--processes", "4", workers=100) as server:
        adders = [Adder(server.address, seed) for seed in range(clients)]
        for adder in adders:
            adder.start()
        pick = random.Random(1)
        for _ in range(kills):
            before = set(children(server.process.pid))
            wait_until(lambda: all(adder.progressed() for adder in adders), "all clients go on")
            os.kill(pick.choice(sorted(before)), signal.SIGKILL)
            wait_until(partial(is_changed, server, before), "it is replaced")
        for adder in adders:
            adder.stop.set()
        for adder in adders:
            adder.join(PATIENCE_S)
        answered = sum(adder.answered for adder in adders)
        unknown = sum(adder.unknown for adder in adders)
        totals = [total for adder in adders for total in adder.totals]
        assert len(set(totals)) == len(totals), "no total appears twice"
        forked = children(server.process.pid)
        total, _ = server.stop()
        assert answered <= total <= answered + unknown
        assert not any(map(is_alive, forked))


def is_changed(server: ServerCommand, before: set[int]) -> bool:
    now = set(children(server.process.pid))
    return len(now) == len(before) and now != before


class Adder(threading.Thread):
    """Adds random amounts below 2^32 until it is told to stop; reconnects when it is cut."""

    def __init__(self, address: str, seed: int) -> None:
        super().__init__()
        self.stop = threading.Event()
        self.answered = self.unknown = 0
        self.totals: list[int] = []
        self._client = CounterClient(address)
        self._amounts = random.Random(seed)
        self._seen = 0

    def run(self) -> None:
        with self._client:
            while not self.stop.is_set():
                amount = self._amounts.randrange(1, 2**32)
                try:
                    self.totals.append(self._client.add(amount))
                    self.answered += amount
                except OutcomeUnknown:
                    self.unknown += amount
                except ConnectError:
                    pass

    def progressed(self) -> bool:
        """Whether it had an answer since this was asked last."""
        seen, self._seen = self._seen, len(self.totals)
        return self._seen > seen


MASTER = """
import os, signal, sys, time
from prefork import CannotBoot, Master

def serve(index, ready):
{serve}

def on_ready():
    print("ready", flush=True)

master = Master(2, serve, 0.5, lambda index: None)
try:
    master.run(on_ready, lambda: None)
except CannotBoot as error:
    print(error)
    sys.exit(3)
"""


def run_master(serve: str) -> subprocess.CompletedProcess[str]:
    indented = "\n".join("    " + line for line in serve.splitlines())
    return subprocess.run(
        [sys.executable, "-c", MASTER.format(serve=indented)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    "serve",
    ["return 3", "raise RuntimeError('no store')", "os.kill(os.getpid(), signal.SIGKILL)"],
)
def test_processes_that_cannot_start_stop_the_master_with_exit_3(serve: str) -> None:
    ran = run_master(serve)
    assert ran.returncode == 3
    assert re.search(r"serving process \d+ .* before it was ready", ran.stdout)


def test_a_failed_fork_at_the_start_says_so_and_what_to_do() -> None:
    script = MASTER.format(serve="    return 0").replace(
        "master = ",
        "def fork(): raise OSError(11, 'no process left')\nos.fork = fork\nmaster = ",
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ran.returncode == 3
    assert "cannot fork serving process 1 of 2: no process left; raise the limit" in ran.stdout


def test_a_process_that_does_not_end_is_killed_at_the_deadline() -> None:
    serve = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ready()
if index: os.kill(os.getppid(), signal.SIGTERM)
while True: time.sleep(60)
"""
    started = time.monotonic()
    ran = run_master(serve)
    assert ran.returncode == 0
    assert "did not end and are killed" in ran.stderr
    assert time.monotonic() - started < 10


def test_one_that_dies_before_it_is_ready_is_tried_again_more_slowly() -> None:
    serve = """
if index == 0:
    ready()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    while True: time.sleep(60)
count = os.path.getsize('/proc/self/fd/9')
os.write(9, b'x')
if count < 3: os._exit(1)
ready()
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
os.kill(os.getppid(), signal.SIGTERM)
while True: time.sleep(60)
"""
    script = MASTER.format(serve="\n".join("    " + line for line in serve.splitlines()))
    script = (
        "import os, logging\nlogging.basicConfig()\nos.dup2(os.memfd_create('tries'), 9)\n" + script
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    delays = re.findall(r"another is tried in ([\d.]+) s", ran.stderr)
    assert delays == ["0.1", "0.2", "0.4"]
