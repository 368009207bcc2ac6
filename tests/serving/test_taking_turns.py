"""More connections than workers: they take turns, nobody is locked out, and no slot is wasted."""

from __future__ import annotations

import json
import select
import signal
import socket
import subprocess
import sys
import time

import pytest

from kit.admin_server import AdminServer
from kit.harness import (
    ROOT,
    ServerCommand,
    children,
    cpu_seconds,
    peers,
    wait_until,
)
from kit.loads import result_of, start_load
from protocol import decode_totals, encode_frame

ONE = encode_frame(1)
RESET = b"\1\0\0\0\0\0\0\0"

pytestmark = pytest.mark.usefixtures("each_engine")


def reads(address: str) -> float:
    """Seconds that `client.py --read` takes."""
    began = time.monotonic()
    command = [sys.executable, "client.py", "--serverAddress", address, "--read"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - began


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_idle_connections_cost_a_newcomer_nothing(processes: int) -> None:
    with ServerCommand("--processes", str(processes), workers=4) as server:
        with peers(server.address, 200) as idle:
            for peer in idle[:50]:
                peer.add(1)
            for _ in range(20):
                with server.connect() as newcomer:
                    began = time.monotonic()
                    newcomer.add(1)
                    assert time.monotonic() - began < 1
            assert [peer.add(0) for peer in idle] == [70] * 200
        server.stop()


def test_many_that_are_always_busy_all_get_their_share() -> None:
    load = ("--connections", "30", "--processes", "1", "--duration", "1500ms", "--verify")
    with ServerCommand(workers=5) as server:
        with start_load(server.address, *load) as running, server.connect() as other:
            for _ in range(10):
                began = time.monotonic()
                other.add(0)
                # (30 / 5 + 1) slices of 50 ms; the rest is for a machine that is busy.
                assert time.monotonic() - began < 0.35 + 1
            result = result_of(running, 60)
        assert server.error_line_with("all 5 workers are taken and")
        server.stop()
    assert result["errors"] == {}
    assert result["check"]["verdict"] == "ok"


def test_a_read_beside_a_full_load_answers_in_time() -> None:
    with ServerCommand(workers=2) as server:
        with start_load(server.address, "--connections", "6", "--duration", "3s") as load:
            for _ in range(3):
                assert reads(server.address) < 1 + 2  # of which Python takes some to start
            assert result_of(load, 60)["errors"] == {}
        server.stop()


def test_an_incomplete_frame_is_kept_without_a_worker() -> None:
    with ServerCommand(workers=1) as server, server.connect() as slow:
        slow.send(ONE[:9])
        with server.connect() as other:
            for _ in range(5):
                other.add(1)
            slow.send(ONE[9:])
            assert slow.totals(1) == [6]
        server.stop()


def test_the_deadline_of_a_frame_goes_on_without_a_worker() -> None:
    with ServerCommand("--frameTimeout", "300ms", workers=1) as server:
        with server.connect() as slow, server.connect() as busy:
            slow.send(ONE[:9])
            until = time.monotonic() + 2
            while not select.select([slow.sock], [], [], 0)[0]:
                busy.add(1)
                assert time.monotonic() < until
            slow.expect_eof()
        server.error_line_with("a frame stopped after 9 bytes")


def test_a_drain_asks_for_no_worker() -> None:
    with ServerCommand(workers=1) as server, peers(server.address, 30) as crowd:
        crowd[0].add(1)
        (pid,) = children(server.process.pid)
        for peer in crowd[1:20]:
            peer.send(ONE * 3)
        assert pid
        server.signal(signal.SIGTERM)
        totals: list[int] = []
        for peer in crowd:
            totals += decode_totals(peer.everything())[0]
        assert sorted(totals) == list(range(2, 2 + 57))
        assert server.farewell() == (58, 58)


def test_a_peer_that_reset_while_it_waited_is_not_counted() -> None:
    with ServerCommand("--slice", "1h", workers=1) as server:
        load = ("--connections", "1", "--duration", "1s", "--pipeline", "64")
        with start_load(server.address, *load) as running:
            left = server.connect()
            left.send(encode_frame(10**12))
            left.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            left.close()
            result = result_of(running, 60)
        assert server.stop()[0] == int(result["answered_sum"]) < 10**12


def test_the_gauges_tell_who_waits() -> None:
    with (
        AdminServer("--processes", "1", workers=2) as server,
        start_load(server.address, "--connections", "12", "--duration", "3s") as load,
    ):
        seen: dict[str, float] = {}

        def somebody_waits() -> bool:
            seen.update(server.metrics())
            return seen["counter_waiting_connections"] > 0

        wait_until(somebody_waits, "somebody waits")
        assert seen["counter_workers_taken"] == seen["counter_workers"] == 2
        assert seen["counter_connections"] == 12
        assert seen["counter_longest_wait_seconds"] > 0
        wait_until(lambda: "full: " in server.get("readyz")[1], "it is said")
        assert server.get("readyz")[0] == 200
        assert result_of(load, 60)["errors"] == {}


def test_a_server_that_nobody_asks_uses_no_cpu() -> None:
    with ServerCommand(workers=4) as server, peers(server.address, 60) as idle:
        for peer in idle:
            peer.add(1)
        before = cpu_seconds(server.process.pid)
        idle[0].expect_silence(1.0)
        assert cpu_seconds(server.process.pid) - before <= 0.05


def test_processes_share_connections_evenly_also_beyond_their_workers() -> None:
    with AdminServer("--processes", "2", workers=4) as server:
        with peers(server.address, 40) as crowd:
            for peer in crowd:
                peer.add(1)
            rows = json.loads(server.get("status")[1])["processes"]
            few, many = sorted(row["connections"] for row in rows)
            assert few + many == 40
            assert many - few <= 4  # a process that has no CPU for a moment leaves some to others
        server.stop()
