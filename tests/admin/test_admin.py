"""The admin port: what it answers, to whom, and while what."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from counter.system.version import VERSION
from kit.admin_server import AdminServer
from kit.harness import (
    Command,
    Peer,
    ServerCommand,
    children,
    is_alive,
    peers,
    wait_until,
)
from kit.redis_server import RedisServer
from protocol import encode_frame
from test_server import fill

PROCESSES = pytest.mark.parametrize("processes", ["0", "2"])


@PROCESSES
def test_a_server_that_serves_is_alive_and_ready(processes: str) -> None:
    with AdminServer("--processes", processes) as server:
        assert server.get("livez") == (200, "ok\n")
        assert server.get("readyz") == (200, "ok\n")
        assert server.stop() == (0, 0)


@PROCESSES
def test_the_total_is_exact_text(processes: str) -> None:
    with AdminServer("--processes", processes, "--setTotal", str(2**64 - 10)) as server:
        with server.connect() as peer:
            peer.add(5)
        status, text = server.get("total")
        assert (status, json.loads(text)) == (200, {"total": str(2**64 - 5), "age_s": 0.0})
        assert server.metric("counter_value") == (2**64 - 5) % 2**53


@PROCESSES
def test_it_answers_while_more_connections_than_workers_are_busy(processes: str) -> None:
    with AdminServer("--processes", processes, workers=4) as server:
        load = ("--connections", "40", "--pipeline", "16", "--duration", "1m")
        with Command("client.py", "--serverAddress", server.address, *load):
            wait_until(lambda: server.metric("counter_pool_full") == 1, "every worker is taken")
            wait_until(lambda: server.metric("counter_workers_taken") == 4, "so it says")
            assert server.metric("counter_workers") == 4
            for path in ("livez", "readyz", "total", "metrics", "status", ""):
                assert server.get(path)[0] == 200
        wait_until(lambda: server.metric("counter_workers_taken") == 0, "they have gone")
        assert server.get("readyz") == (200, "ok\n")


@PROCESSES
def test_who_waits_for_a_worker_or_in_the_backlog_is_told_as_long_as_he_does(
    processes: str,
) -> None:
    limit = ("--maxConnections", "24")
    with AdminServer("--processes", processes, *limit, workers=4) as server:
        load = ("--connections", "20", "--pipeline", "16", "--duration", "1m")
        with Command("client.py", "--serverAddress", server.address, *load):
            wait_until(lambda: server.metric("counter_waiting_connections") > 0, "they wait")
            wait_until(lambda: server.metric("counter_longest_wait_seconds") > 0, "for a while")
            wait_until(
                lambda: re.fullmatch(r"ok, full: \d+ wait\n", server.get("readyz")[1]) is not None,
                "the server is ready, and says that it is full",
            )
            with peers(server.address, 10):
                wait_until(lambda: server.metric("counter_connections") == 24, "no more may come")
                wait_until(lambda: server.metric("counter_backlog_connections") == 6, "6 too many")
                wait_until(
                    lambda: server.get("readyz")[1].endswith(" 6 more in the backlog\n"),
                    "it says that some are not accepted",
                )
                assert server.metric("counter_max_connections") == 24
        wait_until(lambda: server.get("readyz") == (200, "ok\n"), "nobody waits")
        assert server.metric("counter_waiting_connections") == 0
        assert server.metric("counter_longest_wait_seconds") == 0


@pytest.mark.parametrize(
    ("processes", "names"),
    [("0", ["serving-0"]), ("2", ["admin", "master", "serving-0", "serving-1"])],
)
def test_each_process_of_the_server_is_told_of_by_name(processes: str, names: list[str]) -> None:
    with AdminServer("--processes", processes) as server:
        before_s = time.time()
        text = server.get("metrics")[1]
        for metric in ("cpu_seconds_total", "resident_memory_bytes", "open_fds",
                       "start_time_seconds"):  # fmt: skip
            labels = re.findall(rf'^process_{metric}{{process="(\S+)"}} \S+$', text, re.MULTILINE)
            assert sorted(labels) == names
        assert server.metric('process_resident_memory_bytes{process="serving-0"}') > 1e7
        assert before_s - 30 < server.metric("counter_start_time_seconds") < before_s


def test_the_start_of_the_server_stays_when_its_processes_are_replaced() -> None:
    with AdminServer("--processes", "1") as server:
        began_at_s = server.metric("counter_start_time_seconds")
        for pid in children(server.process.pid):
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: not is_alive(pid), "it is dead")  # type: ignore[misc]
        wait_until(lambda: server.get("readyz")[0] == 200, "it serves again")
        assert server.metric("counter_start_time_seconds") == began_at_s


def test_status_says_what_server_this_is() -> None:
    with AdminServer("--processes", "1") as server:
        state = json.loads(server.get("status")[1])
        assert state["address"] == server.address
        assert state["version"] == VERSION
        assert "the death of a serving process" in state["survives"]
        assert 0 < state["uptime_s"] < 60


@PROCESSES
def test_metrics_agree_with_the_client_to_the_last_request(processes: str) -> None:
    with AdminServer("--processes", processes) as server:
        client = Command(
            "client.py", "--serverAddress", server.address, "--requests", "3000", "--connections",
            "7", "--warmup", "0", "--pipeline", "5", "--json", "-",
        )  # fmt: skip
        with client:
            result = json.loads(client.output())
            assert client.finish() == 0
        assert server.metric("counter_requests_total") == result["answered"]
        assert server.metric("counter_value") == int(result["total_after"])
        assert server.metric("counter_frames_per_read_sum") == result["answered"]
        assert 0 < server.metric("counter_frames_per_read_count") <= result["answered"]
        assert server.metric("counter_connections_total") == 9  # two of them read the total


def test_a_killed_process_leaves_its_counts_and_no_gauges() -> None:
    with AdminServer("--processes", "2") as server:
        with peers(server.address, 8) as connected:
            for peer in connected:
                peer.add(1)
            states = json.loads(server.get("status")[1])["processes"]
            busiest = max(states, key=lambda state: state["requests"])
            os.kill(busiest["pid"], signal.SIGKILL)
            wait_until(
                lambda: server.metric("counter_process_restarts_total") == 1, "it is replaced"
            )
            assert server.metric("counter_requests_total") == 8
            assert server.metric("counter_connections") == 8 - busiest["connections"]
            wait_until(lambda: server.get("readyz")[0] == 200, "it is ready")
        assert server.stop()[0] == 8


def test_a_killed_admin_process_is_replaced() -> None:
    with AdminServer("--processes", "2") as server:
        serving = {state["pid"] for state in json.loads(server.get("status")[1])["processes"]}
        (admin,) = set(children(server.process.pid)) - serving
        os.kill(admin, signal.SIGKILL)
        wait_until(lambda: not is_alive(admin), "it is dead")
        assert server.get("livez") == (200, "ok\n")
        with server.connect() as peer:
            assert peer.add(1) == 1


def test_what_was_refused_is_counted_by_reason() -> None:
    with AdminServer("--maxIncrement", "5", "--frameTimeout", "100ms") as server:
        for sent in (b"c" * 16, encode_frame(6), b"abc"):
            with server.connect() as peer:
                peer.send(sent)
                peer.expect_eof()
        for reason in ("checksum", "limit", "incomplete"):
            assert server.metric(f'counter_refused_frames_total{{reason="{reason}"}}') == 1


@PROCESSES
def test_a_server_that_drains_is_not_ready_and_says_so(processes: str) -> None:
    with AdminServer("--processes", processes, "--drainTimeout", "20s") as server:
        with server.connect() as peer:
            fill(peer)  # it does not read its replies, so that the drain waits for it
            server.signal(signal.SIGTERM)
            draining = 503, "draining: the server is stopping\n"
            wait_until(lambda: server.get("readyz") == draining, "it is not ready, and says why")
            assert server.get("livez")[0] == 200
        server.farewell()


def test_a_server_whose_store_is_away_is_not_ready_until_it_is_back() -> None:
    with RedisServer() as redis:
        with AdminServer("--store", redis.url(), "--processes", "2") as server:
            with server.connect() as peer:
                assert peer.add(3) == 3
            redis.pause()
            # Nobody asks for anything: the server finds out by itself.
            wait_until(lambda: server.get("readyz")[0] == 503, "the outage shows")
            assert "has been away for" in server.get("readyz")[1]
            assert json.loads(server.get("total")[1])["total"] == "3"
            redis.resume()
            wait_until(lambda: server.get("readyz")[0] == 200, "it is back")
            assert server.metric("counter_commit_seconds_count") > 0
            assert server.stop()[0] == 3


def test_a_total_that_others_raise_is_seen_without_requests_of_our_own() -> None:
    with RedisServer() as redis:
        with (
            AdminServer("--store", redis.url()) as idle,
            ServerCommand("--store", redis.url()) as busy,
        ):
            with busy.connect() as peer:
                peer.add(7)
            wait_until(lambda: json.loads(idle.get("total")[1])["total"] == "7", "it is seen")


def test_unknown_addresses_and_methods_are_refused_with_what_there_is() -> None:
    with AdminServer("--processes", "1") as server:
        status, text = server.get("nothing")
        assert status == 404
        assert "/metrics" in text
        request = urllib.request.Request(server.admin + "total", data=b"5", method="POST")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=20)
        assert refused.value.code == 405
        refused.value.close()


def test_the_page_needs_nothing_from_elsewhere_and_has_numbers_without_its_script() -> None:
    with AdminServer("--processes", "1", "--setTotal", "16423170") as server:
        status, page = server.get("")
    assert status == 200
    assert "16,423,170" in page
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    assert "://" not in page


def test_an_admin_port_that_is_taken_is_one_line_and_exit_1() -> None:
    with AdminServer("--processes", "1") as server:
        port = server.admin.rstrip("/").rpartition(":")[2]
        with Command("server.py", "--port", "0", "--adminPort", port) as second:
            assert second.finish() == 1
            (line,) = second.errors().splitlines()
            assert "admin port" in line
            assert "already in use" in line


def test_the_ports_are_free_when_the_server_has_ended() -> None:
    with AdminServer("--processes", "2") as server:
        port = server.admin.rstrip("/").rpartition(":")[2]
        server.stop()
        with ServerCommand("--adminPort", port, port=server.address.rpartition(":")[2]):
            pass


def test_prometheus_own_tool_finds_nothing_wrong_with_the_metrics() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    with RedisServer() as redis, AdminServer("--store", redis.url(), workers=2) as server:
        with Peer(server.address) as peer:
            peer.send(b"c" * 16)
            peer.expect_eof()
            text = server.get("metrics")[1]
    done = subprocess.run(
        [promtool, "check", "metrics"], input=text, text=True, capture_output=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
