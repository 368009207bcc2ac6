"""python client.py against the real server, and against servers that are wrong or gone."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kit.harness import (
    ROOT,
    Command,
    ScriptedServer,
    ServerCommand,
    children,
    cpu_seconds,
    is_alive,
    read_terminal_until,
    receive_exactly,
    run_in_terminal,
    wait_until,
)
from kit.played import engine, needs
from protocol import encode_total

__all__ = ["engine"]


def client(address: str, *arguments: str) -> Command:
    return Command("client.py", "--serverAddress", address, *arguments)


def run_client(address: str, *arguments: str) -> tuple[int, str]:
    """Runs a client to its end; its exit code, and its standard output and error."""
    with client(address, *arguments) as command:
        code = command.finish(60)
        return code, command.output() + command.errors()


SHORT = ("--duration", "500ms", "--warmup", "100ms")


def test_a_run_reports_what_the_server_counted() -> None:
    with ServerCommand() as server:
        code, shown = run_client(server.address, *SHORT)
        assert code == 0, shown
        assert shown.startswith("All clients finished after 0.5 s.")
        counts = re.search(r"([\d,]+) sent, ([\d,]+) answered", shown)
        assert counts
        assert counts[1] == counts[2]
        assert "errors    none" in shown
        assert "check     ok: the total grew by exactly" in shown
        _, requests = server.stop()
        assert requests == int(counts[2].replace(",", ""))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--processes", "1", "--connections", "3"],
        ["--processes", "3", "--connections", "7", "--pipeline", "16"],
        ["--pipeline", "700", "--amount", "1-1000"],
        ["--amount", "0-18446744073709551615", "--pipeline", "8"],
        ["--amount", "0"],
        ["--connections", "2", "--pipeline", "65536"],
    ],
)
def test_every_kind_of_load_is_counted_exactly(arguments: list[str]) -> None:
    with ServerCommand("--multiplier", "100") as server:
        code, shown = run_client(server.address, *SHORT, *arguments)
        assert code == 0, shown
        assert "check     ok: the total grew by exactly" in shown


def test_requests_bound_a_run_exactly(engine: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    with ServerCommand() as server:
        code, shown = run_client(
            *(server.address, "--requests", "5001", "--warmup", "0", "--json", str(file)),
            *("--engine", engine),
        )
        assert code == 0, shown
        result = json.loads(file.read_text())
        assert result["version"] == 1
        assert result["measured"] == 5001
        assert result["answered"] == result["sent"] == 5003
        assert result["engine"] == engine
        assert result["latency_ns"]["p50"] <= result["latency_ns"]["p99"]
        assert server.stop() == (5001, 5003)


@pytest.mark.parametrize(
    ("arguments", "engine"),
    [
        ([], "compiled"),
        (["--pipeline", "16", "--amount", "7"], "compiled"),
        (["--engine", "plain"], "plain"),
        (["--rate", "2000"], "plain"),
        (["--engine", "compiled", "--amount", "1-2"], "plain"),
    ],
)
def test_the_report_says_what_served_the_connections(
    arguments: list[str], engine: str, tmp_path: Path
) -> None:
    needs(engine)
    file = tmp_path / "result.json"
    with ServerCommand() as server:
        bounds = ("--requests", "200", "--warmup", "0", "--json", str(file))
        code, shown = run_client(server.address, *bounds, *arguments)
        assert code == 0, shown
        assert json.loads(file.read_text())["engine"] == engine


def test_an_engine_that_is_not_there_is_a_usage_error_with_the_remedy() -> None:
    code = """
import sys
import client
from counter.turn import library
library.NAME = "no_such_library"
sys.exit(client.main(["--engine", sys.argv[1], "--serverAddress", sys.argv[2]]))
"""
    with ServerCommand() as server:
        ran = subprocess.run(
            [sys.executable, "-c", code, "compiled", server.address],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 2
        why = "it is not installed; pip install -r requirements.txt builds it"
        assert ran.stderr == f"client.py: --engine compiled: {why}\n"


def test_json_on_standard_output_leaves_the_table_to_standard_error() -> None:
    with ServerCommand() as server, client(server.address, *SHORT, "--json", "-") as command:
        assert command.finish() == 0
        assert json.loads(command.output())["check"]["verdict"] == "ok"
        assert "All clients finished" in command.errors()


def test_add_and_read_print_the_total() -> None:
    with ServerCommand() as server:
        assert run_client(server.address, "--add", "5") == (0, "5\n")
        assert run_client(server.address, "--read") == (0, "5\n")


def test_a_lack_of_descriptors_is_said_with_the_remedy() -> None:
    with ServerCommand("--multiplier", "100") as server:
        arguments = ("--connections", "40", "--processes", "1", *SHORT)
        with Command(
            "client.py", "--serverAddress", server.address, *arguments, descriptors=30
        ) as command:
            assert command.finish() == 5
            shown = command.output()
            assert "connect: too many open files: " in shown
            assert "note      raise the descriptor limit (ulimit -n), or lower" in shown
            assert "check     ok: the total grew by exactly" in shown


@pytest.mark.parametrize("arguments", [[], ["--processes", "2"], ["--verify"]])
def test_too_few_descriptors_to_begin_are_one_line_with_the_remedy(arguments: list[str]) -> None:
    with ServerCommand() as server:
        with Command(
            "client.py", "--serverAddress", server.address, *SHORT, *arguments, descriptors=8
        ) as command:
            assert command.finish() in (1, 2)
            (why,) = command.errors().splitlines()
            assert "too many open files" in why.lower()
            assert "(ulimit -n)" in why


def test_a_load_process_has_no_threads() -> None:
    """Those that NumPy would start multiply matrices, and cannot start where they are limited."""
    with ServerCommand() as server:
        arguments = ("--duration", "1h", "--pipeline", "128", "--processes", "1", "--verify")
        with client(server.address, *arguments) as command:
            command.error_line_with("Starting")
            (load,) = children(command.process.pid)
            assert len(os.listdir(f"/proc/{load}/task")) == 1
            assert b"numpy" in Path(f"/proc/{load}/maps").read_bytes()


def test_connections_that_are_not_accepted_are_errors_that_are_reported() -> None:
    with ServerCommand("--maxConnections", "2", workers=2) as server:
        code, shown = run_client(
            server.address, *SHORT, "--connections", "3", "--processes", "1", "--timeout", "300ms"
        )
        assert code == 5, shown
        assert re.search(r"errors    timeout: \d", shown), shown
        assert "check     ok" in shown


def test_a_server_that_is_not_there_is_exit_1_with_the_address_and_the_remedy() -> None:
    for arguments in (["--read"], list(SHORT)):
        code, shown = run_client("127.0.0.1:1", *arguments)
        assert code == 1
        assert "cannot connect to 127.0.0.1:1: connection refused" in shown
        assert "python server.py" in shown
        assert shown.count("\n") == 1


def test_usage_errors_are_exit_2_and_one_line() -> None:
    for arguments in (
        ["--amount", "9-1"],
        ["--duration", "soon"],
        ["--serverAddress", "localhost"],
        ["--read", "--add", "1"],
        ["--json", "/no/such/folder/x.json"],
        ["--conections", "4"],
    ):
        code, shown = run_client("127.0.0.1:1", *arguments)
        assert code == 2, shown
        assert shown.count("\n") == 1, shown


def test_a_server_that_dies_in_mid_run_is_errors_and_a_report(engine: str) -> None:
    with ServerCommand() as server:
        arguments = ("--duration", "2s", "--warmup", "0", "--engine", engine)
        with client(server.address, *arguments) as command:
            wait_for_load(server)
            server.signal(signal.SIGKILL)
            assert command.finish() == 5
            shown = command.output()
            assert "connect: connection refused" in shown
            assert "outcome unknown:" in shown
            assert "not checked: the server's total could not be read" in shown


def test_a_server_that_comes_back_is_connected_to_again() -> None:
    with ServerCommand() as server:
        port = server.address.rpartition(":")[2]
        with client(server.address, "--duration", "1m", "--warmup", "0") as command:
            wait_for_load(server)
            server.stop()
            with ServerCommand(port=port) as second:
                wait_for_load(second)
                command.signal(signal.SIGINT)
                assert command.finish() == 4, "the new server's total is below the old one's"
                assert "; was the server restarted?" in command.output()
                _, requests = second.stop()
                assert requests > 100


def answer_with(totals: list[int], doubled: int = -1) -> Callable[[socket.socket], None]:
    """A script that answers frame by frame, over all connections, and one answer twice."""
    left = list(enumerate(totals))

    def script(sock: socket.socket) -> None:
        while left:
            receive_exactly(sock, 16)
            number, total = left.pop(0)
            sock.sendall(encode_total(total) * (1 + (number == doubled)))
        receive_exactly(sock, 16)

    return script


@pytest.mark.parametrize(
    ("totals", "expected"),
    [
        ([0, 5, 4, 6, 6], "4 after 5, where 1 was added"),
        ([0, 1, 1, 2, 3], "1 after 1, where 1 was added"),
        ([0, 1, 2, 3, 1], "the total grew by 1, less than the 3 answered"),
        ([0, 2**63 + 5, 7, 8, 8], "where 1 was added"),
    ],
)
def test_wrong_totals_are_exit_4_with_an_example(totals: list[int], expected: str) -> None:
    with ScriptedServer(answer_with(totals)) as server:
        code, shown = run_client(
            server.address, "--connections", "1", "--requests", "3", "--warmup", "0"
        )
        assert code == 4, shown
        assert "check     wrong" in shown
        assert expected in shown


def test_replies_that_nothing_asked_for_are_wrong() -> None:
    with ScriptedServer(answer_with([0, 1, 2, 3], doubled=1)) as server:
        code, shown = run_client(
            server.address, "--connections", "1", "--requests", "2", "--warmup", "0"
        )
        assert code == 4, shown
        assert "1 replies that nothing asked for" in shown


def test_a_silent_server_does_not_hold_the_client_longer_than_its_timeouts() -> None:
    with ScriptedServer(lambda sock: receive_exactly(sock, 10**6)) as server:
        started = time.monotonic()
        code, shown = run_client(
            server.address, "--connections", "30", "--timeout", "500ms", *SHORT
        )
        assert code == 5, shown
        assert time.monotonic() - started < 8, "one timeout before, one in, one after the run"


def test_a_stall_at_the_end_of_a_run_counts_in_its_rate(tmp_path: Path) -> None:
    file = tmp_path / "result.json"

    def script(sock: socket.socket) -> None:
        stalled = threading.Event()
        for total in range(10**6):
            receive_exactly(sock, 16)
            if total == 100:
                stalled.wait(2)
            sock.sendall(encode_total(total))

    with ScriptedServer(script) as server:
        arguments = ("--connections", "1", "--duration", "1s", "--warmup", "0", "--timeout", "5s")
        run_client(server.address, *arguments, "--json", str(file))
        result = json.loads(file.read_text())
        assert result["elapsed_s"] >= 1
        assert result["measured"] <= 102


def counting_to(last: int, stalls_at: int, stall_s: float) -> Callable[[socket.socket], None]:
    """A script that answers with 0 up to a last total, and takes its time for one of the frames."""
    answered = itertools.count()

    def script(sock: socket.socket) -> None:
        while True:
            receive_exactly(sock, 16)
            number = next(answered)
            if number == stalls_at:
                threading.Event().wait(stall_s)
            sock.sendall(encode_total(min(number, last)))

    return script


def test_the_closing_read_is_not_among_the_latencies(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    with ScriptedServer(counting_to(20, stalls_at=21, stall_s=0.6)) as server:
        arguments = ("--connections", "1", "--requests", "20", "--warmup", "0")
        code, shown = run_client(server.address, *arguments, "--json", str(file))
        assert code == 0, shown
        result = json.loads(file.read_text())
        assert result["measured"] == 20
        assert result["latency_ns"]["max"] < 500e6


def test_a_load_process_that_is_killed_makes_the_check_undecided() -> None:
    with ServerCommand() as server:
        with client(server.address, "--duration", "3s", "--processes", "2") as command:
            wait_for_load(server)
            os.kill(children(command.process.pid)[0], signal.SIGKILL)
            assert command.finish() == 5
            shown = command.output()
            assert "check     not checked: a load process died" in shown


def test_a_load_process_that_dies_before_the_load_is_exit_5() -> None:
    asked = threading.Event()

    def script(sock: socket.socket) -> None:
        receive_exactly(sock, 16)
        asked.set()
        sock.recv(1)

    with ScriptedServer(script) as server, client(server.address, *SHORT) as command:
        assert asked.wait(20)
        os.kill(children(command.process.pid)[0], signal.SIGKILL)
        assert command.finish() == 5
        assert command.errors() == "client.py: a load process died before the load began\n"


NO_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
NO_FORKS = """
import errno, os
def fork(): raise OSError(errno.EAGAIN, "no process left")
os.fork = fork
"""


@pytest.mark.parametrize(
    ("lack", "why"),
    [
        (NO_FILES, "--verify cannot record: No usable temporary directory found"),
        (NO_FORKS, "cannot fork: no process left; raise the limit (ulimit -u)"),
    ],
)
def test_a_run_that_this_machine_has_no_room_for_is_exit_2_with_the_remedy(
    lack: str, why: str
) -> None:
    code = f"{lack}\nimport client, sys\nsys.exit(client.main(['--verify']))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.startswith(f"client.py: {why}")
    assert ran.stderr.count("\n") == 1


def test_a_server_that_never_answers_is_reported_after_the_timeout() -> None:
    with ScriptedServer(lambda sock: receive_exactly(sock, 10**6)) as server:
        code, shown = run_client(server.address, "--connections", "2", "--timeout", "200ms", *SHORT)
        assert code == 5, shown
        assert "timeout" in shown
        assert "not checked" in shown


def test_ctrl_c_stops_early_and_still_reports() -> None:
    with ServerCommand() as server:
        with client(server.address, "--duration", "1h", "--warmup", "0") as command:
            wait_for_load(server)
            command.signal(signal.SIGINT)
            assert command.finish() == 130
            shown = command.output()
            assert shown.startswith("Interrupted after")
            assert "check     ok: the total grew by exactly" in shown
            waiting = "waiting up to 10 s for the replies in flight, Ctrl-C again to stop waiting"
            assert command.errors().endswith(f"for 1h\ninterrupted; {waiting}\n")


INHERITED = """
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_what_a_parent_left_ignored_or_blocked_loses_no_report() -> None:
    """cron, shells and supervisors leave SIGCHLD ignored, and some their mask."""
    with ServerCommand() as server:
        arguments = ("--serverAddress", server.address, "--duration", "1h", "--warmup", "0")
        inside = (sys.executable, "-c", INHERITED)
        with Command("client.py", *arguments, "--processes", "2", inside=inside) as command:
            wait_for_load(server)
            command.signal(signal.SIGINT)
            assert command.finish() == 130
            assert "check     ok: the total grew by exactly" in command.output()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_ends_are_reported_as_ctrl_c_is(number: signal.Signals) -> None:
    with ServerCommand() as server:
        with client(server.address, "--duration", "1h", "--warmup", "0") as command:
            wait_for_load(server)
            command.signal(number)
            assert command.finish() == 130
            assert "check     ok: the total grew by exactly" in command.output()


def answering_only(count: int, stalled: threading.Event) -> Callable[[socket.socket], None]:
    """A script that answers so many frames, and is silent from the next one on."""
    answered = itertools.count()

    def script(sock: socket.socket) -> None:
        while True:
            receive_exactly(sock, 16)
            if (number := next(answered)) >= count:
                stalled.set()
                sock.recv(1)
                return
            sock.sendall(encode_total(number))

    return script


@pytest.mark.parametrize("verify", [(), ("--verify",)])
def test_a_second_ctrl_c_reports_without_waiting(verify: tuple[str, ...]) -> None:
    stalled = threading.Event()
    with ScriptedServer(answering_only(21, stalled)) as server:
        arguments = ("--connections", "1", "--duration", "1h", "--warmup", "0", "--timeout", "1h")
        with client(server.address, *arguments, *verify) as command:
            assert stalled.wait(20)
            command.signal(signal.SIGINT)
            waiting = command.error_line_with("interrupted")
            assert waiting.startswith("interrupted; waiting up to 3600 s for the")
            command.signal(signal.SIGINT)
            assert command.finish() == 130
            shown = command.output()
            assert "measured  20 requests" in shown
            assert "errors    none; outcome unknown: 1" in shown
            assert "total     0 before, unknown after" in shown
            assert ("verify    undecided: the server's total could not be read" in shown) == bool(
                verify
            )


def test_a_second_ctrl_c_ends_the_wait_for_the_closing_read_too() -> None:
    stalled = threading.Event()
    with ScriptedServer(answering_only(21, stalled)) as server:
        arguments = ("--connections", "1", "--requests", "20", "--warmup", "0", "--timeout", "1h")
        with client(server.address, *arguments) as command:
            assert stalled.wait(20)
            command.signal(signal.SIGINT)
            command.error_line_with("interrupted; ")
            command.signal(signal.SIGINT)
            assert command.finish() == 130
            assert "total     0 before, unknown after" in command.output()


def test_a_peer_that_closes_without_an_answer_is_no_server_to_load() -> None:
    with ScriptedServer(lambda sock: receive_exactly(sock, 16)) as server:
        why = "closed the connection without an answer; is it a counter server, "
        code, shown = run_client(server.address, *SHORT)
        assert code == 1
        assert shown == (f"client.py: {server.address} {why}and does it speak TLS (--tlsCA)?\n")
        code, shown = run_client(server.address, "--read")
        assert code == 5
        assert shown.endswith("is it a counter server, and does it speak TLS (--tlsCA)?\n")


def test_errors_within_their_threshold_are_exit_0() -> None:
    with ServerCommand("--maxConnections", "2", workers=2) as server:
        arguments = (*SHORT, "--connections", "3", "--processes", "1", "--timeout", "300ms")
        code, shown = run_client(server.address, *arguments, "--threshold", "errors<99%")
        assert code == 0, shown
        assert re.search(r"errors    timeout: \d", shown), shown
        code, shown = run_client(server.address, *arguments, "--threshold", "errors<1")
        assert code == 99, shown


def test_no_process_outlives_a_client_that_was_killed() -> None:
    with ServerCommand() as server:
        with client(server.address, "--duration", "1h", "--processes", "3") as command:
            pid = command.process.pid
            wait_until(lambda: len(children(pid)) == 3, "three processes load the server")
            forked = children(pid)
            command.signal(signal.SIGKILL)
            command.finish()
            wait_until(lambda: not any(map(is_alive, forked)), "they are gone")


def test_the_address_can_come_from_the_environment() -> None:
    with (
        ServerCommand() as server,
        Command(
            "client.py", "--read", environment={"COUNTER_CLIENT_SERVER_ADDRESS": server.address}
        ) as command,
    ):
        assert command.line() == "0"
        assert command.finish() == 0


def test_a_terminal_shows_progress_and_a_pipe_does_not() -> None:
    with ServerCommand() as server:
        words = f"client.py --serverAddress {server.address} --duration 1500ms"
        script = f"TERM=xterm {sys.executable} {words}"
        shown = subprocess.run(
            ["script", "-qec", script, "/dev/null"], cwd=ROOT, capture_output=True, check=True
        ).stdout.decode()
        assert re.search(r"%  \d s left .*\d requests a second, p99 \d", shown)
        assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is shown again"
        with client(server.address, "--duration", "1500ms") as command:
            assert command.finish() == 0
            (said,) = command.errors().splitlines()
            assert said.endswith(" connections for 1.5s after 1s of warm-up")


def test_where_there_is_no_terminal_the_log_says_once_what_begins() -> None:
    """So that a log does not look as if the client hung; a machine's log is JSON, and stays so."""
    bounds = ("--connections", "3", "--requests", "2000", "--duration", "1m", "--warmup", "0")
    with ServerCommand() as server:
        with client(server.address, *bounds, "--logFormat", "json") as command:
            assert command.finish() == 0
            (line,) = map(json.loads, command.errors().splitlines())
            assert (line["level"], line["message"]) == (
                "info",
                "Starting 3 connections for 1m or 2,000 requests",
            )
        with client(server.address, *bounds, "--logLevel", "warning") as command:
            assert command.finish() == 0
            assert command.errors() == ""


def wait_for_load(server: ServerCommand) -> None:
    """Waits until the server has computed for 0.3 s from now on."""
    start_s = cpu_seconds(server.process.pid)
    wait_until(lambda: cpu_seconds(server.process.pid) > start_s + 0.3, "the server is under load")


def test_an_open_loop_keeps_its_rate_and_shows_both_latencies(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    with ServerCommand() as server:
        arguments = ("--rate", "1000", "--requests", "500", "--warmup", "0", "--json", str(file))
        code, shown = run_client(server.address, *arguments)
        assert code == 0, shown
        result = json.loads(file.read_text())
        assert result["measured"] == 500
        assert 0.45 < result["elapsed_s"] < 5, "500 requests at 1,000 a second take half a second"
        assert result["latency_ns"]["mean"] >= result["raw_latency_ns"]["mean"]
        assert "(from when each was due)" in shown
        assert "(from when each was sent)" in shown


def test_an_open_loop_counts_the_wait_for_a_server_that_stalls(tmp_path: Path) -> None:
    """The requests that fall due during a stall of 0.4 s have waited for up to 0.4 s."""
    file = tmp_path / "result.json"
    with ScriptedServer(counting_to(200, stalls_at=50, stall_s=0.4)) as server:
        arguments = ("--connections", "1", "--rate", "500", "--requests", "200", "--warmup", "0")
        code, shown = run_client(server.address, *arguments, "--json", str(file))
        assert code == 0, shown
        result = json.loads(file.read_text())
        assert result["latency_ns"]["p90"] > 250e6, "every tenth fell due early in the stall"
        assert result["raw_latency_ns"]["p90"] < 100e6, "a single one was sent into it"


def test_ctrl_c_in_a_terminal_is_one_signal_and_still_reports() -> None:
    with ServerCommand() as server:
        arguments = ("--serverAddress", server.address, "--duration", "1h", "--warmup", "0")
        with run_in_terminal("client.py", *arguments) as (process, terminal):
            wait_for_load(server)
            os.write(terminal, b"\x03")
            shown = read_terminal_until(terminal, "ok: the total grew by exactly")
            assert "Interrupted after" in shown
            assert process.wait(20) == 130


@pytest.mark.parametrize("last", ["a further request follows", "it is the last reply"])
def test_a_load_that_stood_still_takes_what_came_meanwhile(last: str, engine: str) -> None:
    """SIGSTOP, Ctrl-Z and fg, docker pause: the reply lies in the socket when the time is over."""
    asked, stopped = threading.Event(), threading.Event()
    answered = itertools.count()

    def script(sock: socket.socket) -> None:
        while True:
            receive_exactly(sock, 16)
            if (number := next(answered)) == 20:
                asked.set()
                stopped.wait(20)
            sock.sendall(encode_total(min(number, requests)))

    requests = 20 if last.startswith("it") else 40
    with ScriptedServer(script) as server:
        arguments = ("--connections", "1", "--requests", str(requests), "--warmup", "0")
        more = ("--timeout", "500ms", "--engine", engine)
        with client(server.address, *arguments, *more) as command:
            assert asked.wait(20)
            (load,) = children(command.process.pid)
            os.kill(load, signal.SIGSTOP)
            stopped.set()
            going_on_at = time.monotonic() + 1.5
            wait_until(lambda: time.monotonic() > going_on_at, "the timeout is over")
            os.kill(load, signal.SIGCONT)
            assert command.finish() == 0
            assert "errors    none" in command.output()


def test_a_peer_that_accepts_and_closes_is_reported_and_breaks_nothing() -> None:
    accepted = itertools.count()

    def script(sock: socket.socket) -> None:
        if next(accepted) == 0:
            receive_exactly(sock, 16)
            sock.sendall(encode_total(0))

    with ScriptedServer(script) as server:
        code, shown = run_client(server.address, *SHORT, "--connections", "4")
        assert code == 5, shown
        assert "died" not in shown
        assert "Assertion" not in shown
        assert "connection closed" in shown or "connection reset" in shown


def test_a_rate_that_cannot_be_kept_says_what_was_asked_for() -> None:
    with ServerCommand() as server:
        code, shown = run_client(server.address, *SHORT, "--rate", "100000000")
        assert code == 0, shown
        assert "100,000,000 asked for" in shown
        assert re.search(r"behind    [\d,]+ requests due and not sent", shown)
        assert not re.search(r"measured  0 ", shown)


def test_a_result_that_cannot_be_written_is_one_line_and_exit_5() -> None:
    with ServerCommand() as server:
        for arguments in ("--add 3", "--duration 200ms --warmup 0"):
            command = f"{sys.executable} client.py --serverAddress {server.address} {arguments}"
            ran = subprocess.run(
                f"{command} >/dev/full", shell=True, cwd=ROOT, capture_output=True, check=False
            )
            assert ran.returncode == 5
            assert b"cannot write the result: No space left on device" in ran.stderr
            assert b"Traceback" not in ran.stderr


def test_one_request_may_be_given_a_year() -> None:
    with ServerCommand("--processes", "1") as server:
        with client(server.address, "--add", "5", "--timeout", "8760h") as command:
            assert command.line() == "5"
            assert command.finish() == 0
        server.stop()
