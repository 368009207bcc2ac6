"""Hostile peers, bad networks, jumping clocks, long runs: the good clients' totals stay exact.

Short forms run always; LONG=1 (make chaos) runs the long ones and prints their figures.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from client import ConnectError, CounterClient, OutcomeUnknown
from kit.harness import ROOT, Command, Peer, ScriptedServer, ServerCommand, children, wait_until
from kit.hostile import WAYS, memory_kb, nuisances
from kit.loads import result_of, start_load
from protocol import encode_frame, parse_address

pytestmark = pytest.mark.usefixtures("each_engine")

LONG = os.environ.get("LONG") == "1"
ONE = encode_frame(1)
KEPT_WITHIN = 1.05  # what memory may have grown by since the first tenth


def has_passed(moment: float) -> bool:
    return time.monotonic() > moment


# A crowd of hostile peers.


@pytest.mark.timeout(600 if LONG else 120)
def test_good_clients_stay_exact_among_hostile_ones_in_eight_ways() -> None:
    everybody, good, processes = (10_000, 100, 2) if LONG else (400, 20, 1)
    measured_s, warmup_s = (20, 6) if LONG else (3, 2)
    many = everybody - good
    most = 1500 if LONG else 200  # so there are as many as may be all the time
    workers = most // 10  # and they take turns
    raise_descriptor_limit()
    timeouts = ("--frameTimeout", "2s", "--idleTimeout", "1s", "--writeTimeout", "2s")
    limits = ("--maxConnections", str(most), "--backlog", "4096", "--processes", str(processes))
    with ServerCommand(*limits, *timeouts, workers=workers) as server:
        if LONG:
            spread_over_all_cpus(server)
        pids = children(server.process.pid)
        crowd = ("--connections", str(good))
        with start_load(server.address, *crowd, "--duration", "5s" if LONG else "1s") as load:
            before = result_of(load, 60)
        times = ("--warmup", f"{warmup_s}s", "--duration", f"{measured_s}s")
        with server.connect() as observer, start_load(server.address, *crowd, *times) as load:
            total = observer.add(0)
            wait_until(lambda: observer.add(0) > total + good, "the good ones have their workers")
            until = time.monotonic() + warmup_s + measured_s
            with nuisances(server.address, many, 2 if LONG else 1) as done:
                wait_until(partial(has_passed, until), "it is over", measured_s + warmup_s + 20)
                memory = memory_kb(pids)
            during = result_of(load, 60)
        assert children(server.process.pid) == pids, "no process has died"
        assert server.stop()[0] == int(before["answered_sum"]) + int(during["answered_sum"])
        log = server.errors()
    print(
        f"\n{many} hostile and {good} good, {most} open, "
        f"{workers} workers in {processes} processes; hostile connections ended: {dict(done)}\n"
        f"before: {figures(before)}\nduring: {figures(during)}\n"
        f"memory: {sorted(memory.values())} KB; log: {len(log)} bytes"
    )
    for result in (before, during):
        assert result["check"]["verdict"] == "ok"
        assert result["errors"] == {}
        assert result["answered"] == result["sent"]
    assert all(done[way] for way in WAYS), done
    assert f"all {most} connections are open" in log
    assert f"all {workers} workers are taken" in log
    assert "Traceback" not in log
    assert len(log) < 100_000
    assert max(memory.values()) < (1_500_000 if LONG else 300_000)


def figures(result: dict[str, Any]) -> str:
    latency = result["latency_ns"]
    return f"{result['requests_per_s']:,.0f} requests/s, p99 {latency['p99'] / 1e6:.2f} ms"


def raise_descriptor_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def spread_over_all_cpus(server: ServerCommand) -> None:
    for pid in (server.process.pid, *children(server.process.pid)):
        os.sched_setaffinity(pid, os.sched_getaffinity(0))


# Clocks.

JUMPING_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#include <sys/syscall.h>

/* The wall clock goes a day forth and back ten times a second. */
static long jump(void) {
    struct timespec now;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
    return now.tv_nsec / 50000000 % 2 ? 86400 : -86400;
}
int clock_gettime(clockid_t id, struct timespec *at) {
    int code = (int)syscall(SYS_clock_gettime, id, at);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) at->tv_sec += jump();
    return code;
}
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.fixture(name="jumping")
def environment_with_a_jumping_clock(tmp_path: Path) -> dict[str, str]:
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler: the clock of a process cannot be replaced")
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(JUMPING_CLOCK)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return {"LD_PRELOAD": str(library)}


@contextmanager
def served_with(environment: dict[str, str], *arguments: str) -> Iterator[tuple[Command, str]]:
    with Command("server.py", "--port", "0", *arguments, environment=environment) as command:
        yield command, command.line().split()[2]


def test_the_wall_clock_plays_no_part_in_any_deadline(jumping: dict[str, str]) -> None:
    timeouts = ("--frameTimeout", "500ms", "--idleTimeout", "600ms", "--writeTimeout", "500ms")
    one_worker = (
        "--multiplier",
        "1",
        "--processes",
        "1",
        "--maxConnections",
        str(len(os.sched_getaffinity(0))),
    )
    script = (
        "import time; times = [time.time() for _ in range(10**6)]; print(max(times) - min(times))"
    )
    with Command("-c", script, environment=jumping) as check:
        assert float(check.line()) > 100_000, "the clock does jump"
    with served_with(jumping, *timeouts, "--processes", "1") as (server, address):
        with Peer(address) as idle, Peer(address) as half:
            assert idle.add(1) == 1
            started = time.monotonic()
            half.send(ONE[:9])
            half.expect_silence(0.4)
            half.expect_eof()
            assert 0.4 < time.monotonic() - started < 3
            assert idle.add(1) == 2
        with Peer(address) as deaf:
            deaf.sock.settimeout(0.3)
            with suppress(TimeoutError):
                while True:
                    deaf.send(ONE * 4096)
            server.error_line_with("does not read its replies")
        server.signal(signal.SIGTERM)
        assert server.finish() == 0
    with served_with(jumping, *timeouts, *one_worker, "--drainTimeout", "500ms") as (
        server,
        address,
    ):
        workers = len(os.sched_getaffinity(0))
        idle_ones = [Peer(address) for _ in range(workers)]
        try:
            for peer in idle_ones:
                peer.add(1)
            started = time.monotonic()
            with Peer(address) as waiting:
                assert waiting.add(1) == workers + 1
                assert 0.5 < time.monotonic() - started < 3
        finally:
            for peer in idle_ones:
                peer.close()
        server.signal(signal.SIGTERM)
        assert server.finish() == 0


def test_the_load_generator_measures_by_a_clock_that_does_not_jump(
    jumping: dict[str, str],
) -> None:
    with ServerCommand() as server:
        with Command(
            *("client.py", "--serverAddress", server.address, "--json", "-"),
            *("--duration", "500ms", "--warmup", "200ms", "--rate", "1000"),
            environment=jumping,
        ) as client:
            assert client.finish() == 0
            result = json.loads(client.output())
        assert 0.4 < result["elapsed_s"] < 2
        assert 0 < result["latency_ns"]["max"] < 2e9
        assert result["check"]["verdict"] == "ok"


# A network that delays, splits, stalls and cuts.


class FaultProxy(ScriptedServer):
    """Stands between client and server, does what a bad network does, and keeps the books.

    `forwarded` has what went to the server on each connection, all of which the server reads: that
    side always ends with FIN. So the frames in it are those that count.
    """

    def __init__(self, server: str, seed: int) -> None:
        super().__init__(self._relay)
        self._server = parse_address(server)
        self._random = random.Random(seed)
        self._choosing = threading.Lock()
        self.forwarded: list[bytearray] = []
        self.faults: dict[str, int] = {}
        self._pause = threading.Event()  # never set: a wait that lasts its time

    def _choose(self) -> tuple[str, random.Random]:
        """What becomes of a connection."""
        with self._choosing:
            fault = self._random.choice(["none", "split", "delay", "stall", "cut", "reset"])
            self.faults[fault] = self.faults.get(fault, 0) + 1
            return fault, random.Random(self._random.random())

    def _relay(self, client: socket.socket) -> None:
        fault, pick = self._choose()
        books = bytearray()
        self.forwarded.append(books)
        server = socket.create_connection(self._server, 20)
        for sock in (client, server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        cut_after = pick.randrange(1, 20_000) if fault in ("cut", "reset") else 1 << 60
        up_is_cut = pick.random() < 0.5
        up = partial(self._pump, client, server, fault, pick, cut_after if up_is_cut else 1 << 60)
        upward = threading.Thread(target=up, args=(books,))
        upward.start()
        self._pump(server, client, fault, pick, 1 << 60 if up_is_cut else cut_after, None)
        self._end(client, fault)
        upward.join()
        with suppress(OSError):
            while server.recv(65536):
                pass
        server.close()
        client.close()

    def _pump(
        self,
        source: socket.socket,
        sink: socket.socket,
        fault: str,
        pick: random.Random,
        left: int,
        books: bytearray | None,
    ) -> None:
        """Moves bytes until one side ends or the cut is due; the server's side ends with FIN."""
        with suppress(OSError):
            while left > 0 and (data := source.recv(pick.randrange(1, 2000))):
                data = data[:left]
                left -= len(data)
                step = {"split": 1, "delay": 500, "stall": 700}.get(fault, len(data))
                for start in range(0, len(data), step):
                    if fault == "delay":
                        self._pause.wait(pick.uniform(0, 0.01))
                    elif fault == "stall" and pick.random() < 0.05:
                        self._pause.wait(0.3)
                    part = data[start : start + step]
                    sink.sendall(part)
                    if books is not None:
                        books += part
        if books is not None:
            with suppress(OSError):
                sink.shutdown(socket.SHUT_WR)
            if left <= 0:
                self._end(source, fault)

    @staticmethod
    def _end(client: socket.socket, fault: str) -> None:
        with suppress(OSError):
            if fault == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.shutdown(socket.SHUT_RDWR)


@pytest.mark.timeout(300)
def test_behind_a_network_that_delays_splits_stalls_and_cuts_the_books_agree() -> None:
    threads, seconds = (40, 60.0) if LONG else (12, 4.0)
    books = [Books() for _ in range(threads)]
    with ServerCommand("--processes", "2", workers=200) as server:
        with FaultProxy(server.address, seed=7) as proxy:
            stop_at = time.monotonic() + seconds
            adders = [
                threading.Thread(target=one.keep, args=(proxy.address, seed, stop_at))
                for seed, one in enumerate(books)
            ]
            for adder in adders:
                adder.start()
            for adder in adders:
                adder.join()
        total, requests = server.stop()
    counted = [amount for stream in proxy.forwarded for amount in amounts_in(bytes(stream))]
    assert total == sum(counted)
    assert requests == len(counted)
    totals = [total for one in books for total in one.totals]
    assert len(set(totals)) == len(totals)
    answered, unknown = sum(one.answered for one in books), sum(one.unknown for one in books)
    assert answered <= total <= answered + unknown
    print(
        f"\n{len(totals)} answered, {total - answered} of {unknown} unknown counted; "
        f"connections: {proxy.faults}"
    )
    assert set(proxy.faults) == {"none", "split", "delay", "stall", "cut", "reset"}
    assert len(totals) > 1000
    assert unknown


def amounts_in(stream: bytes) -> Sequence[int]:
    """The amounts of the whole frames of a stream, all of them good."""
    return [int.from_bytes(stream[at : at + 8]) for at in range(0, len(stream) - 15, 16)]


class Books:
    """What one client knows of its own additions."""

    def __init__(self) -> None:
        self.answered = 0
        self.unknown = 0
        self.totals: list[int] = []

    def keep(self, address: str, seed: int, stop_at: float) -> None:
        pick = random.Random(seed)
        while time.monotonic() < stop_at:
            # A new client after a while, so that every kind of connection is met.
            with CounterClient(address, timeout=10) as counter:
                for _ in range(pick.randrange(1, 8)):
                    amounts = [pick.randrange(1, 2**32) for _ in range(pick.choice([1, 3, 400]))]
                    try:
                        totals = counter.add_many(amounts)
                    except OutcomeUnknown as error:
                        totals = list(error.totals)
                        self.unknown += sum(error.amounts)
                    except ConnectError:
                        continue
                    self.totals += totals
                    self.answered += sum(amounts[: len(totals)])


# Two machines with a cable between them.


class TwoMachines:
    """Two network namespaces joined by a cable that can be pulled."""

    def __init__(self) -> None:
        name = f"t{os.getpid()}"
        self.server, self.client = f"{name}s", f"{name}c"
        self.cable = f"{name}v"
        self.host = "10.77.0.1"

    def __enter__(self) -> TwoMachines:
        try:
            for space in (self.server, self.client):
                ip("netns", "add", space)
            far = f"{self.cable}1"
            ip("link", "add", self.cable, "netns", self.server, "type", "veth", "peer", "name", far)
            ip("link", "set", far, "netns", self.client)
            for space, device, address in (
                (self.server, self.cable, self.host),
                (self.client, far, "10.77.0.2"),
            ):
                ip("-n", space, "addr", "add", f"{address}/24", "dev", device)
                ip("-n", space, "link", "set", "lo", "up")
                ip("-n", space, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            self.__exit__()
            pytest.skip(f"network namespaces are not permitted: {error.stderr.strip()}")
        return self

    def __exit__(self, *_: object) -> None:
        for space in (self.server, self.client):
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)

    def pull(self) -> None:
        ip("-n", self.server, "link", "set", self.cable, "down")

    def plug_in(self) -> None:
        ip("-n", self.server, "link", "set", self.cable, "up")

    def run(self, space: str, *arguments: str) -> Command:
        """A command of the project on one of the two."""
        words = ["ip", "netns", "exec", space, sys.executable, *arguments]
        return Command("-c", f"import os; os.execvp('ip', {words!r})")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


@pytest.fixture(name="machines")
def two_machines() -> Iterator[TwoMachines]:
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the ip command")
    with TwoMachines() as machines:
        yield machines


@pytest.mark.parametrize("timeout_s", [20, 1])
def test_a_link_that_goes_down_and_comes_back_costs_time_and_no_addition(
    machines: TwoMachines, timeout_s: int
) -> None:
    """Longer than the outage, the timeout loses nothing; shorter, what is unknown is said so."""
    outage_s = 2.0
    with machines.run(
        machines.server, "server.py", "--host", machines.host, "--port", "0"
    ) as server:
        address = server.line().split()[2]
        with machines.run(
            *(machines.client, "client.py", "--serverAddress", address, "--json", "-"),
            *("--duration", "6s", "--warmup", "0s", "--connections", "20", "--amount", "1"),
            *("--timeout", f"{timeout_s}s"),
        ) as client:
            wait_until(partial(has_total, machines, address), "the load has begun")
            machines.pull()
            wait_until(partial(has_passed, time.monotonic() + outage_s), "the outage is over")
            machines.plug_in()
            code = client.finish(60)
            result = json.loads(client.output())
        server.signal(signal.SIGTERM)
        total = int(re.sub(r"\D", "", server.line()))
        assert server.finish() == 0
    answered, unknown = int(result["answered_sum"]), int(result["unknown_sum"])
    assert answered <= total <= answered + unknown
    assert answered > 1000
    assert result["check"]["verdict"] == "ok" or unknown
    if timeout_s > outage_s:
        assert (code, result["errors"], unknown) == (0, {}, 0)
        assert total == answered
        assert result["latency_ns"]["max"] > outage_s * 0.9e9
    else:
        assert code == 5
        assert result["errors"]["timeout"] >= 20
        assert unknown


def has_total(machines: TwoMachines, address: str) -> bool:
    """Whether the total has risen, asked on the server's own machine."""
    reading = machines.run(machines.server, "client.py", "--serverAddress", address, "--read")
    with reading as command:
        return int(command.line()) > 500


# Long runs.


@pytest.mark.timeout(1200 if LONG else 120)
def test_memory_is_flat_over_many_connections_and_frames(tmp_path: Path) -> None:
    with ServerCommand("--processes", "2", workers=400) as server:
        pids = [server.process.pid, *children(server.process.pid)]
        run = partial(long_round, compile_generator(tmp_path)) if LONG else short_round
        first: dict[int, int] = {}
        connections = frames = 0
        for number in range(10):
            made, sent = run(server)
            connections += made
            frames += sent
            first = first or memory_kb(pids)
            if LONG:
                print(f"\nafter {connections:,} connections, {frames:,} frames:", memory_kb(pids))
            assert children(server.process.pid) == pids[1:], f"a process died in round {number}"
        last = memory_kb(pids)
        server.stop()
        assert server.errors().count("WARNING") == 0
    print(f"\n{connections:,} connections, {frames:,} frames: {first} KB, then {last} KB")
    assert connections >= (1_000_000 if LONG else 10_000)
    assert frames >= (10_000_000 if LONG else 100_000)
    for pid, memory in last.items():
        assert memory <= first[pid] * KEPT_WITHIN


def short_round(server: ServerCommand) -> tuple[int, int]:
    for _ in range(1000):
        with server.connect() as peer:
            peer.add(1)
    with server.connect() as peer:
        for _ in range(5):
            peer.send(ONE * 2000)
            peer.totals(2000)
    return 1001, 11_000


def compile_generator(folder: Path) -> Path:
    program = folder / "generator"
    source = ROOT / "benchmarks" / "generator.c"
    subprocess.run(["cc", "-O2", "-o", program, source], check=True)
    return program


def long_round(generator: Path, server: ServerCommand) -> tuple[int, int]:
    """At least a hundred thousand connections and a million frames."""
    spread_over_all_cpus(server)
    port = str(parse_address(server.address)[1])
    connections = frames = 0
    while connections < 100_000:
        connections += generated(generator, port, "--mode", "churn", "--seconds", "5")
    while frames < 1_000_000:
        frames += generated(generator, port, "--in-flight", "64", "--seconds", "1")
    return connections, connections + frames


def generated(generator: Path, port: str, *arguments: str) -> int:
    ran = subprocess.run(
        [generator, "--port", port, "--connections", "40", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return int(json.loads(ran.stdout)["requests"])
