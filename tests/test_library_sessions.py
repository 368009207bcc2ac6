"""CounterClient(session=True) against a small server of sessions, right and wrong, and a proxy that
cuts at every byte.
"""

from __future__ import annotations

import copy
import os
import pickle
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, pairwise
from typing import Any

import pytest

import client_session_line
from client import (
    AcknowledgedLost,
    AmountError,
    ArgumentError,
    ConnectError,
    CounterClient,
    CounterError,
    NoRoom,
    OutcomeUnknown,
    SessionEnded,
    SessionExpired,
    SessionHeld,
    SessionState,
    SessionsUnsupported,
    Settled,
    StateNotSaved,
    StillPending,
    WrongType,
)
from client_session import Pending
from client_session_line import SESSION_WINDOW_FRAMES, UNANSWERED_OPENS, SessionLine
from kit.certificates import kit, trusting
from kit.cutting_proxy import Cut, CuttingProxy
from kit.faults import LONG
from kit.harness import ScriptedServer, receive_exactly, wait_until
from kit.session_server import Kept, SessionServer, session_server
from protocol import HELLO_SIZE, REQUEST_SIZE, Answer, Control, Hello, decode_hello
from test_library_sharing import Caller, run_greenlets


def counting(server: SessionServer | CuttingProxy, **options: Any) -> CounterClient:
    """A client with a session; the random pauses are what make it wait, not the timeout."""
    return CounterClient(server.address, **{"timeout": 20, "session": True} | options)


@contextmanager
def stalled(server: SessionServer) -> Iterator[None]:
    """A server that reads on, but counts and answers nothing for the block."""
    with server._lock:
        yield


def only(server: SessionServer) -> Kept:
    """The one session that a server has."""
    (kept,) = server.sessions.values()
    return kept


def test_it_adds_reads_pipelines_and_takes() -> None:
    with session_server() as server, counting(server) as counter:
        assert counter.add(5) == 5
        assert counter.add_many([1, 2, 3]) == [6, 8, 11]
        assert counter.add_many([]) == []
        assert counter.take(2) == range(12, 14)
        assert counter.total() == 13
        assert counter.settle() == []
        assert [hello.kind for hello in server.hellos] == [Control.OPEN]


def test_many_amounts_go_through_a_bounded_window() -> None:
    with session_server() as server, counting(server) as counter:
        assert counter.add_many([1] * 20_000) == list(range(1, 20_001))
        assert only(server).window == SESSION_WINDOW_FRAMES


def test_a_client_without_a_session_has_none() -> None:
    with session_server() as server, CounterClient(server.address) as counter:
        assert counter.add(5) == 5
        assert counter.session is None
        assert counter.settle() == []
        assert server.sessions == {}
        with pytest.raises(ArgumentError, match="without a session"):
            counter.add(1, name="job")
        assert counter.total() == 5


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"session": 1}, WrongType, "session 1: give True"),
        ({"session": "x"}, WrongType, "SessionState"),
        ({"session": True, "on_state": 5}, WrongType, "on_state 5: give a function"),
        ({"on_state": print}, ArgumentError, "on_state without a session"),
    ],
)
def test_options_that_are_none_are_refused(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        CounterClient(**options)


def test_names_and_amounts_of_another_type_are_refused() -> None:
    counter = CounterClient("127.0.0.1:1", session=True)
    with pytest.raises(WrongType, match="name 5: give text"):
        counter.add(1, name=5)  # type: ignore[arg-type]
    with pytest.raises(WrongType, match="amount '1'"):
        counter.add("1")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="timeout -1"):
        counter.settle(-1)


def test_every_error_survives_pickling() -> None:
    lost = AcknowledgedLost("why", [1], [], [4])
    lost.lost = 3
    errors = (
        StillPending("why", [1], [2, 3], [4]),
        SessionEnded("why", [1], [], [4]),
        SessionExpired("why", [1], [2, 3], [4], "hint"),
        SessionsUnsupported("no"),
        NoRoom("no"),
        SessionHeld("no"),
        StateNotSaved("no"),
        lost,
    )
    for error in errors:
        assert isinstance(error, CounterError)
        for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
            assert type(again) is type(error)
            assert str(again) == str(error)
            assert vars(again) == vars(error)


# The hello, three frames of one call, and one of another; their answer and their replies.
ASKED = HELLO_SIZE + 4 * REQUEST_SIZE
ANSWERED = 16 + 4 * 8
# Of a connection that goes on: a hello and what is sent again; an answer with a run or more.
ASKED_AGAIN = HELLO_SIZE + 3 * REQUEST_SIZE
ANSWERED_AGAIN = 16 + 16 + 8

FIRST_CUTS = [Cut(there=at) for at in range(ASKED + 1)] + [Cut(back=at) for at in range(ANSWERED)]
SECOND_CUTS = [
    (first, second)
    for first in (Cut(there=HELLO_SIZE + 24), Cut(back=16), Cut(back=16 + 5), Cut(back=16 + 12))
    for second in (
        *(Cut(there=at) for at in range(ASKED_AGAIN + 1)),
        *(Cut(back=at) for at in range(ANSWERED_AGAIN + 1)),
    )
]


def first_given(server: SessionServer, amounts: list[int]) -> list[int]:
    """The total right after each frame of the one session, from what its server keeps of it."""
    totals: list[int] = []
    for (start, _), (last, after) in pairwise([(0, 0), *only(server).runs]):
        run = amounts[start:last]
        totals += [after - sum(run[at:]) for at in range(1, len(run) + 1)]
    return totals


def ride_out(cuts: tuple[Cut, ...], fault: str = "") -> int:
    """Adds through cuts, others adding after each; gives back how many connections it took."""
    with session_server(fault) as server:

        def others_add() -> None:
            with server._lock:
                server.total += 1000

        with CuttingProxy(server.port, cuts, others_add) as proxy, counting(proxy) as counter:
            totals = [*counter.add_many([5, 1, 3]), counter.add(7)]
            assert totals == first_given(server, [5, 1, 3, 7])
            assert [total % 1000 for total in totals] == [5, 6, 9, 16]
            assert only(server).applied == 4
            wait_until(lambda: server.total == 16 + 1000 * proxy.made, "the others have added")
            return proxy.connections


@pytest.mark.parametrize(
    ("fault", "cut"), [("run", Cut(back=17)), ("applied", Cut(there=HELLO_SIZE + REQUEST_SIZE + 8))]
)
def test_a_server_that_tells_a_wrong_total_is_found_by_these_tests(fault: str, cut: Cut) -> None:
    ride_out((cut,))
    with pytest.raises(AssertionError):
        ride_out((cut,), fault)


@pytest.mark.parametrize("part", range(4))
def test_a_cut_at_any_byte_loses_nothing_and_counts_nothing_twice(part: int) -> None:
    connections = [ride_out((cut,)) for cut in FIRST_CUTS[part::4]]
    assert max(connections) == 2


@pytest.mark.parametrize("part", range(8) if LONG else (0, 5))
def test_a_second_cut_at_any_byte_of_what_goes_on_does_not_either(part: int) -> None:
    connections = [ride_out(cuts) for cuts in SECOND_CUTS[part::8]]
    assert max(connections) == 3


def test_connections_that_break_all_the_time_are_shared_by_many_threads() -> None:
    chance = random.Random(5)
    with session_server() as server:
        cuts = [Cut(back=chance.randrange(600)) for _ in range(40)]
        with CuttingProxy(server.port, cuts) as proxy, counting(proxy) as counter:

            def add() -> list[int]:
                return [counter.add(1) for _ in range(50)] + counter.add_many([1] * 50)

            callers = [Caller(add) for _ in range(8)]
            totals = [caller.end() for caller in callers]
            assert sorted(chain(*totals)) == list(range(1, 801))  # type: ignore[arg-type]
            assert proxy.made >= 5, "the connections were cut"
        assert server.total == 800


def test_an_idle_session_goes_on_with_the_next_call() -> None:
    with session_server() as server, counting(server) as counter:
        assert counter.add(1) == 1
        server.disconnect()
        wait_until(lambda: only(server).holder is None, "the server has let go")
        assert counter.add(1) == 2
        assert [hello.value for hello in server.hellos] == [SESSION_WINDOW_FRAMES, 1]


def test_a_server_that_is_away_for_a_while_is_waited_for() -> None:
    with session_server() as server, counting(server) as counter:
        assert counter.add(1) == 1
        server.close()
        caller = Caller(lambda: counter.add_many([1, 1]))
        line = counter._line
        assert isinstance(line, SessionLine)
        wait_until(lambda: isinstance(line._trouble, ConnectionRefusedError), "nobody listens")
        again = SessionServer(port=server.port)
        again.total, again.sessions = server.total, server.sessions
        assert caller.end() == [2, 3]
        again.close()


def test_a_server_that_is_not_there_yet_is_waited_for_until_the_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_session_line, "LAST_PAUSE_S", 0.01)  # for many attempts
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(ConnectError, match="connection refused; start a server"):
        CounterClient(address, timeout=0.3, session=True).add(1)
    assert 0.25 < time.monotonic() - started < 1


def test_what_no_waiting_changes_is_said_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(ConnectError, match="unknown host"):
        CounterClient("no.such.host.invalid:80", session=True).add(1)
    assert time.monotonic() - started < 5


def test_a_server_that_knows_no_sessions_is_called_by_its_name() -> None:
    with session_server("old") as server, counting(server) as counter:
        with pytest.raises(SessionsUnsupported, match="leave session=True out"):
            counter.add(1)
        assert server.total == 0


def test_a_server_that_drains_is_no_server_without_sessions() -> None:
    seen: list[bytes] = []

    def script(sock: socket.socket) -> None:
        seen.append(receive_exactly(sock, HELLO_SIZE))
        if len(seen) <= UNANSWERED_OPENS - 1:
            return
        sock.sendall(Answer(0, 100).encode())
        receive_exactly(sock, REQUEST_SIZE)
        sock.sendall((7).to_bytes(8))

    with ScriptedServer(script) as server:
        with CounterClient(server.address, session=True) as counter:
            assert counter.add(7) == 7
    assert len(set(seen)) == 1, "it is one session"


def test_a_connection_that_falls_silent_is_given_up_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_session_line, "SILENCE_S", 0.1)
    hellos: list[Hello | None] = []

    def script(sock: socket.socket) -> None:
        hellos.append(decode_hello(receive_exactly(sock, HELLO_SIZE)))
        if len(hellos) == 2:
            sock.sendall(Answer(0, 100).encode())
            receive_exactly(sock, REQUEST_SIZE)
        elif len(hellos) == 3:
            sock.sendall(Answer(1, 100, ((1, 7),)).encode())
        sock.recv(1)

    with ScriptedServer(script) as server:
        with CounterClient(server.address, timeout=None, session=True) as counter:
            assert counter.add(7) == 7
    assert len(hellos) == 3


def test_a_session_goes_on_over_tls() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(kit().server.cert, kit().server.key)
    hellos: list[Hello | None] = []

    def script(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as peer:
            hellos.append(decode_hello(receive_exactly(peer, HELLO_SIZE)))
            if len(hellos) == 1:  # and hangs up in the midst, without the farewell of TLS
                peer.sendall(Answer(0, 100).encode()[:9])
            elif len(hellos) == 2:
                peer.sendall(Answer(0, 100).encode())
                receive_exactly(peer, REQUEST_SIZE)
            else:
                peer.sendall(Answer(1, 100, ((1, 7),)).encode())
                peer.recv(1)

    with ScriptedServer(script) as server:
        with CounterClient(server.address, tls=trusting(), session=True) as counter:
            assert counter.add(7) == 7
    assert [hello and hello.kind for hello in hellos] == [
        Control.OPEN,
        Control.OPEN,
        Control.RESUME,
    ]


def test_a_server_without_room_says_so() -> None:
    with session_server("full") as server, counting(server) as counter:
        with pytest.raises(NoRoom, match="raise its --sessions"):
            counter.add(1)


def test_a_session_that_is_held_elsewhere_is_asked_for_until_the_timeout() -> None:
    with session_server() as server, counting(server, timeout=0.3) as counter:
        assert counter.add(1) == 1
        server.fault = "held"
        server.disconnect()
        wait_until(lambda: only(server).holder is None, "the server has let go")
        with pytest.raises(SessionHeld, match="another connection has the session"):
            counter.add(1)
        assert len(server.hellos) > 2
        server.fault = ""
        assert counter.add(1) == 2


def test_a_call_that_is_given_up_is_still_counted_once_and_settled() -> None:
    with session_server() as server, counting(server, timeout=0.3) as counter:
        assert counter.add(1) == 1
        with stalled(server):
            with pytest.raises(StillPending, match=r"the addition of 5 will still be") as caught:
                counter.add(5)
            assert caught.value.amounts == (5,)
            with pytest.raises(ConnectError, match=r"not answered within 0\.3 s"):
                counter.add(7)
        assert counter.settle() == [Settled("", 5, 6)]
        assert counter.settle() == []
        assert counter.total() == server.total == 6


def test_what_is_pending_is_counted_by_the_next_call_too() -> None:
    with session_server() as server, counting(server, timeout=0.3) as counter:
        assert counter.add(1) == 1
        with stalled(server), pytest.raises(StillPending):
            counter.add_many([5, 5], name="job")
        counter.timeout = 20
        assert counter.add(1) == 12
        server.close()
        assert counter.settle() == [Settled("job", 5, 6), Settled("job", 5, 11)]


def test_a_long_call_that_is_given_up_says_what_is_pending_and_what_is_not() -> None:
    with session_server() as server, counting(server, timeout=0.3) as counter:
        assert counter.add(1) == 1
        with (
            stalled(server),
            pytest.raises(StillPending, match=r"256 additions .*; 744 ") as caught,
        ):
            counter.add_many(range(1000))
        error = caught.value
        assert error.amounts == tuple(range(SESSION_WINDOW_FRAMES))
        assert error.unsent == tuple(range(SESSION_WINDOW_FRAMES, 1000))
        assert [amount for _, amount, _ in counter.settle()] == list(error.amounts)
        assert counter.total() == 1 + sum(error.amounts)


def test_what_was_answered_before_a_call_was_given_up_is_not_settled_again() -> None:
    def script(sock: socket.socket) -> None:
        hello = decode_hello(receive_exactly(sock, HELLO_SIZE))
        assert hello is not None
        if hello.kind is Control.RESUME:
            assert hello.value == 1
            sock.sendall(Answer(2, 100, ((2, 9),)).encode())
            return
        sock.sendall(Answer(0, 100).encode())
        receive_exactly(sock, 2 * REQUEST_SIZE)
        sock.sendall((5).to_bytes(8) + b"\0")
        sock.recv(1)

    with ScriptedServer(script) as server:
        with CounterClient(server.address, timeout=0.2, session=True) as counter:
            with pytest.raises(StillPending) as caught:
                counter.add_many([5, 4])
            assert (caught.value.totals, caught.value.amounts) == ((5,), (4,))
            assert counter.settle() == [Settled("", 4, 9)]


def test_settling_has_a_timeout_of_its_own_and_loses_nothing_by_it() -> None:
    with session_server() as server, counting(server, timeout=0.2) as counter:
        assert counter.add(1) == 1
        with stalled(server):
            with pytest.raises(StillPending):
                counter.add(5)
            with pytest.raises(StillPending) as caught:
                counter.settle(0.2)
            assert caught.value.amounts == (5,)
        assert counter.settle() == [Settled("", 5, 6)]


def test_calls_go_on_after_settling_was_given_up() -> None:
    hellos: list[Hello | None] = []

    def script(sock: socket.socket) -> None:
        hellos.append(decode_hello(receive_exactly(sock, HELLO_SIZE)))
        if len(hellos) < 3:
            sock.sendall(Answer(0, 100).encode())
            receive_exactly(sock, REQUEST_SIZE)
        else:
            sock.sendall(Answer(1, 100, ((1, 5),)).encode())
            receive_exactly(sock, REQUEST_SIZE)
            sock.sendall((12).to_bytes(8))
        sock.recv(1)

    with ScriptedServer(script) as server:
        with CounterClient(server.address, timeout=0.2, session=True) as counter:
            with pytest.raises(StillPending):
                counter.add(5)
            with pytest.raises(StillPending):
                counter.settle(0.2)
            assert counter.add(7) == 12
            assert counter.settle() == [Settled("", 5, 5)]


def test_calls_that_wait_for_others_are_given_up_alone() -> None:
    with session_server() as server, counting(server) as counter:
        assert counter.add(1) == 1
        line = counter._line
        with stalled(server):
            first = Caller(lambda: counter.add(2))
            wait_until(lambda: line._sent_calls == 1, "the first is sent")
            counter.timeout = 0.2
            with pytest.raises(ConnectError, match=r"nothing was sent within 0\.2 s, other calls"):
                counter.add(4)
            assert line.sock is not None
        assert first.end() == 3
        counter.timeout = 20
        assert counter.add(1) == 4


def test_an_amount_above_the_servers_limit_is_refused_and_never_sent() -> None:
    with session_server(limit=10) as server, counting(server) as counter:
        for _ in range(2):
            with pytest.raises(AmountError, match="11 is above the server's limit of 10"):
                counter.add_many([10, 11])
        assert counter.add(10) == 10
        assert len(server.hellos) == 1
        assert only(server).applied == 1


def test_an_amount_above_a_limit_that_was_lowered_is_never_sent_again() -> None:
    with session_server() as server:
        inside_the_second_call = Cut(there=HELLO_SIZE + REQUEST_SIZE + 1)
        lower = [inside_the_second_call]
        with CuttingProxy(server.port, lower, lambda: setattr(server, "limit", 10)) as proxy:
            with counting(proxy) as counter:
                assert counter.add(1) == 1
                with pytest.raises(SessionEnded, match="11 is above the server's limit") as caught:
                    counter.add_many([5, 11])
                assert caught.value.unsent == (5, 11)
                assert server.total == 1
                assert counter.add(1) == 2


def test_a_server_that_forgot_the_session_leaves_what_was_pending_unknown() -> None:
    with session_server("forgets") as server, counting(server, timeout=0.3) as counter:
        assert counter.add(1) == 1
        with stalled(server), pytest.raises(StillPending):
            counter.add_many([5, 6])
        wait_until(lambda: not server.sessions, "the server has forgotten it")
        with pytest.raises(SessionExpired, match="does not know the session") as caught:
            counter.settle()
        assert isinstance(caught.value, OutcomeUnknown)
        assert caught.value.amounts == (5, 6)
        assert counter.settle() == []
        before = server.total
        assert counter.add(1) == before + 1
        assert len({hello.session_id for hello in server.hellos}) == 2


def test_a_server_that_forgot_a_session_with_nothing_pending_gets_another() -> None:
    with session_server("forgets") as server, counting(server) as counter:
        assert counter.add(1) == 1
        server.disconnect()
        wait_until(lambda: not server.sessions, "the server has forgotten it")
        assert counter.add(1) == 2


def test_a_call_under_way_learns_that_the_session_is_forgotten_and_is_not_sent_again() -> None:
    with session_server("forgets") as server:
        with CuttingProxy(server.port, [Cut(back=16 + 8)]) as proxy, counting(proxy) as counter:
            with pytest.raises(SessionExpired) as caught:
                counter.add_many([5, 1, 3])
            assert caught.value.totals == (5,)
            assert caught.value.amounts == (1, 3)
            assert server.total == 9


def test_a_server_that_lost_what_it_answered_is_found_out_and_told_to_all_that_wait() -> None:
    with session_server() as server, counting(server) as counter:
        assert counter.add_many([5, 6, 7]) == [5, 11, 18]
        kept = only(server)
        kept.applied, kept.runs, server.total = 1, [(1, 5)], 5
        server.disconnect()
        wait_until(lambda: kept.holder is None, "the server has let go")
        with pytest.raises(AcknowledgedLost, match=r"lost 2 of this .* 9 will not be") as caught:
            counter.add(9)
        assert (caught.value.lost, caught.value.unsent) == (2, (9,))
        assert counter.add(9) == 14


def test_a_server_that_says_more_than_was_sent_is_not_believed() -> None:
    with session_server("applied") as server, counting(server, timeout=0.3) as counter:
        assert counter.add(1) == 1
        server.disconnect()
        wait_until(lambda: only(server).holder is None, "the server has let go")
        with pytest.raises(ConnectError, match="2 frames are said to be applied, 1 were sent"):
            counter.add(1)


def test_a_forked_child_has_a_session_of_its_own() -> None:
    with session_server() as server, counting(server) as counter:
        assert counter.add(1) == 1
        pid = os.fork()
        if not pid:
            code = 1
            try:
                code = 0 if counter.add_many([10] * 50)[-1] == 501 else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert counter.add(1) == 502
        assert [hello.kind for hello in server.hellos] == [Control.OPEN, Control.OPEN]
        assert len(server.sessions) == 2


def test_closing_ends_a_session_with_nothing_pending() -> None:
    with session_server() as server:
        with counting(server) as counter:
            assert counter.add(1) == 1
        wait_until(lambda: not server.sessions, "the session is ended")
        with counter:
            assert counter.add(1) == 2
            assert len(server.sessions) == 1


def test_closing_keeps_a_session_with_something_pending() -> None:
    with session_server() as server, counting(server, timeout=0.2) as counter:
        assert counter.add(1) == 1
        with stalled(server), pytest.raises(StillPending):
            counter.add(5)
        counter.close()
        assert len(server.sessions) == 1
        assert counter.settle() == [Settled("", 5, 6)]


def test_closing_does_not_wait_for_a_server_that_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_session_line, "END_PATIENCE_S", 0.1)
    with session_server() as server, counting(server) as counter:
        assert counter.add(1) == 1
        started = time.monotonic()
        with stalled(server):
            counter.close()
        assert time.monotonic() - started < 5


def test_closing_lets_the_calls_under_way_end() -> None:
    with session_server() as server, counting(server) as counter:
        assert counter.add(1) == 1
        with stalled(server):
            caller = Caller(lambda: counter.add(1))
            wait_until(lambda: counter._line._sent_calls == 1, "it is sent")
            counter.close()
        assert caller.end() == 2
        wait_until(lambda: not server.sessions, "the session is ended")


def test_the_state_is_told_before_the_frames_are_sent_that_it_tells_of() -> None:
    with session_server() as server:
        told: list[tuple[SessionState, int]] = []
        with counting(server, on_state=lambda state: told.append((state, server.total))) as counter:
            counter.add(5, name="a")
            counter.add_many([6, 7], name="b")
            assert counter.session is not None
            now = counter.session.state
        first, second, last = told
        assert first[0].pending == (Pending("a", 5),)
        assert (first[1], second[1]) == (0, 5)
        assert second[0].settled == (Settled("a", 5, 5),)
        assert second[0].pending == (Pending("b", 6), Pending("b", 7))
        assert now.settled == (Settled("b", 6, 11), Settled("b", 7, 18))
        assert last[0] == now, "nothing is pending in what is kept of a session that is over"
        assert now.pending == ()


@pytest.mark.parametrize("is_sent", [False, True])
def test_another_process_goes_on_from_a_state(is_sent: bool) -> None:
    class CrashError(BaseException):
        """A process that dies here."""

    with session_server() as server:
        kept: list[str] = []

        def keep(state: SessionState) -> None:
            kept.append(state.to_text())
            if len(kept) == 2 and not is_sent:
                raise CrashError

        dying = counting(server, on_state=keep)
        assert dying.add(5, name="a") == 5
        if is_sent:
            assert dying.add(6, name="b") == 11
        else:
            with pytest.raises(CrashError):
                dying.add(6, name="b")
        assert len(kept) == 2
        dying._line._drop()
        with counting(server, session=SessionState.from_text(kept[1])) as counter:
            assert counter.settle() == [Settled("b", 6, 11)]
            assert counter.add(1) == 12


def test_a_state_that_could_not_be_kept_stops_what_it_tells_of() -> None:
    is_full = True

    def keep(_: SessionState) -> None:
        if is_full:
            raise OSError(28, "No space left on device")

    with session_server() as server, counting(server, on_state=keep) as counter:
        with pytest.raises(StateNotSaved, match="No space left on device") as caught:
            counter.add(5)
        assert isinstance(caught.value.__cause__, OSError)
        assert server.total == 0
        is_full = False
        assert counter.add(7) == 7
        assert only(server).applied == 1


def test_a_forked_child_does_not_write_over_the_state_of_its_parent() -> None:
    with session_server() as server, counting(server, on_state=lambda _: None) as counter:
        assert counter.add(1) == 1
        pid = os.fork()
        if not pid:
            code = 1
            try:
                counter.add(1)
            except StateNotSaved:
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert counter.add(1) == 2


GREENLETS = """
from gevent import monkey; monkey.patch_all()
import gevent, random, sys
from client import CounterClient, Settled, StillPending
from kit.certificates import kit, trusting
from kit.cutting_proxy import Cut, CuttingProxy
from kit.faults import LONG
from kit.harness import wait_until
from kit.session_server import session_server

chance = random.Random(7)
with session_server() as server:
    cuts = [Cut(back=chance.randrange(900)) for _ in range(20)]
    with CuttingProxy(server.port, cuts) as proxy:
        with CounterClient(proxy.address, timeout=20, session=True) as counter:
            adding = [gevent.spawn(lambda: [counter.add(1) for _ in range(20)]) for _ in range(50)]
            gevent.joinall(adding, raise_error=True)
            assert sorted(sum((g.value for g in adding), [])) == list(range(1, 1001))
            assert proxy.made > 5, proxy.made

    server.total = 0
    counter = CounterClient(server.address, timeout=20, session=True)
    assert counter.add(1) == 1
    with server._lock:
        leading = gevent.spawn(counter.add, 10)
        wait_until(lambda: counter._line._sent_calls == 1, "it is sent")
        waiting = gevent.spawn(counter.add, 100)
        wait_until(lambda: len(counter._line._calls) == 2, "another waits")
        leading.kill()
        assert isinstance(leading.value, gevent.GreenletExit)
    assert waiting.get(timeout=10) == 111
    assert counter.settle() == [Settled("", 10, 11)]
print("fine")
"""


def test_an_interrupt_in_the_midst_of_the_numbers_leaves_no_total_to_the_wrong_call() -> None:
    with session_server() as server, counting(server) as counter:
        assert counter.add(1) == 1
        line = counter._line
        assert isinstance(line, SessionLine)
        receive = line._session.receive

        def interrupted(data: bytes) -> list[int]:
            receive(data)
            raise KeyboardInterrupt

        line._session.receive = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            counter.add(5)
        assert counter.add(7) == 13
        with pytest.raises(OutcomeUnknown, match="interrupted in the moment") as caught:
            counter.settle()
        assert caught.value.amounts == (5,)


def test_greenlets_share_a_session_and_a_killed_one_leaves_its_addition_to_be_settled() -> None:
    run_greenlets(GREENLETS)


def test_other_threads_go_on_while_one_waits_to_connect_again() -> None:
    """They share its timeout no more than its call: each has its own."""
    with session_server() as server, counting(server) as counter:
        assert counter.add(1) == 1
        server.close()
        long = Caller(lambda: counter.add(2))
        line = counter._line
        assert isinstance(line, SessionLine)
        wait_until(lambda: line._trouble is not None, "the first leads in vain")
        counter.timeout = 0.2
        short = Caller(lambda: counter.add(3))
        assert isinstance(short.end(), ConnectError)
        assert short.took_s < 2
        again = SessionServer(port=server.port)
        again.total, again.sessions = server.total, server.sessions
        assert long.end() == 3
        threading.Thread(target=again.close).start()
