"""Signals, whoever sends them, to whom and how often; and what a parent leaves a server with."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest

from counter.processes.signals import ASKING_SIGNALS, STOP_SIGNALS, UNUSED_SIGNALS
from kit.harness import ROOT, Command, ServerCommand, children, is_alive, wait_until
from protocol import encode_frame
from test_lifecycle import queue_held, waits_for

ONE = encode_frame(1)
PROCESSES = pytest.mark.parametrize("processes", ["0", "2"])


def test_a_signal_to_every_process_at_once_is_one_drain(tmp_path: Path) -> None:
    """As service managers send it, and killpg: a process is not told twice."""
    path = tmp_path / "counter.db"
    with ServerCommand("--processes", "2", "--store", f"sqlite:{path}") as server:
        with server.connect() as peer:
            assert peer.add(1) == 1
            with queue_held(path):
                peer.send(ONE)
                for pid in children(server.process.pid):
                    os.kill(pid, signal.SIGTERM)
                server.signal(signal.SIGTERM)
                server.error_line_with("SIGTERM: draining; what is not done in 5 s is cut")
            assert peer.totals(1) == [2]
            peer.expect_eof()
        assert server.farewell() == (2, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGQUIT])
def test_a_signal_to_a_serving_process_alone_ends_nothing(number: signal.Signals) -> None:
    with ServerCommand("--processes", "2") as server, server.connect() as peer:
        serving = children(server.process.pid)
        for pid in serving:
            os.kill(pid, number)
        assert peer.add(5) == 5
        assert all(map(is_alive, serving))
        assert server.stop() == (5, 1)


@PROCESSES
@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGPWR, signal.SIGXCPU])
def test_what_may_end_a_server_drains_it(processes: str, number: signal.Signals) -> None:
    with ServerCommand("--processes", processes) as server, server.connect() as peer:
        assert peer.add(5) == 5
        assert server.stop(number) == (5, 1)
        assert f"{number.name}: draining" in server.errors()


@PROCESSES
def test_signals_that_mean_nothing_end_nothing(processes: str) -> None:
    with ServerCommand("--processes", processes) as server, server.connect() as peer:
        for number in (signal.SIGUSR2, signal.SIGALRM, signal.SIGPROF, signal.SIGIO, 34, 36, 64):
            os.kill(server.process.pid, number)
        assert peer.add(5) == 5
        if processes != "0":
            server.error_line_with("SIGUSR2 means nothing to this server and is ignored")
        assert server.stop() == (5, 1)


LEFT = {
    "ignored SIGCHLD": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "blocked signals": "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())",
    "1,100 descriptors": "h = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
    "resource.setrlimit(resource.RLIMIT_NOFILE, (h, h))\n"
    "for _ in range(1100): os.set_inheritable(os.dup(0), True)",
}


@pytest.mark.parametrize("processes", ["0", "1"])
@pytest.mark.parametrize("store", ["memory", "sqlite"])
@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT)
def test_a_server_is_not_hindered_by_what_its_parent_left(
    left: str, store: str, processes: str, tmp_path: Path
) -> None:
    code = f"import os, resource, signal, sys\n{left}\nos.execv(sys.argv[1], sys.argv[1:])"
    where = "memory" if store == "memory" else f"sqlite:{tmp_path / 'counter.db'}"
    flags = ("--processes", processes, "--store", where)
    with ServerCommand(*flags, inside=[sys.executable, "-c", code]) as server:
        with server.connect() as peer:
            assert peer.add(5) == 5
            serving = children(server.process.pid)
            if serving:
                os.kill(serving[0], signal.SIGKILL)
                wait_until(
                    lambda: bool(set(children(server.process.pid)) - set(serving)),
                    "it is replaced",
                )
        assert server.stop() == (5, 1)


@PROCESSES
def test_a_frame_that_came_while_the_server_stood_still_is_not_late(processes: str) -> None:
    with ServerCommand("--processes", processes, "--frameTimeout", "200ms") as server:
        pids = children(server.process.pid) or [server.process.pid]
        with server.connect() as peer:
            for total in range(1, 6):
                peer.send(ONE[:9])
                peer.expect_silence(0.02)
                for pid in pids:
                    os.kill(pid, signal.SIGSTOP)
                peer.send(ONE[9:])
                peer.expect_silence(1)
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
                assert peer.totals(1) == [total]
        server.stop()


@PROCESSES
def test_a_store_that_could_not_answer_a_server_that_stood_still_is_not_late(
    processes: str, tmp_path: Path
) -> None:
    path = tmp_path / "counter.db"
    arguments = ("--processes", processes, "--store", f"sqlite:{path}", "--storeTimeout", "1s")
    with ServerCommand(*arguments) as server, server.connect() as peer:
        pids = children(server.process.pid) or [server.process.pid]
        with queue_held(path):
            peer.send(ONE)
            peer.expect_silence(0.1)
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
        peer.expect_silence(1.5)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        assert peer.totals(1) == [1]
        assert server.stop() == (1, 1)
        assert "is away" not in server.errors()


@PROCESSES
@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_signals_without_end_leave_the_last_lines_and_the_exit_code(
    store: str, processes: str, tmp_path: Path
) -> None:
    where = "memory" if store == "memory" else f"sqlite:{tmp_path / 'counter.db'}"
    with ServerCommand("--processes", processes, "--store", where) as server:
        with server.connect() as peer:
            assert peer.add(5) == 5
        while server.process.poll() is None:
            server.signal(signal.SIGTERM)
        assert server.farewell() == (5, 1)
        assert "Traceback" not in server.errors()


def test_signals_without_end_end_a_start_that_waits_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "counter.db"
    with queue_held(path), Command("server.py", "--port", "0", "--store", f"sqlite:{path}") as it:
        wait_until(lambda: waits_for(it.process.pid, path), "it waits for its turn")
        while it.process.poll() is None:
            it.signal(signal.SIGTERM)
        assert it.finish() == 0
        assert (it.output(), it.errors()) == ("", "")


@PROCESSES
def test_who_asks_a_server_for_its_state_ends_nothing_where_nobody_reads_it(processes: str) -> None:
    with ServerCommand("--processes", processes) as server, server.connect() as peer:
        assert server.process.stderr is not None
        server.process.stderr.close()
        server.signal(signal.SIGUSR1)
        server.signal(signal.SIGHUP)
        assert peer.add(5) == 5
        assert server.stop() == (5, 1)


def table() -> dict[str, set[signal.Signals]]:
    """docs/operations.md's table: what signals do, and which."""
    document = (ROOT / "docs/operations.md").read_text()
    text = document.partition("| sent to the master |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([^|]*SIG[^|]*) \| (.*) \|$", text, re.MULTILINE)
    return {
        what: {signal.Signals[name] for name in re.findall(r"SIG[A-Z0-9]+", who)}
        for who, what in rows
    }


def listed(first_words: str) -> set[signal.Signals]:
    """The signals of the row whose explanation begins so."""
    (numbers,) = [numbers for what, numbers in table().items() if what.startswith(first_words)]
    return numbers


def test_the_table_of_signals_has_each_once_and_tells_what_the_master_takes_it_for() -> None:
    everything = [number for numbers in table().values() for number in numbers]
    assert len(everything) == len(set(everything))
    assert set(everything) == set(signal.Signals)
    assert listed("drains") == set(STOP_SIGNALS)
    assert listed("nothing but a line in the log") == set(UNUSED_SIGNALS) & set(signal.Signals)
    assert listed("loads the certificates") | listed("writes settings") == set(ASKING_SIGNALS)


def test_signals_that_do_nothing_by_the_table_do_nothing() -> None:
    (numbers,) = [numbers for what, numbers in table().items() if what == "nothing"]
    with ServerCommand("--processes", "2") as server, server.connect() as peer:
        for number in numbers:
            server.signal(number)
        assert peer.add(5) == 5
        assert server.stop() == (5, 1)


def test_a_server_whose_master_is_stopped_serves_on_and_replaces_the_dead_later() -> None:
    with ServerCommand("--processes", "1") as server, server.connect() as peer:
        assert peer.add(5) == 5
        (serving,) = children(server.process.pid)
        server.signal(signal.SIGSTOP)
        os.waitid(os.P_PID, server.process.pid, os.WSTOPPED)
        assert peer.add(5) == 10
        os.kill(serving, signal.SIGKILL)
        peer.expect_eof()
        server.signal(signal.SIGCONT)
        server.error_line_with("is replaced")
        with server.connect() as other:
            assert other.add(5) == 15
        server.stop()
