"""Sessions over a real SQLite store, by connections of two serving processes: what rides along with
commits, what a fence drops, what outlasts an outage."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent.pool import Pool

from counter.processes.slots import REQUESTS
from counter.serving.connection import Connection
from counter.serving.ending import Ending
from counter.serving.group_commit import GroupCommit
from counter.serving.stored_sessions import StoredSessions
from counter.serving.workers import Workers
from counter.totals.sqlite import SqliteStore
from kit.connection import Bench, holds, totals
from kit.engine import ENGINES
from kit.harness import PATIENCE_S
from protocol import Answer, Control, Hello, Refused, decode_answer, encode_control, encode_frame

LIMIT, TIMEOUT_S = 1000, 20.0


class Silent:
    """An outage of which nobody is told."""

    def begin(self, reason: str) -> None:
        pass

    def end(self) -> None:
        pass


class Process(Bench):
    """A serving process on a file, with its connections."""

    def __init__(self, name: str, path: str, sessions: int = 10) -> None:
        super().__init__(name, LIMIT)
        host = self.host
        store = SqliteStore(path)
        store.check()
        store.keep_sessions(sessions)
        loop = gevent.get_hub().loop
        host.workers = Workers(Pool(9), loop, PATIENCE_S)
        host.sessions = self.sessions = StoredSessions(LIMIT, host.slot, TIMEOUT_S)
        self.group = GroupCommit(
            store, host.slot, host.engine, self, TIMEOUT_S, Silent(), lambda: None, self.sessions
        )
        host.additions = self.group

    def withdraw(self, fd: int) -> None:
        """As a crowd."""
        if fd in self.host.connections:
            self.host.connections[fd].withdraw()

    def decide_events(self) -> None:
        """As a crowd."""
        self.host.decide()

    def turn(self) -> None:
        """One of the loop."""
        self.host.turn()
        self.group.commit()
        gevent.sleep(0.0005)

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain until {what}"
            self.turn()

    def greet(self, hello: Hello) -> tuple[socket.socket, Connection]:
        """A connection that has sent a hello."""
        peer, connection = self.connect()
        peer.sendall(hello.encode())
        return peer, connection

    def welcome(self, hello: Hello) -> tuple[socket.socket, Answer | Refused]:
        """A connection whose hello is answered, and what it was told."""
        peer, connection = self.greet(hello)
        self.until(lambda: connection.tag or not is_open(self, connection), "it is answered")
        have = hello.value if hello.kind is Control.RESUME else 0
        answer, rest = decode_answer(peer.recv(65536), have)
        assert answer is not None
        assert not rest
        return peer, answer

    def add(self, peer: socket.socket, *amounts: int) -> list[int]:
        peer.sendall(b"".join(map(encode_frame, amounts)))
        self.until(lambda: holds(peer, 8 * len(amounts)), "it is answered")
        return totals(peer, len(amounts))

    def close(self) -> None:
        super().close()
        self.group.close()


def is_open(process: Process, connection: Connection) -> bool:
    return process.host.connections.get(connection.fd) is connection


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "counter.db")


@pytest.fixture(params=ENGINES)
def pair(request: pytest.FixtureRequest, path: str) -> Iterator[list[Process]]:
    processes = [Process(request.param, path) for _ in range(2)]
    yield processes
    for process in processes:
        process.close()


@pytest.fixture
def process(pair: list[Process]) -> Process:
    return pair[0]


def opening(session_id: int = 5, window: int = 8) -> Hello:
    return Hello(session_id, Control.OPEN, window)


def resuming(have: int, session_id: int = 5) -> Hello:
    return Hello(session_id, Control.RESUME, have)


def test_who_comes_back_is_told_what_was_counted(process: Process) -> None:
    peer, answer = process.welcome(opening())
    assert answer == Answer(0, LIMIT)
    assert process.add(peer, 1, 2) == [1, 3]
    assert process.add(peer, 0) == [3]
    peer.close()
    again, answer = process.welcome(resuming(1))
    assert answer == Answer(3, LIMIT, ((2, 3), (3, 3)))
    assert process.add(again, 10) == [13]


def test_sessions_and_others_are_in_the_same_commits(process: Process) -> None:
    (one, _), (two, _) = process.welcome(opening(1)), process.welcome(opening(2))
    plain, _ = process.connect()
    for peer, amount in ((one, 1), (plain, 10), (two, 100)):
        peer.sendall(encode_frame(amount) * 2)
    for peer in (one, plain, two):
        process.until(lambda peer=peer: holds(peer, 16), "it is answered")  # type: ignore[misc]
    last = [totals(peer, 2)[1] for peer in (one, two)]
    for session_id, total in zip((1, 2), last, strict=True):
        _, answer = process.welcome(resuming(0, session_id))
        assert isinstance(answer, Answer)
        assert answer.runs[-1] == (2, total)


def test_a_fence_drops_the_frames_of_what_went_on_elsewhere_and_of_nobody_else(
    pair: list[Process],
) -> None:
    here, there = pair
    (old, _), (kept, _) = here.welcome(opening(5)), here.welcome(opening(6))
    plain, _ = here.connect()
    assert here.add(old, 1) == [1]
    new, answer = there.welcome(resuming(1))
    assert answer == Answer(1, LIMIT)
    for peer, amount in ((old, 100), (kept, 10), (plain, 1)):
        peer.sendall(encode_frame(amount))
    here.until(lambda: holds(kept, 8) and holds(plain, 8), "the others are answered")
    assert max(totals(kept, 1) + totals(plain, 1)) == 12
    assert old.recv(8) == b""
    assert there.add(new, 5) == [17]
    assert here.host.failures == []


def test_an_end_is_answered_behind_the_replies_to_what_came_before_it(process: Process) -> None:
    peer, _ = process.welcome(opening())
    peer.sendall(encode_frame(5) * 2 + encode_control(Control.END, 2))
    process.until(lambda: holds(peer, 24), "it is answered")
    assert totals(peer, 3) == [5, 10, 2]
    assert peer.recv(1) == b""
    assert process.welcome(resuming(2))[1] is Refused.UNKNOWN


@pytest.mark.parametrize("frame", [bytes(16), encode_frame(LIMIT + 1)])
def test_a_frame_that_is_refused_ends_the_session_behind_what_came_before_it(
    process: Process, frame: bytes
) -> None:
    peer, connection = process.greet(opening())
    process.until(lambda: holds(peer, 16), "it is answered")
    peer.recv(16)
    peer.sendall(encode_frame(5) + frame)
    process.until(lambda: not is_open(process, connection), "it is over")
    assert totals(peer, 1) == [5]
    assert peer.recv(1) == b""
    assert process.welcome(resuming(1))[1] is Refused.UNKNOWN


def test_what_the_old_connection_asked_is_in_the_answer_or_is_not_counted(
    process: Process, path: str
) -> None:
    old, _ = process.welcome(opening())
    with held(path):
        old.sendall(encode_frame(1))
        process.until(lambda: process.group.is_busy, "a commit waits for its turn")
        new, connection = process.greet(resuming(0))
        process.until(lambda: bool(process.sessions._asking), "the hello waits")
        old.sendall(encode_frame(10))
        for _ in range(20):
            process.turn()
    process.until(lambda: connection.tag, "it is answered")
    answer, _ = decode_answer(new.recv(65536))
    assert isinstance(answer, Answer)
    assert answer.applied in (1, 2)
    told = [1, 11][answer.applied - 1]
    assert answer.runs[-1][1] == told
    assert process.add(new, 5) == [told + 5]


@contextmanager
def held(path: str) -> Iterator[None]:
    """For the block nobody else gets a turn at the file."""
    with open(path + "-queue") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_a_hello_that_waits_too_long_ends_without_an_answer(process: Process, path: str) -> None:
    with held(path):
        peer, connection = process.greet(opening())
        process.until(lambda: bool(process.sessions._asking), "the hello waits")
        process.sessions.sweep(time.monotonic() + TIMEOUT_S)
        assert process.host.refusals == [Ending.STORE]
        assert peer.recv(1) == b""
    assert not is_open(process, connection)
    # It may have been opened all the same, and is nobody's then.
    assert process.welcome(opening())[1] == Answer(0, LIMIT)


def test_a_full_store_has_no_room_and_plain_peers_do_not_notice(path: str) -> None:
    process = Process("plain", path, sessions=1)
    assert process.welcome(opening(1))[1] == Answer(0, LIMIT)
    peer, answer = process.welcome(opening(2))
    assert answer is Refused.NO_ROOM
    assert peer.recv(1) == b""
    plain, _ = process.connect()
    assert process.add(plain, 3) == [3]
    process.close()


def test_a_drain_answers_no_hello_and_an_end_that_waits_is_not_waited_for(
    process: Process, path: str
) -> None:
    peer, _ = process.welcome(opening(1))
    with held(path):
        peer.sendall(encode_control(Control.END, 0))
        late, waiting = process.greet(opening(2))
        process.until(lambda: len(process.sessions._asking) == 2, "both wait")
        process.host.is_draining = True
        for connection in list(process.host.connections.values()):
            connection.drain()
        assert peer.recv(1) == late.recv(1) == b""
        assert not is_open(process, waiting)
    assert process.host.slot[REQUESTS] == 0
    assert os.path.exists(path)


def test_what_comes_behind_an_end_is_not_added_and_hinders_nobody(
    process: Process, path: str
) -> None:
    peer, _ = process.welcome(opening(1))
    other, _ = process.welcome(opening(2))
    with held(path):
        peer.sendall(encode_control(Control.END, 0))
        process.until(lambda: bool(process.sessions._asking), "the end waits")
        peer.sendall(encode_frame(7) * 3)
        for _ in range(20):
            process.turn()
    process.until(lambda: holds(peer, 8), "it is answered")
    assert totals(peer, 1) == [0]
    assert process.add(other, 1) == [1]
    assert process.host.refusals == []


def test_wishes_are_taken_before_frames(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    # The other way round an end could be committed before a frame that was asked before it.
    order: list[str] = []

    def note(what: str, take: Callable[[], Any]) -> Any:
        order.append(what)
        return take()

    for what, part in (("wishes", process.sessions), ("frames", process.group._waiting)):
        monkeypatch.setattr(part, "take", partial(note, what, part.take))
    peer, _ = process.welcome(opening())
    process.add(peer, 1)
    assert order[:2] == ["wishes", "frames"]
