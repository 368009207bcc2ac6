"""Sessions of a total in memory: hellos, what who comes back is told, and who gives way."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent.pool import Pool

from counter.processes.bells import Bells
from counter.processes.slots import (
    REQUESTS,
    SESSIONS_EVICTED,
    SESSIONS_OPENED,
    SESSIONS_REFUSED,
    SESSIONS_RESUMED,
)
from counter.serving.additions import InMemory
from counter.serving.connection import Connection, State
from counter.serving.ending import Ending
from counter.serving.sessions import TAKEOVER_S, MemorySessions
from counter.serving.workers import Workers
from counter.system.sockets import close_with_reset
from counter.totals.ledger import Ledger, OwnLedger, SharedLedger
from counter.totals.memory import AtomicCounter, MemoryCounter, make_shared_counter
from counter.totals.sessions import SessionTable
from kit.connection import ONE, Bench, holds, state_of, totals
from kit.engine import ENGINES
from kit.harness import PATIENCE_S, wait_until
from protocol import (
    Answer,
    Control,
    Hello,
    Refused,
    decode_answer,
    encode_control,
    encode_frame,
)

LIMIT = 1000


class Process(Bench):
    """A serving process, of those that share a ledger and bells, with its connections."""

    def __init__(self, name: str, ledger: Ledger, counter: Any, bells: Bells, place: int) -> None:
        super().__init__(name, LIMIT)
        host = self.host
        loop = gevent.get_hub().loop
        self.sessions = MemorySessions(ledger, place, bells, LIMIT, host.slot, loop)
        host.sessions = self.sessions
        host.workers = Workers(Pool(9), loop, PATIENCE_S)
        host.counter = counter
        host.additions = InMemory(counter, host.slot, host.engine, self.sessions.add)

    def greet(self, hello: Hello) -> tuple[socket.socket, Connection]:
        """A connection that has sent a hello."""
        peer, connection = self.connect()
        peer.sendall(hello.encode())
        self.until(lambda: connection.state is not State.SERVED or connection.tag, "it is read")
        return peer, connection

    def welcome(self, hello: Hello) -> tuple[socket.socket, Answer | Refused | None]:
        """A connection whose hello is answered, and what it was told."""
        peer, _ = self.greet(hello)
        return peer, self.told(peer, hello)

    def told(self, peer: socket.socket, hello: Hello) -> Answer | Refused | None:
        have = hello.value if hello.kind is Control.RESUME else 0
        data, answer = b"", None
        while answer is None:
            more = peer.recv(65536)
            assert more, f"it ended behind {data!r}"
            answer, rest = decode_answer(data := data + more, have)
        assert not rest
        return answer

    def add(self, peer: socket.socket, *amounts: int) -> list[int]:
        peer.sendall(b"".join(map(encode_frame, amounts)))
        self.until(lambda: holds(peer, 8 * len(amounts)), "it is answered")
        return totals(peer, len(amounts))

    def hear(self) -> None:
        """What the loop does when the process's bell was rung."""
        self.sessions._on_bell()
        self.host.decide()

    def close(self) -> None:
        super().close()
        self.sessions.close()


@pytest.fixture(params=ENGINES)
def process(request: pytest.FixtureRequest) -> Iterator[Process]:
    counter = MemoryCounter()
    one = Process(request.param, OwnLedger(counter, SessionTable(3, 1)), counter, Bells(1), 0)
    yield one
    one.close()


@pytest.fixture(params=ENGINES)
def pair(request: pytest.FixtureRequest) -> Iterator[list[Process]]:
    """Two processes that share a total."""
    counter = make_shared_counter()
    assert isinstance(counter, AtomicCounter)
    ledger, bells = SharedLedger(counter, SessionTable(8, 2), 2), Bells(2)
    processes = [Process(request.param, ledger, counter, bells, place) for place in (0, 1)]
    yield processes
    for process in processes:
        process.close()


def opening(session_id: int = 5, window: int = 4) -> Hello:
    return Hello(session_id, Control.OPEN, window)


def resuming(have: int, session_id: int = 5) -> Hello:
    return Hello(session_id, Control.RESUME, have)


def is_over(process: Process, connection: Connection) -> Callable[[], bool]:
    return lambda: connection.fd not in process.host.connections


def test_who_comes_back_is_told_what_was_counted(process: Process) -> None:
    peer, answer = process.welcome(opening())
    assert answer == Answer(0, LIMIT)
    assert process.add(peer, 1, 2) == [1, 3]
    assert process.add(peer, 0) == [3]
    peer.close()
    again, answer = process.welcome(resuming(1))
    assert answer == Answer(3, LIMIT, ((2, 3), (3, 3)))
    assert process.add(again, 10) == [13]
    slot = process.host.slot
    assert (slot[SESSIONS_OPENED], slot[SESSIONS_RESUMED], slot[REQUESTS]) == (1, 1, 4)


def test_those_without_a_session_add_in_the_same_turns(process: Process) -> None:
    (first, _), (second, _) = process.welcome(opening(1)), process.welcome(opening(2))
    plain, _ = process.connect()
    for peer in (first, plain, second):
        peer.sendall(ONE * 2)
    for peer in (first, plain, second):
        process.until(lambda peer=peer: holds(peer, 16), "it is answered")  # type: ignore[misc]
    given = [totals(peer, 2) for peer in (first, plain, second)]
    assert sorted(total for some in given for total in some) == [1, 2, 3, 4, 5, 6]
    _, answer = process.welcome(resuming(0, 2))
    assert isinstance(answer, Answer)
    assert answer.applied == 2
    assert answer.runs[-1] == (2, given[2][1])


@pytest.mark.parametrize("cut", range(1, 48))
def test_a_hello_may_come_in_two_parts(process: Process, cut: int) -> None:
    peer, connection = process.connect()
    data = opening().encode()
    peer.sendall(data[:cut])
    process.until(lambda: connection in process.host.frame_deadlines._began, "it has begun")
    peer.sendall(data[cut:])
    process.until(lambda: holds(peer, 16), "it is answered")
    assert process.told(peer, opening()) == Answer(0, LIMIT)
    assert connection not in process.host.frame_deadlines._began
    assert process.add(peer, 7) == [7]


@pytest.mark.parametrize("cut", range(1, 48))
def test_a_hello_that_ends_within_opens_nothing(process: Process, cut: int) -> None:
    peer, connection = process.connect()
    peer.sendall(opening().encode()[:cut])
    peer.shutdown(socket.SHUT_WR)
    process.until(is_over(process, connection), "it is over")
    assert peer.recv(1) == b""
    assert process.sessions._table.count() == (0, 0)


def test_a_hello_that_stops_is_ended_by_the_deadline_of_its_first_byte(process: Process) -> None:
    peer, connection = process.connect()
    peer.sendall(opening().encode()[:20])
    process.until(lambda: len(connection.hello) == 20, "it is read")
    (began_at,) = process.host.frame_deadlines._began.values()
    peer.sendall(opening().encode()[20:30])
    process.until(lambda: len(connection.hello) == 30, "it is read")
    assert list(process.host.frame_deadlines._began.values()) == [began_at]
    assert connection.overdue() == "a hello stopped after 30 bytes"


def test_a_hello_goes_on_after_its_worker_was_given_up(process: Process) -> None:
    peer, connection = process.connect()
    peer.sendall(opening().encode()[:20])
    process.until(lambda: len(connection.hello) == 20, "it is read")
    process.host.workers._give_up([connection])
    assert state_of(connection) is State.PARKED
    peer.sendall(opening().encode()[20:])
    process.until(lambda: holds(peer, 16), "it is answered")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (bytes(16), Ending.CHECKSUM),
        (bytes(48), Ending.CHECKSUM),
        (encode_control(Control.END, 0), Ending.HELLO),
        (encode_control(Control.OPEN, 5), Ending.HELLO),
        (opening().encode()[:16] + ONE, Ending.HELLO),
        (opening().encode()[:32] + encode_control(Control.END, 0), Ending.HELLO),
        (opening(window=0).encode(), Ending.HELLO),
        (opening(window=4097).encode(), Ending.HELLO),
        (opening().encode() + ONE, Ending.HELLO),
    ],
)
def test_what_is_no_hello_is_refused_and_counts_nothing(
    process: Process, data: bytes, why: Ending
) -> None:
    peer, connection = process.connect()
    peer.sendall(data)
    process.until(is_over(process, connection), "it is over")
    assert process.host.refusals == [why]
    assert process.host.slot[REQUESTS] == 0
    assert process.sessions._table.count() == (0, 0)


def test_where_there_are_no_sessions_a_hello_is_a_wrong_checksum(process: Process) -> None:
    process.host.sessions = None
    peer, connection = process.connect()
    peer.sendall(opening().encode())
    process.until(is_over(process, connection), "it is over")
    assert process.host.refusals == [Ending.CHECKSUM]


@pytest.mark.parametrize(
    ("hello", "refused"),
    [
        (resuming(0, 99), Refused.UNKNOWN),
        (opening(), Refused.UNKNOWN),  # something of it was applied
        (resuming(0), Refused.UNKNOWN),  # more than a window ago
    ],
)
def test_a_hello_that_no_session_follows_is_told_why_and_takes_nothing_over(
    process: Process, hello: Hello, refused: Refused
) -> None:
    holder, _ = process.welcome(opening(window=4))
    assert process.add(holder, 1, 1, 1, 1, 1) == [1, 2, 3, 4, 5]
    peer, answer = process.welcome(hello)
    assert answer is refused
    assert peer.recv(1) == b""
    assert process.add(holder, 1) == [6]
    assert process.host.slot[SESSIONS_REFUSED] == 1


def test_opened_again_before_anything_was_applied_it_is_the_same(process: Process) -> None:
    first, _ = process.welcome(opening())
    second, answer = process.welcome(opening())
    assert answer == Answer(0, LIMIT)
    assert first.recv(1) == b""
    assert process.add(second, 4) == [4]


def test_who_has_more_than_was_applied_is_told_so_and_the_session_ends(process: Process) -> None:
    first, _ = process.welcome(opening())
    process.add(first, 1)
    peer, answer = process.welcome(resuming(2))
    assert answer == Answer(1, LIMIT)
    assert peer.recv(1) == b""
    assert process.welcome(resuming(1))[1] is Refused.UNKNOWN


def test_a_full_table_has_no_room_and_plain_peers_do_not_notice(process: Process) -> None:
    for session_id in (1, 2, 3):
        assert process.welcome(opening(session_id))[1] == Answer(0, LIMIT)
    peer, answer = process.welcome(opening(4))
    assert answer is Refused.NO_ROOM
    assert peer.recv(1) == b""
    plain, _ = process.connect()
    assert process.add(plain, 3) == [3]
    assert process.host.slot[SESSIONS_EVICTED] == 0


def test_what_the_old_connection_sent_and_was_not_read_is_not_counted(process: Process) -> None:
    old, _ = process.welcome(opening())
    assert process.add(old, 1) == [1]
    new, connection = process.connect()
    new.sendall(resuming(1).encode())
    wait_until(lambda: len(connection.sock.recv(99, socket.MSG_PEEK)) == 48, "it came")
    process.host.engine.receive(connection.fd)
    old.sendall(encode_frame(100))  # read by nobody before the hello is answered
    process.host.decide()
    assert process.told(new, resuming(1)) == Answer(1, LIMIT)
    assert process.add(new, 5) == [6]
    assert process.host.counter.total() == 6


def test_an_end_frees_the_session_and_says_what_was_applied(process: Process) -> None:
    peer, _ = process.welcome(opening())
    peer.sendall(encode_frame(5) * 2 + encode_control(Control.END, 2))
    process.until(lambda: holds(peer, 24), "it is answered")
    assert totals(peer, 3) == [5, 10, 2]
    assert peer.recv(1) == b""
    assert process.sessions._table.count() == (0, 0)


@pytest.mark.parametrize("frame", [bytes(16), encode_frame(LIMIT + 1), opening().encode()[:16]])
def test_a_frame_that_is_refused_ends_the_session_too(process: Process, frame: bytes) -> None:
    peer, _ = process.welcome(opening())
    peer.sendall(encode_frame(5) + frame)
    process.until(lambda: not process.host.connections, "it is over")
    assert totals(peer, 1) == [5]
    assert len(process.host.refusals) == 1
    assert process.sessions._table.count() == (0, 0)


def test_a_reset_leaves_the_session(process: Process) -> None:
    peer, connection = process.greet(opening())
    process.told(peer, opening())
    process.add(peer, 1)
    close_with_reset(peer)
    process.until(is_over(process, connection), "it is over")
    assert process.sessions._table.count() == (1, 0)
    assert process.welcome(resuming(1))[1] == Answer(1, LIMIT)


def test_a_drain_answers_no_hello(process: Process) -> None:
    peer, connection = process.connect()
    peer.sendall(opening().encode()[:20])
    process.until(lambda: len(connection.hello) == 20, "it is read")
    process.host.is_draining = True
    connection.drain()
    assert peer.recv(1) == b""
    late, other = process.connect(is_admitted=False)
    late.sendall(opening().encode())
    wait_until(lambda: len(other.sock.recv(99, socket.MSG_PEEK)) == 48, "it came")
    other.drain()
    process.until(is_over(process, other), "it is over")
    assert late.recv(1) == b""
    assert process.sessions._table.count() == (0, 0)


def test_a_session_moves_to_another_process(pair: list[Process]) -> None:
    here, there = pair
    old, _ = here.welcome(opening())
    assert here.add(old, 1, 2) == [1, 3]
    new, connection = there.greet(resuming(1))
    assert state_of(connection) is State.GREETING
    assert there.host.workers.taken == 0  # it waits without one
    old.sendall(encode_frame(100))  # while the other is waited for
    here.hear()
    there.hear()
    assert there.told(new, resuming(1)) == Answer(2, LIMIT, ((2, 3),))
    assert there.add(new, 5) == [8]
    assert here.host.counter.total() == 8


def test_a_process_that_does_not_give_it_up_keeps_it(pair: list[Process]) -> None:
    here, there = pair
    old, _ = here.welcome(opening())
    new, _ = there.greet(resuming(0))
    there.sessions.sweep(time.monotonic())
    assert not holds(new, 8)
    there.sessions.sweep(time.monotonic() + TAKEOVER_S)
    assert there.told(new, resuming(0)) is Refused.HELD
    assert new.recv(1) == b""
    assert here.add(old, 1) == [1]


def test_of_a_process_that_died_it_is_taken_once_that_is_buried(pair: list[Process]) -> None:
    here, there = pair
    old, _ = here.welcome(opening())
    here.add(old, 1)
    new, _ = there.greet(resuming(0))
    here.sessions._ledger.bury(0)
    there.hear()
    assert there.told(new, resuming(0)) == Answer(1, LIMIT, ((1, 1),))


def test_who_does_not_wait_any_longer_is_not_welcomed(pair: list[Process]) -> None:
    here, there = pair
    here.welcome(opening())
    new, connection = there.greet(resuming(0))
    close_with_reset(new)
    there.until(is_over(there, connection), "it is over")
    here.hear()
    there.hear()
    assert here.sessions._table.count() == (1, 0)
