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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection as PipeEnd
from multiprocessing.connection import Pipe

import pytest

from client import ConnectError, CounterClient, OutcomeUnknown
from kit.faults import LONG
from kit.harness import (
    PATIENCE_S,
    ROOT,
    Command,
    ServerCommand,
    children,
    is_alive,
    peers,
    wait_until,
)


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
    processes, workers, loaders, threads, kills = (
        (8, 1000, 8, 50, 100) if LONG else (4, 100, 2, 10, 15)
    )
    pick = random.Random(1)
    with ServerCommand("--processes", str(processes), workers=workers) as server:
        with adding(server.address, loaders, threads) as outcomes:
            for _ in range(kills):
                started = time.monotonic()
                before = set(children(server.process.pid))
                os.kill(pick.choice(sorted(before)), signal.SIGKILL)
                wait_until(partial(is_changed, server, before), "it is replaced")
                wait_until(partial(has_passed, started + 0.2), "0.2 s are over")
        assert len(children(server.process.pid)) == processes
        forked = children(server.process.pid)
        total, _ = server.stop()
        assert not any(map(is_alive, forked))
    totals = [total for outcome in outcomes for total in outcome.totals]
    answered = sum(outcome.answered for outcome in outcomes)
    unknown = sum(outcome.unknown for outcome in outcomes)
    print(f"{len(totals)} answered, {kills} kills, {unknown} of {total} unknown")
    assert len(set(totals)) == len(totals), "no total appears twice"
    assert answered <= total <= answered + unknown
    assert not sum(outcome.stalls for outcome in outcomes)
    assert len(totals) > 20 * kills, "the clients went on"


def has_passed(moment: float) -> bool:
    return time.monotonic() > moment


def is_changed(server: ServerCommand, before: set[int]) -> bool:
    now = set(children(server.process.pid))
    return len(now) == len(before) and now != before


@dataclass
class Outcome:
    """What the threads of a process added: sums of amounts, the totals they saw, replies missed."""

    answered: int = 0
    unknown: int = 0
    totals: list[int] = field(default_factory=list)
    stalls: int = 0


@contextmanager
def adding(address: str, processes: int, threads: int) -> Iterator[list[Outcome]]:
    """Forked processes whose threads add while the body runs; the list is filled at its end."""
    outcomes: list[Outcome] = []
    pipes = []
    for seed in range(processes):
        ours, theirs = Pipe()
        pid = os.fork()
        if not pid:
            try:
                ours.close()
                theirs.send(add_until_told(address, threads, seed, theirs))
            finally:
                os._exit(0)
        theirs.close()
        pipes.append((pid, ours))
    yield outcomes
    for _, pipe in pipes:
        pipe.send("stop")
    for pid, pipe in pipes:
        outcomes.append(pipe.recv())
        os.waitpid(pid, 0)


def add_until_told(address: str, threads: int, seed: int, pipe: PipeEnd) -> Outcome:
    stop = threading.Event()
    outcomes = [Outcome() for _ in range(threads)]
    workers = [
        threading.Thread(target=add_random, args=(address, f"{seed}-{number}", stop, outcome))
        for number, outcome in enumerate(outcomes)
    ]
    for worker in workers:
        worker.start()
    pipe.recv()
    stop.set()
    for worker in workers:
        worker.join()
    whole = Outcome()
    for outcome in outcomes:
        whole.answered += outcome.answered
        whole.unknown += outcome.unknown
        whole.totals += outcome.totals
        whole.stalls += outcome.stalls
    return whole


def add_random(address: str, seed: str, stop: threading.Event, outcome: Outcome) -> None:
    """Adds amounts below 2^32 one after the other; connects again whenever it is cut."""
    amounts = random.Random(seed)
    with CounterClient(address, timeout=8) as counter:
        while not stop.is_set():
            amount = amounts.randrange(1, 2**32)
            try:
                outcome.totals.append(counter.add(amount))
                outcome.answered += amount
            except OutcomeUnknown as error:
                outcome.unknown += amount
                outcome.stalls += "no reply within" in str(error)
            except ConnectError:
                pass


def test_without_libatomic_the_total_is_as_exact_and_the_log_says_so() -> None:
    script = (
        "import counter.totals.memory, server, sys\n"
        "def missing(*_): raise OSError('no libatomic')\n"
        "counter.totals.memory.AtomicCounter.__init__ = missing\n"
        "sys.exit(server.main(['--port', '0', '--processes', '3']))\n"
    )
    with Command("-c", script) as server:
        server.error_line_with("shared by a file lock, because libatomic is missing")
        address = server.line().split()[2]
        with adding(address, 2, 4) as outcomes:
            wait_until(partial(has_passed, time.monotonic() + 1), "a second is over")
        server.signal(signal.SIGTERM)
        assert server.finish() == 0
        totals = [total for outcome in outcomes for total in outcome.totals]
        assert len(set(totals)) == len(totals) > 100
        assert max(totals) == sum(outcome.answered for outcome in outcomes)


def test_a_server_whose_output_is_closed_is_stopped_in_order() -> None:
    """A child that fails to flush must not go on in the master's code."""
    script = f"exec {sys.executable} server.py --port 0 --processes 3 >&- 2>&-"
    process = subprocess.Popen(["sh", "-c", script], cwd=ROOT)
    try:
        wait_until(lambda: len(children(process.pid)) == 3, "three processes serve")
        wait_until(lambda: all(map(ignores_interrupts, children(process.pid))), "they have begun")
        started = time.monotonic()
        forked = children(process.pid)
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
        assert time.monotonic() - started < 4
        assert not any(map(is_alive, forked))
    finally:
        process.kill()
        process.wait()


def ignores_interrupts(pid: int) -> bool:
    with open(f"/proc/{pid}/status") as status:
        ignored = next(line for line in status if line.startswith("SigIgn"))
    return bool(int(ignored.split()[1], 16) & 1 << (signal.SIGINT - 1))


def test_a_place_that_fails_after_the_server_has_served_does_not_end_it() -> None:
    serve = """
tries = os.path.getsize('/proc/self/fd/9')
os.write(9, b'x')
if 1 < tries < 6: os._exit(3)
ready()
if tries >= 6: os.kill(os.getppid(), signal.SIGTERM)
if tries == 1: time.sleep(0.2); os._exit(1)
orders.wait()
os._exit(0)
"""
    ran = run_master(
        serve,
        before="import os, logging\nlogging.basicConfig()\nos.dup2(os.memfd_create('tries'), 9)",
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("before it was ready; another is tried in") == 4


MASTER = """
import os, signal, sys, time
from counter.processes.child import Child
from counter.processes.master import CannotBoot, Master

def serve(index, orders, ready):
{serve}

class Serving(Child):
    name = "serving process"
    def __init__(self, index): self.index = index
    def live(self, orders, ready): return serve(self.index, orders, ready)

class Program:
    def on_ready(self): print("ready", flush=True)
    def on_stop(self): pass
    def on_reload(self): return False
    def on_dump(self): pass

master = Master([Serving(0), Serving(1)], 0.5, Program())
try:
    master.run()
except CannotBoot as error:
    print(error)
    sys.exit(3)
"""


def run_master(serve: str, before: str = "") -> subprocess.CompletedProcess[str]:
    indented = "\n".join("    " + line for line in serve.splitlines())
    return run_script(before + MASTER.format(serve=indented))


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
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
    ran = run_script(script)
    assert ran.returncode == 3
    assert "cannot fork serving process 1 of 2: no process left; raise the limit" in ran.stdout


def test_a_process_that_does_not_end_is_killed_at_the_deadline() -> None:
    serve = """
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
    os.write(8, b'x')
    orders.wait()
    os._exit(0)
while not os.path.getsize('/proc/self/fd/8'): time.sleep(0.01)
time.sleep(0.2)  # the master has seen that the other is ready
count = os.path.getsize('/proc/self/fd/9')
os.write(9, b'x')
if count < 3: os._exit(1)
ready()
os.kill(os.getppid(), signal.SIGTERM)
orders.wait()
os._exit(0)
"""
    before = (
        "import os, logging\nlogging.basicConfig()\n"
        "os.dup2(os.memfd_create('ready'), 8)\nos.dup2(os.memfd_create('tries'), 9)\n"
    )
    ran = run_master(serve, before)
    assert ran.returncode == 0, ran.stderr
    delays = re.findall(r"another is tried in ([\d.]+) s", ran.stderr)
    assert delays == ["0.1", "0.2", "0.4"]
