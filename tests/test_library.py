"""CounterClient against the real server, and against servers that fail in every way."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from itertools import chain

import pytest

from client import ConnectError, CounterClient, CounterError, OutcomeUnknown
from kit.harness import ROOT, ScriptedServer, ServerCommand, receive_exactly
from protocol import AmountError, encode_frame, encode_total, parse_address


def test_it_adds_reads_and_pipelines() -> None:
    with ServerCommand() as server, CounterClient(server.address) as counter:
        assert counter.add(5) == 5
        assert counter.add_many([1, 2, 3]) == [6, 8, 11]
        assert counter.add_many([]) == []
        assert counter.total() == 11
        assert server.stop() == (11, 5)


def test_many_amounts_go_through_a_bounded_window() -> None:
    with ServerCommand() as server, CounterClient(server.address) as counter:
        assert counter.add_many([1] * 20_000) == list(range(1, 20_001))


def test_it_connects_on_first_use_only() -> None:
    counter = CounterClient("127.0.0.1:1")
    with pytest.raises(ConnectError, match=r"cannot connect to 127\.0\.0\.1:1: connection refused"):
        counter.add(1)


def test_an_unknown_host_is_a_connect_error() -> None:
    with pytest.raises(ConnectError, match="unknown host"):
        CounterClient("no.such.host.invalid:80").add(1)


@pytest.mark.parametrize("amounts", [[1, -1], [2**64], [1, 2, 2**70]])
def test_a_bad_amount_is_found_before_anything_is_sent(amounts: list[int]) -> None:
    with ServerCommand() as server, CounterClient(server.address) as counter:
        with pytest.raises(AmountError):
            counter.add_many(amounts)
        assert counter.total() == 0


def test_every_error_has_one_root() -> None:
    assert all(issubclass(e, CounterError) for e in (ConnectError, OutcomeUnknown, AmountError))


def test_a_lost_reply_says_what_may_have_been_counted() -> None:
    def script(sock: socket.socket) -> None:
        receive_exactly(sock, 5 * 16)
        sock.sendall(encode_total(10) + encode_total(30) + b"\0\0\0")

    with ScriptedServer(script) as server, CounterClient(server.address) as counter:
        with pytest.raises(OutcomeUnknown) as caught:
            counter.add_many([10, 20, 30, 40, 50])
        assert caught.value.totals == (10, 30)
        assert caught.value.amounts == (30, 40, 50)
        assert caught.value.unsent == ()


def test_what_was_not_sent_is_told_apart() -> None:
    def script(sock: socket.socket) -> None:
        receive_exactly(sock, 16)

    with ScriptedServer(script) as server, CounterClient(server.address) as counter:
        with pytest.raises(OutcomeUnknown) as caught:
            counter.add_many([1] * 3000)
        assert caught.value.totals == ()
        assert len(caught.value.amounts) + len(caught.value.unsent) == 3000
        assert len(caught.value.unsent) >= 3000 - 1024


def test_a_reset_is_an_unknown_outcome_too() -> None:
    def script(sock: socket.socket) -> None:
        receive_exactly(sock, 16)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with ScriptedServer(script) as server, CounterClient(server.address) as counter:
        with pytest.raises(
            OutcomeUnknown, match=r"the addition of 7 may or may not .* larger amounts"
        ):
            counter.add(7)


def test_a_server_that_never_answers_times_out_once_and_no_amount_is_sent_twice() -> None:
    received: list[bytes] = []

    def script(sock: socket.socket) -> None:
        while data := sock.recv(1000):
            received.append(data)

    with ScriptedServer(script) as server, CounterClient(server.address, timeout=0.2) as counter:
        with pytest.raises(OutcomeUnknown, match=r"no reply within 0\.2 s"):
            counter.add(9)
    assert b"".join(received) == encode_frame(9)


def test_a_reply_that_dribbles_in_does_not_move_the_deadline() -> None:
    stop = threading.Event()

    def script(sock: socket.socket) -> None:
        receive_exactly(sock, 16)
        while not stop.wait(0.15):
            sock.sendall(b"\0")

    with ScriptedServer(script) as server, CounterClient(server.address, timeout=0.5) as counter:
        started = time.monotonic()
        with pytest.raises(OutcomeUnknown):
            counter.add(1)
        stop.set()
        assert time.monotonic() - started < 1.0


def test_after_an_error_the_next_call_connects_anew() -> None:
    connections: list[socket.socket] = []

    def script(sock: socket.socket) -> None:
        connections.append(sock)
        receive_exactly(sock, 16)
        if len(connections) > 1:
            sock.sendall(encode_total(42))

    with ScriptedServer(script) as server, CounterClient(server.address) as counter:
        with pytest.raises(OutcomeUnknown):
            counter.add(1)
        assert counter.add(1) == 42


def test_a_connection_that_ended_while_idle_is_renewed_without_doubt() -> None:
    with ServerCommand() as server:
        counter = CounterClient(server.address)
        assert counter.add(1) == 1
        server.stop()
    _, port = parse_address(server.address)
    with ServerCommand(port=str(port)), counter:
        assert counter.add(1) == 1


def test_threads_share_a_client_and_every_total_is_their_own() -> None:
    with ServerCommand() as server, CounterClient(server.address) as counter:
        totals: list[list[int]] = [[] for _ in range(4)]

        def add(mine: list[int]) -> None:
            for _ in range(300):
                mine.append(counter.add(1))

        threads = [threading.Thread(target=add, args=(mine,)) for mine in totals]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(chain(*totals)) == list(range(1, 1201))
        assert all(mine == sorted(mine) for mine in totals)
        assert server.stop() == (1200, 1200)


def test_a_forked_child_connects_anew_and_leaves_the_parents_connection_alone() -> None:
    with ServerCommand() as server, CounterClient(server.address) as counter:
        assert counter.add(1) == 1
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.write(writing, str(counter.add_many([10] * 50)[-1]).encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert os.read(reading, 100) == b"501"
        assert counter.add(1) == 502
        os.close(reading)
        os.close(writing)


def test_a_fork_while_a_thread_holds_the_client_does_not_block_the_child() -> None:
    asked, answer = threading.Event(), threading.Event()

    def script(sock: socket.socket) -> None:
        receive_exactly(sock, 16)
        if not asked.is_set():
            asked.set()
            answer.wait()
        sock.sendall(encode_total(7))
        receive_exactly(sock, 16)

    with ScriptedServer(script) as server, CounterClient(server.address) as counter:
        thread = threading.Thread(target=counter.add, args=(1,))
        thread.start()
        asked.wait()
        pid = os.fork()
        if not pid:
            code = 1
            try:
                code = 0 if counter.add(1) == 7 else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        answer.set()
        thread.join()


GREENLETS = """
from gevent import monkey; monkey.patch_all()
import gevent, sys
from client import CounterClient, OutcomeUnknown
quiet, real = sys.argv[1:]

counter = CounterClient(quiet)
waiting = gevent.spawn(counter.add, 1)
gevent.sleep(0.2)
waiting.kill()
assert isinstance(waiting.value, gevent.GreenletExit), waiting.value
assert counter._sock is None, "replies that are still to come belong to nobody"

counter = CounterClient(real)
adding = [gevent.spawn(counter.add, 1) for _ in range(50)]
gevent.joinall(adding, raise_error=True)
assert sorted(g.value for g in adding) == list(range(1, 51))
print("fine")
"""


def test_greenlets_share_a_client_and_a_killed_one_closes_the_connection() -> None:
    with ScriptedServer(lambda sock: receive_exactly(sock, 99)) as quiet:
        with ServerCommand() as server:
            ran = subprocess.run(
                [sys.executable, "-c", GREENLETS, quiet.address, server.address],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
    assert (ran.stdout, ran.stderr) == ("fine\n", "")
