"""Idle connections end in favour of others: only while as many are open as may be and others wait
in the backlog, the longest idle first."""

from __future__ import annotations

import os
import select
import signal
import socket
import sqlite3
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from kit.harness import Peer, ServerCommand, children, peers
from protocol import encode_frame

pytestmark = pytest.mark.usefixtures("each_engine")

ONE = encode_frame(1)
IDLE = "was idle while others waited for a connection"


def room(
    *arguments: str, workers: int = 1, processes: int = 1, idle: str = "600ms"
) -> ServerCommand:
    """A server that has as many connections as workers, and no more."""
    limits = ("--idleTimeout", idle, "--processes", str(processes))
    most = ("--maxConnections", str(workers))
    return ServerCommand(*limits, *most, *arguments, workers=workers)


@pytest.mark.parametrize("processes", [0, 2])
def test_idle_connections_stay_while_nobody_waits(processes: int) -> None:
    with room(workers=4, processes=processes, idle="200ms") as server:
        with peers(server.address, 4) as idle:
            for peer in idle:
                peer.add(1)
            idle[0].expect_silence(0.7)
            assert [peer.add(0) for peer in idle] == [4] * 4
        assert server.stop()[0] == 4
        assert IDLE not in server.errors()


@pytest.mark.parametrize("processes", [0, 2])
def test_idle_connections_stay_while_there_is_room(processes: int) -> None:
    with room(workers=4, processes=processes, idle="200ms") as server:
        with peers(server.address, 3) as idle:
            for peer in idle:
                peer.add(1)
            idle[0].expect_silence(0.6)
            with server.connect() as other:
                assert other.add(1) == 4
            assert [peer.add(0) for peer in idle] == [4] * 3


def test_the_longest_idle_goes_first_and_no_more_than_wait() -> None:
    with room(workers=4) as server, peers(server.address, 4) as idle:
        for peer in idle:
            peer.add(1)
        order = [2, 0, 3, 1]
        for index in order:
            idle[index].add(1)
            idle[index].expect_silence(0.1)
        idle[1].expect_silence(0.7)
        with server.connect() as first:
            assert first.add(1) == 9
            idle[2].expect_eof()
            with server.connect() as second:
                assert second.add(1) == 10
                idle[0].expect_eof()
                assert idle[3].add(1) == 11
                assert idle[1].add(1) == 12
        server.error_line_with(IDLE)


def test_one_that_goes_on_stays_while_others_wait() -> None:
    with room(idle="400ms") as server, server.connect() as busy, server.connect() as waiting:
        waiting.send(ONE)
        for total in range(1, 13):
            assert busy.add(1) == total
            waiting.expect_silence(0.1)
        assert waiting.totals(1) == [13]
        busy.expect_eof()


def test_a_byte_is_activity_even_when_it_ends_no_frame() -> None:
    with room("--frameTimeout", "1h", idle="500ms") as server:
        with server.connect() as slow, server.connect() as waiting:
            assert slow.add(1) == 1
            waiting.send(ONE)
            for byte in ONE[:8]:
                slow.send(bytes([byte]))
                waiting.expect_silence(0.15)
            slow.send(ONE[8:])
            assert slow.totals(1) == [2]
            assert waiting.totals(1) == [3]


def test_what_was_idle_in_the_backlog_counts() -> None:
    with room(idle="2s") as server, ExitStack() as stack:
        busy = stack.enter_context(server.connect())
        assert busy.add(1) == 1
        silent = stack.enter_context(server.connect())
        until = time.monotonic() + 2.3
        while time.monotonic() < until:
            busy.add(0)
        waiting = stack.enter_context(server.connect())
        waiting.send(ONE)
        started = time.monotonic()
        busy.close()
        assert waiting.totals(1) == [2]
        assert time.monotonic() - started < 1.5, "it was idle before it was accepted"
        silent.expect_eof()


def test_a_connection_with_unread_bytes_is_not_idle() -> None:
    with room(idle="500ms") as server, server.connect() as peer, server.connect() as waiting:
        assert peer.add(1) == 1
        waiting.send(ONE)
        (pid,) = children(server.process.pid)
        os.kill(pid, signal.SIGSTOP)
        try:
            peer.send(ONE)
            peer.expect_silence(0.8)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert peer.totals(1) == [2]
        assert waiting.totals(1) == [3]


def test_a_connection_that_is_owed_replies_by_the_store_is_not_idle(tmp_path: Path) -> None:
    path = tmp_path / "counter.db"
    with room("--store", f"sqlite:{path}", idle="300ms") as server:
        with server.connect() as peer, server.connect() as waiting:
            assert peer.add(1) == 1
            lock = sqlite3.connect(path, isolation_level=None)
            try:
                lock.execute("BEGIN IMMEDIATE")
                peer.send(ONE)
                waiting.send(ONE)
                peer.expect_silence(1.2)
            finally:
                lock.close()
            assert peer.totals(1) == [2]
            assert waiting.totals(1) == [3]


def test_a_connection_whose_replies_are_not_read_is_not_idle() -> None:
    with room("--writeTimeout", "1h", idle="300ms") as server:
        with server.connect() as deaf, server.connect() as waiting:
            deaf.sock.setblocking(False)
            sent = 0
            while True:
                try:
                    sent += deaf.sock.send((ONE * 4096)[sent % len(ONE) :])
                except BlockingIOError:
                    if not select.select([], [deaf.sock], [], 0.3)[1]:
                        break
            waiting.send(ONE)
            waiting.expect_silence(1.0)
            assert len(deaf.sock.recv(8)) == 8, "it was not ended"
        server.signal(signal.SIGTERM)
        server.finish()
        assert IDLE not in server.errors()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("speaks_first", [False, True])
def test_twice_as_many_idle_connections_as_may_be_keep_nobody_out(
    processes: int, speaks_first: bool
) -> None:
    workers, idle_s = 30, 1.0
    with room(workers=workers, processes=processes, idle=f"{idle_s:g}s") as server:
        with peers(server.address, 2 * workers) as attack:
            if speaks_first:
                for peer in attack:
                    peer.send(ONE)
            for _ in range(2):
                started = time.monotonic()
                with server.connect() as good:
                    good.add(1)
                waited_s = time.monotonic() - started
                # The contract says 1 s; half a second more is for a machine that is busy.
                assert waited_s < idle_s + 1 + 0.5
        server.stop()


def test_an_attack_that_comes_back_keeps_nobody_out() -> None:
    """Who was ended connects again at once and is behind the good client in the queue."""
    workers, idle_s = 20, 1.0
    with room(workers=workers, processes=2, idle=f"{idle_s:g}s") as server:
        attack = [Peer(server.address) for _ in range(2 * workers)]
        try:
            for _ in range(2):
                started = time.monotonic()
                with server.connect() as good:
                    good.send(ONE)
                    while not select.select([good.sock], [], [], 0)[0]:
                        come_back(server, attack)
                    assert good.totals(1)
                    assert time.monotonic() - started < idle_s + 1 + 0.5
        finally:
            for peer in attack:
                peer.close()


def come_back(server: ServerCommand, attack: list[Peer]) -> None:
    """Replaces those that have ended by new ones."""
    ended = select.select([peer.sock for peer in attack], [], [], 0.01)[0]
    for number, peer in enumerate(attack):
        if peer.sock in ended:
            assert peer.sock.recv(1, socket.MSG_PEEK) == b"", "FIN and no RST"
            peer.close()
            attack[number] = Peer(server.address)
