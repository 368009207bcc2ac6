"""Calls of many threads and greenlets that share one CounterClient, and what a break tells each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import chain

import pytest

from client import ConnectError, CounterClient, OutcomeUnknown
from client_line import WINDOW_FRAMES
from kit.certificates import kit, trusting
from kit.harness import ROOT, ScriptedServer, ServerCommand, receive_exactly, wait_until
from protocol import REQUEST_SIZE, encode_frame, encode_total


class Caller(threading.Thread):
    """A thread with one call; `result` is what it gave back or raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.result: object = None
        self.start()

    def run(self) -> None:
        started = time.monotonic()
        try:
            self.result = self._call()
        except Exception as error:
            self.result = error
        self.took_s = time.monotonic() - started

    def end(self) -> object:
        self.join(20)
        assert not self.is_alive()
        return self.result


def queued(counter: CounterClient, count: int) -> None:
    """Waits until so many calls are on a client's line."""
    wait_until(lambda: len(counter._line._calls) == count, f"{count} calls share the line")


def in_order(counter: CounterClient, *amounts: int) -> list[Caller]:
    """A caller for each amount, the next when the one before is on the line.

    The first frame of an idle line is on its way before the others are there.
    """
    callers = []
    for amount in amounts:
        before = len(counter._line._calls)
        callers.append(Caller(lambda amount=amount: counter.add(amount)))  # type: ignore[misc]
        queued(counter, before + 1)
        wait_until(lambda: counter._line._in_flight > 0, "the first frame is sent")
    return callers


def test_calls_that_meet_travel_together_and_each_has_its_own_totals() -> None:
    go = threading.Event()

    def script(sock: socket.socket) -> None:
        receive_exactly(sock, REQUEST_SIZE)
        go.wait()
        sock.sendall(encode_total(1))
        assert receive_exactly(sock, 9 * REQUEST_SIZE) == b"".join(map(encode_frame, range(2, 11)))
        sock.sendall(b"".join(map(encode_total, range(2, 11))))

    with ScriptedServer(script) as server, CounterClient(server.address) as counter:
        callers = in_order(counter, *range(1, 11))
        go.set()
        assert [caller.end() for caller in callers] == list(range(1, 11))


def test_what_waits_is_sent_while_a_long_call_is_under_way() -> None:
    """The window moves on with each reply, and those behind need not wait for the last."""
    begun, go = threading.Event(), threading.Event()

    def script(sock: socket.socket) -> None:
        receive_exactly(sock, 2 * REQUEST_SIZE)
        begun.set()
        go.wait()
        sock.sendall(encode_total(1))
        receive_exactly(sock, REQUEST_SIZE)  # of the other call, with the second still unanswered
        sock.sendall(encode_total(2) + encode_total(3))

    with ScriptedServer(script) as server, CounterClient(server.address) as counter:
        long = Caller(lambda: counter.add_many([1, 1]))
        begun.wait()
        short = Caller(lambda: counter.add(1))
        queued(counter, 2)
        go.set()
        assert (long.end(), short.end()) == ([1, 2], 3)


def test_frames_of_one_call_stay_together_and_in_the_window() -> None:
    most: list[int] = []
    frames: list[bytes] = []

    def script(sock: socket.socket) -> None:
        while len(frames) < 10 * 300:
            unanswered = len(frames)
            frames.append(receive_exactly(sock, REQUEST_SIZE))
            sock.settimeout(0.2)
            try:
                while True:
                    frames.append(receive_exactly(sock, REQUEST_SIZE))
            except TimeoutError:
                most.append(len(frames) - unanswered)
            sock.settimeout(None)
            sock.sendall(encode_total(0) * most[-1])

    with ScriptedServer(script) as server, CounterClient(server.address) as counter:
        calls = [[1000 * number + each for each in range(300)] for number in range(10)]
        callers = [Caller(lambda call=call: counter.add_many(call)) for call in calls]  # type: ignore[misc]
        assert all(caller.end() == [0] * 300 for caller in callers)
    assert max(most) <= WINDOW_FRAMES
    assert len(most) < 10
    seen = [int.from_bytes(frame[:8]) for frame in frames]
    assert sorted(seen[at : at + 300] for at in range(0, 3000, 300)) == calls


def test_the_timeout_bounds_a_whole_call_waiting_for_others_included() -> None:
    received: list[bytes] = []

    def script(sock: socket.socket) -> None:
        while data := sock.recv(1000):
            received.append(data)

    with ScriptedServer(script) as server, CounterClient(server.address, timeout=0.6) as counter:
        callers = in_order(counter, *range(1, 7))
        errors = [caller.end() for caller in callers]
    assert all(caller.took_s < 1 for caller in callers)
    sent = [error.amounts[0] for error in errors if isinstance(error, OutcomeUnknown)]
    assert sent[0] == 1
    assert len(sent) + sum(isinstance(error, ConnectError) for error in errors) == 6
    arrived = b"".join(received)
    assert {amount for amount in range(1, 7) if encode_frame(amount) in arrived} <= set(sent)
    assert len(arrived) <= len(sent) * REQUEST_SIZE, "an amount was sent twice"


def test_a_call_that_waits_for_others_and_has_sent_nothing_is_safe_to_repeat() -> None:
    go = threading.Event()

    def script(sock: socket.socket) -> None:
        receive_exactly(sock, REQUEST_SIZE)
        go.wait()
        sock.sendall(encode_total(1))
        receive_exactly(sock, REQUEST_SIZE)
        sock.sendall(encode_total(4))

    with ScriptedServer(script) as server, CounterClient(server.address) as counter:
        (first,) = in_order(counter, 1)
        counter.timeout = 0.1
        with pytest.raises(ConnectError, match=r"nothing was sent within 0\.1 s, other calls"):
            counter.add(2)
        counter.timeout = 10
        go.set()
        assert first.end() == 1
        assert counter.add(3) == 4, "the connection is as good as before"


class Abandoned:
    """A server that answers 1, then reads a window; what becomes of that connection is `end`.

    Later connections are answered whatever they ask.
    """

    def __init__(self) -> None:
        self.go, self.read = threading.Event(), threading.Event()
        self.end: object = None
        self._connections = 0

    def script(self, sock: socket.socket) -> None:
        self._connections += 1
        if self._connections > 1:
            while True:
                receive_exactly(sock, REQUEST_SIZE)
                sock.sendall(encode_total(99))
        receive_exactly(sock, REQUEST_SIZE)
        self.go.wait()
        sock.sendall(encode_total(1))
        receive_exactly(sock, WINDOW_FRAMES * REQUEST_SIZE)
        self.read.set()
        try:
            self.end = sock.recv(1)
        except OSError as error:
            self.end = error


def test_a_call_that_gives_up_resets_and_each_learns_what_became_of_its_own() -> None:
    peer = Abandoned()
    with ScriptedServer(peer.script) as server, CounterClient(server.address) as counter:
        (one,) = in_order(counter, 1)
        two = Caller(lambda: counter.add_many([2] * (WINDOW_FRAMES - 1)))
        queued(counter, 2)
        counter.timeout = 1
        (three,) = in_order(counter, 3)  # whose frame goes out with those of two, which leads then
        counter.timeout = 10
        peer.go.set()
        peer.read.wait()
        (four,) = in_order(counter, 4)
        assert one.end() == 1
        gave_up, met_it = three.end(), two.end()
        assert isinstance(gave_up, OutcomeUnknown)
        assert gave_up.amounts == (3,)
        assert "no reply within 1 s" in str(gave_up)
        assert isinstance(met_it, OutcomeUnknown)
        assert met_it.amounts == (2,) * (WINDOW_FRAMES - 1)
        assert "another call on the connection waited" in str(met_it)
        assert two.took_s < 5
        assert four.end() == 99, "it was not sent, and is on the next connection"
        wait_until(lambda: isinstance(peer.end, ConnectionResetError), "the server sees a reset")


def test_when_the_server_closes_each_learns_what_became_of_its_own() -> None:
    go = threading.Event()

    def script(sock: socket.socket) -> None:
        receive_exactly(sock, REQUEST_SIZE)
        go.wait()
        sock.sendall(encode_total(1))
        receive_exactly(sock, 4 * REQUEST_SIZE)
        sock.sendall(encode_total(3) + encode_total(6) + b"\0\0\0")

    with ScriptedServer(script) as server, CounterClient(server.address) as counter:
        one, two = in_order(counter, 1, 2)
        three = Caller(lambda: counter.add_many([3, 4]))
        queued(counter, 3)
        (five,) = in_order(counter, 5)
        go.set()
        assert (one.end(), two.end()) == (1, 3)
        some, none = three.end(), five.end()
        assert isinstance(some, OutcomeUnknown)
        assert (some.totals, some.amounts, some.unsent) == ((6,), (4,), ())
        assert isinstance(none, OutcomeUnknown)
        assert (none.totals, none.amounts, none.unsent) == ((), (5,), ())
        assert "the server closed the connection" in str(none)


def test_where_no_connection_is_to_be_had_all_that_wait_learn_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        counter = CounterClient(f"127.0.0.1:{listener.getsockname()[1]}")
        callers = in_order(counter, 1, 2, 3)
        sock, _ = listener.accept()
    sock.close()
    first, *others = [caller.end() for caller in callers]
    assert isinstance(first, OutcomeUnknown)
    assert all(isinstance(error, ConnectError) for error in others)
    assert all("connection refused" in str(error) for error in others)


def test_closing_lets_the_calls_under_way_end() -> None:
    go = threading.Event()

    def script(sock: socket.socket) -> None:
        receive_exactly(sock, REQUEST_SIZE)
        go.wait()
        sock.sendall(encode_total(1))
        assert sock.recv(1) == b""
        go.clear()

    with ScriptedServer(script) as server:
        counter = CounterClient(server.address)
        (caller,) = in_order(counter, 1)
        counter.close()
        go.set()
        assert caller.end() == 1
        wait_until(lambda: not go.is_set(), "the server sees the end")


def test_threads_share_a_connection_with_tls() -> None:
    with ServerCommand(*kit().server.server_flags()) as server:
        with CounterClient(server.address, tls=trusting()) as counter:

            def add() -> list[int]:
                return [counter.add(1) for _ in range(100)]

            callers = [Caller(add) for _ in range(8)]
            totals = [caller.end() for caller in callers]
            assert sorted(chain(*totals)) == list(range(1, 801))  # type: ignore[arg-type]
        assert server.stop() == (800, 800)


def run_greenlets(code: str, *arguments: str) -> None:
    """Runs a program that patches; it has to print `fine` and nothing else."""
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (ran.stdout, ran.stderr) == ("fine\n", "")


KILLED = """
from gevent import monkey; monkey.patch_all()
import gevent, socket, sys
from gevent.event import Event
from client import CounterClient, OutcomeUnknown
from kit.harness import receive_exactly, wait_until
from protocol import encode_total

go = Event()

def serve():
    for answers in (True, False, True):
        sock, _ = listener.accept()
        receive_exactly(sock, 16)
        go.wait()
        if answers:
            sock.sendall(encode_total(1))
        try:
            while sock.recv(99):
                pass
            raise AssertionError("FIN where a reset is due")
        except ConnectionResetError:
            pass

def add(amount):
    try:
        return counter.add(amount)
    except OutcomeUnknown as error:
        return error

listener = socket.create_server(("127.0.0.1", 0))
serving = gevent.spawn(serve)
counter = CounterClient(f"127.0.0.1:{listener.getsockname()[1]}")
line = counter._line

# One whose frame is on its way with that of another.
one = gevent.spawn(counter.add, 1)
wait_until(lambda: line._in_flight == 1, "one is sent")
two, three = gevent.spawn(add, 2), gevent.spawn(add, 3)
wait_until(lambda: len(line._calls) == 3, "all are there")
go.set()
assert one.get(timeout=5) == 1
assert line._in_flight == 2
three.kill()
assert isinstance(three.value, gevent.GreenletExit), three.value
error = two.get(timeout=5)
assert error.amounts == (2,) and "another call on the connection was interrupted" in str(error)
assert line.sock is None, "replies that are still to come belong to nobody"

# The one that leads, and one that has not sent.
leading = gevent.spawn(counter.add, 4)
wait_until(lambda: line._in_flight, "it leads")
waiting = gevent.spawn(counter.add, 5)
wait_until(lambda: len(line._calls) == 2, "another waits")
leading.kill()
assert waiting.get(timeout=5) == 1, "what was not sent goes on"
waiting = gevent.spawn(counter.add, 6)
wait_until(lambda: line._in_flight, "it leads")
waiting.kill()
serving.get(timeout=5)

counter = CounterClient(sys.argv[1])
adding = [gevent.spawn(lambda: [counter.add(1) for _ in range(20)]) for _ in range(50)]
gevent.joinall(adding, raise_error=True)
assert sorted(sum((g.value for g in adding), [])) == list(range(1, 1001))
print("fine")
"""


def test_greenlets_share_a_client_and_a_killed_one_closes_the_connection() -> None:
    with ServerCommand() as server:
        run_greenlets(KILLED, server.address)


LATE = """
import sys
from client import CounterClient
counter = CounterClient(sys.argv[1], timeout=5)
if sys.argv[2] == "used":
    counter.total()
from gevent import monkey; monkey.patch_all()
import gevent
jobs = [gevent.spawn(lambda: [counter.add(1) for _ in range(50)]) for _ in range(4)]
gevent.joinall(jobs, timeout=10, raise_error=True)
assert sorted(sum((job.value for job in jobs), [])) == list(range(1, 201))
print("fine")
"""


@pytest.mark.parametrize("before", ["made", "used"])
def test_a_client_from_before_gevent_patched_is_shared_by_greenlets(before: str) -> None:
    with ServerCommand() as server:
        run_greenlets(LATE, server.address, before)
