"""CounterClient against the real server, and against servers that fail in every way."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import re
import resource
import socket
import struct
import threading
import time
from fractions import Fraction
from itertools import chain
from typing import Any

import pytest

from client import (
    AddressError,
    AmountError,
    ArgumentError,
    ConnectError,
    CounterClient,
    CounterError,
    NumbersEnded,
    OutcomeUnknown,
    WrongType,
)
from client_line import explain
from kit.harness import ScriptedServer, ServerCommand, receive_exactly
from protocol import encode_frame, encode_total, parse_address


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


@pytest.mark.parametrize(
    ("amount", "shown"),
    [(True, "True"), ("5", "'5'"), (1.0, "1.0"), (None, "None"), (b"1", "b'1'")],
)
def test_an_amount_of_another_type_is_a_type_error_with_its_operand(
    amount: Any, shown: str
) -> None:
    counter = CounterClient("127.0.0.1:1")  # where nothing can be sent
    for call in (counter.add, counter.take, lambda amount: counter.add_many([1, amount])):
        with pytest.raises(WrongType, match=rf"amount {shown}: give an int") as caught:
            call(amount)
        assert isinstance(caught.value, CounterError)
        assert isinstance(caught.value, TypeError)


def test_amounts_that_are_no_list_and_numbers_beyond_writing_are_refused() -> None:
    counter = CounterClient("127.0.0.1:1")
    with pytest.raises(WrongType, match="amounts 5: give a list"):
        counter.add_many(5)  # type: ignore[arg-type]
    with pytest.raises(AmountError, match="outside 0"):
        counter.add(10**5000)
    with pytest.raises(AmountError, match="amount -1"):
        counter.take(-1)


@pytest.mark.parametrize(
    "timeout", [0, -1, float("nan"), float("inf"), 1e10, 10**400, True, "5", b"5", (1, 2), []]
)
def test_a_timeout_that_is_none_is_refused_with_what_to_give(timeout: Any) -> None:
    with pytest.raises(CounterError, match="or None to wait for ever") as caught:
        CounterClient(timeout=timeout)
    wrong_type = isinstance(timeout, bool | str | bytes | tuple | list)
    assert isinstance(caught.value, WrongType if wrong_type else ArgumentError)
    assert isinstance(caught.value, TypeError if wrong_type else ValueError)


@pytest.mark.parametrize("timeout", [None, 5, 0.5, Fraction(5, 2)])
def test_a_timeout_may_be_none_or_any_number(timeout: Any) -> None:
    with ServerCommand() as server, CounterClient(server.address, timeout=timeout) as counter:
        assert counter.add(1) == 1
        assert counter.add_many([1] * 3000)[-1] == 3001


@pytest.mark.parametrize(
    "address", ["127.0.0.1", ":0", "a:65536", "a:-1", "::1:80", "", "http://a"]
)
def test_an_address_that_is_none_is_refused_with_its_operand(address: str) -> None:
    with pytest.raises(AddressError, match=re.escape(repr(address))) as caught:
        CounterClient(address)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("address", [("127.0.0.1", 8080), 8080, b"127.0.0.1:8080", None])
def test_an_address_of_another_type_is_a_type_error(address: Any) -> None:
    with pytest.raises(WrongType, match="write text, as in") as caught:
        CounterClient(address)
    assert isinstance(caught.value, TypeError)


def test_a_context_that_is_none_is_a_type_error() -> None:
    with pytest.raises(WrongType, match="tls True: give an ssl"):
        CounterClient(tls=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["a\0b", "a..b", "a" * 70, "\udc80"])
def test_a_host_that_no_name_server_can_be_asked_for_is_a_connect_error(host: str) -> None:
    with pytest.raises(ConnectError, match="unknown host"):
        CounterClient(f"{host}:80").add(1)


def test_every_error_has_one_root_and_survives_pickling() -> None:
    errors = (
        ConnectError("no"),
        AmountError("no"),
        AddressError("no"),
        ArgumentError("no"),
        WrongType("no"),
        NumbersEnded(5, 2),
        OutcomeUnknown("why", [1], [2, 3], [4], "hint"),
    )
    for error in errors:
        assert isinstance(error, CounterError)
        error.add_note("noted")
        for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
            assert type(again) is type(error)
            assert str(again) == str(error)
            assert vars(again) == vars(error)


def test_it_takes_numbers_that_nobody_else_has() -> None:
    with ServerCommand() as server, CounterClient(server.address) as counter:
        assert counter.take(3) == range(1, 4)
        assert counter.add(10) == 13
        assert counter.take(1) == range(14, 15)
        assert counter.total() == 14
    assert not CounterClient("127.0.0.1:1").take(0), "which asks nobody"


def test_numbers_end_where_the_total_begins_anew() -> None:
    with ServerCommand("--setTotal", str(2**64 - 4)) as server:
        with CounterClient(server.address) as counter:
            assert counter.take(3) == range(2**64 - 3, 2**64)
            with pytest.raises(NumbersEnded, match=r"5 was counted .* it is 4 now") as caught:
                counter.take(5)
            assert (caught.value.amount, caught.value.total) == (5, 4)


class MetItself(socket.socket):
    """A socket to which the kernel gave the very port that it connects to."""

    def connect(self, address: Any) -> None:
        self.bind(address)
        super().connect(address)


def test_a_connection_that_met_itself_is_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setattr(socket, "socket", MetItself)
    for _ in range(2):  # it leaves nothing behind that would keep the port
        with pytest.raises(ConnectError, match=rf"{port}: connection refused; start a server"):
            CounterClient(f"127.0.0.1:{port}").add(7)


def answers(*addresses: str) -> Any:
    """What a name server says: each time these."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", parse_address(a)) for a in addresses]
    return lambda *_, **__: list(found)


def test_a_name_is_looked_up_at_each_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    with ServerCommand() as one, ServerCommand("--setTotal", "100") as other:
        with CounterClient("counter.test:80") as counter:
            monkeypatch.setattr(socket, "getaddrinfo", answers(one.address))
            assert counter.add(1) == 1
            monkeypatch.setattr(socket, "getaddrinfo", answers(other.address))
            one.stop()
            assert counter.add(1) == 101


def test_an_address_that_is_silent_leaves_time_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ServerCommand() as server, socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        silent = f"127.0.0.1:{full.getsockname()[1]}"
        with socket.create_connection(full.getsockname()):
            with CounterClient("counter.test:80", timeout=1) as counter:
                monkeypatch.setattr(socket, "getaddrinfo", answers(silent, server.address))
                assert counter.add(1) == 1
                monkeypatch.setattr(socket, "getaddrinfo", answers(silent, silent))
                counter.close()
                started = time.monotonic()
                with pytest.raises(ConnectError, match="no answer in time"):
                    counter.add(1)
                assert time.monotonic() - started < 1.5


def test_a_server_that_vanishes_is_noticed_whatever_the_timeout() -> None:
    with ServerCommand() as server, CounterClient(server.address, timeout=None) as counter:
        counter.add(1)
        sock = counter._line.sock
        assert sock is not None
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        tcp = [socket.TCP_USER_TIMEOUT, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL]
        assert [sock.getsockopt(socket.IPPROTO_TCP, each) for each in tcp] == [45_000, 30, 5]


def test_a_lack_of_descriptors_or_ports_is_called_by_its_name() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ServerCommand() as server, socket.socket() as last:
        resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno(), hard))
        try:
            with pytest.raises(ConnectError, match="too many open files; raise the descriptor"):
                CounterClient(server.address).add(1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    text = explain(OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL)), "a", 80)
    assert "every local port for it is taken" in text
    assert "check the address" not in text


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
