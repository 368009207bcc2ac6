"""The client's half of a session without a socket, against a model of its server, and its file."""

from __future__ import annotations

import os
import socket
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from client_session import (
    AnswersLost,
    HelloRefused,
    Pending,
    PendingAboveLimit,
    Phase,
    Session,
    SessionFile,
    SessionState,
    Settled,
    StateError,
)
from protocol import (
    HELLO_SIZE,
    MAX_AMOUNT,
    MAX_WINDOW,
    TOTAL_MASK,
    Answer,
    BadFrame,
    Control,
    Decoder,
    Hello,
    Refused,
    Run,
    decode_hello,
    encode_control,
    encode_frame,
    encode_total,
)

PROPERTY = settings(deadline=None, derandomize=True)

words = st.integers(0, MAX_AMOUNT)
some_amounts = st.lists(words | st.integers(0, 3), min_size=1, max_size=5)
some_bytes = st.integers(0, 200)


class ModelServer:
    """A server of one session, byte by byte; `log` has the amount and the total of each frame."""

    def __init__(self) -> None:
        self.total = 0
        self.log: list[tuple[int, int]] = []
        self.window = 0
        self._runs: list[Run] = []
        self._decoder = Decoder()
        self.connect()

    def connect(self) -> None:
        """A new connection; of the one before it takes nothing any more."""
        self._data = b""
        self._is_greeted = False

    def take(self, data: bytes) -> bytes:
        """What it says to bytes that come."""
        self._data += data
        if self._is_greeted:
            batch, self._data = self._decoder.decode(self._data)
            replies = batch.replies(self.total)
            for amount in batch.amounts:
                self.total = (self.total + amount) & TOTAL_MASK
                self.log.append((amount, self.total))
            if batch:
                self._runs.append((len(self.log), self.total))
                oldest = len(self.log) - self.window
                self._runs = [run for run in self._runs if run[0] > oldest]
            return replies
        hello = decode_hello(self._data)
        if hello is None:
            return b""
        self._data, self._is_greeted = b"", True
        if hello.kind is Control.OPEN:
            assert not self.log, "it was opened twice"
            self.window = hello.value
            return Answer(0, MAX_AMOUNT).encode()
        assert len(self.log) - self.window <= hello.value <= len(self.log)
        runs = tuple(run for run in self._runs if run[0] > hello.value)
        return Answer(len(self.log), MAX_AMOUNT, runs).encode()


class Breaks(RuleBasedStateMachine):
    """Bytes arrive in any pieces, connections break between any two, and the client may crash."""

    @initialize(window=st.integers(1, 12))
    def begin(self, window: int) -> None:
        self.session = Session(window)
        self.server = ModelServer()
        self.asked: list[int] = []
        self.totals: list[int] = []
        self.there = self.session.hello()
        self.back = b""

    @precondition(lambda self: self.session.phase is Phase.OPEN and self.session.room)
    @rule(amounts=some_amounts)
    def add(self, amounts: list[int]) -> None:
        amounts = amounts[: self.session.room]
        self.session.number("", amounts)
        self.asked += amounts
        self.there += b"".join(map(encode_frame, amounts))

    @rule(amount=words)
    def others_add(self, amount: int) -> None:
        self.server.total = (self.server.total + amount) & TOTAL_MASK

    @rule(count=some_bytes)
    def arrive(self, count: int) -> None:
        data, self.there = self.there[:count], self.there[count:]
        self.back += self.server.take(data)

    @rule(count=some_bytes)
    def hear(self, count: int) -> None:
        data, self.back = self.back[:count], self.back[count:]
        was_open = self.session.phase is Phase.OPEN
        self.totals += self.session.receive(data)
        if self.session.phase is Phase.OPEN and not was_open:
            self.there += self.session.frames()

    @rule()
    def cut(self) -> None:
        self.session.broke()
        self.server.connect()
        self.there, self.back = self.session.hello(), b""

    @precondition(lambda self: self.session.phase is not Phase.NEW)
    @rule()
    def crash(self) -> None:
        state = SessionState.from_text(self.session.state.to_text())
        self.session = Session(99, state)
        self.cut()

    @invariant()
    def each_total_is_the_one_that_came_first(self) -> None:
        assert self.totals == [total for _, total in self.server.log[: len(self.totals)]]
        assert [amount for amount, _ in self.server.log] == self.asked[: len(self.server.log)]

    def teardown(self) -> None:
        if not hasattr(self, "session"):
            return
        self.cut()
        while self.there or self.back:
            self.arrive(1000)
            self.hear(1000)
        assert self.session.phase is Phase.OPEN
        assert self.session.pending == 0
        assert [amount for amount, _ in self.server.log] == self.asked
        assert self.totals == [total for _, total in self.server.log]


TestBreaks = Breaks.TestCase
TestBreaks.settings = settings(
    deadline=None, derandomize=True, max_examples=200, stateful_step_count=40
)


def opened(*amounts: int, window: int = 64, limit: int = MAX_AMOUNT) -> Session:
    """A session whose open was answered, with these amounts pending."""
    session = Session(window)
    assert session.receive(Answer(0, limit).encode()) == []
    session.number("", amounts)
    return session


def resuming(*amounts: int, answered: int = 0) -> Session:
    """A session that had so many replies, and broke with these amounts pending."""
    session = opened(*[1] * answered, *amounts)
    session.receive(b"".join(map(encode_total, range(1, answered + 1))))
    session.broke()
    session.hello()
    return session


def test_it_says_hello_to_be_opened_until_it_was_answered_and_to_be_resumed_from_there() -> None:
    session = Session(7)
    hello = Hello(session.id, Control.OPEN, 7)
    for cut in range(16):
        assert decode_hello(session.hello()) == hello
        assert session.receive(bytes(cut)) == []
        session.broke()
    session.receive(bytes(16))
    session.number("", [5, 6])
    session.receive(encode_total(5))
    session.broke()
    assert decode_hello(session.hello()) == Hello(session.id, Control.RESUME, 1)
    assert len(session.hello()) == HELLO_SIZE


def test_two_sessions_have_two_ids() -> None:
    assert Session(1).id != Session(1).id


@PROPERTY
@given(st.lists(words, min_size=1, max_size=30), words, st.data())
def test_totals_inside_a_run_follow_from_its_end(
    amounts: list[int], before: int, data: st.DataObject
) -> None:
    session = resuming(*amounts)
    applied = data.draw(st.integers(1, len(amounts)))
    totals = [total & TOTAL_MASK for total in accumulate(amounts, initial=before)][1:]
    answer = Answer(applied, MAX_AMOUNT, ((applied, totals[applied - 1]),))
    assert session.receive(answer.encode()) == totals[:applied]
    assert session.frames() == b"".join(map(encode_frame, amounts[applied:]))


def test_an_answer_that_breaks_off_between_two_runs_gives_what_came() -> None:
    session = resuming(1, 2, 3, 4)
    answer = Answer(4, MAX_AMOUNT, ((1, 11), (3, 105), (4, 999))).encode()
    assert session.receive(answer[: 16 + 32]) == [11, 102, 105]
    assert session.phase is Phase.RESUMING
    session.broke()
    assert decode_hello(session.hello()) == Hello(session.id, Control.RESUME, 3)
    assert session.receive(Answer(4, MAX_AMOUNT, ((4, 999),)).encode()) == [999]


@pytest.mark.parametrize("refused", Refused)
def test_a_refusal_loses_the_session_if_it_is_not_known_and_only_then(refused: Refused) -> None:
    session = resuming(1)
    assert session.receive(encode_total(refused.value)[:7]) == []
    with pytest.raises(HelloRefused) as caught:
        session.receive(encode_total(refused.value)[7:])
    assert caught.value.refused is refused
    assert (session.phase is Phase.LOST) == (refused is Refused.UNKNOWN)


def test_a_server_that_applied_less_than_it_had_answered_is_found_out() -> None:
    session = resuming(9, answered=5)
    with pytest.raises(AnswersLost) as caught:
        session.receive(Answer(3, 100).encode())
    assert caught.value.count == 2
    assert session.phase is Phase.LOST


def test_a_server_that_applied_more_than_was_sent_is_not_believed() -> None:
    session = resuming(9, answered=5)
    with pytest.raises(BadFrame, match="7 frames are said to be applied, 6 were sent"):
        session.receive(encode_total(7) + encode_total(100))


@pytest.mark.parametrize("runs", [((2, 0), (2, 0)), ((2, 0), (1, 0)), ((4, 0),)])
def test_runs_that_do_not_rise_to_what_was_applied_give_no_total(runs: tuple[Run, ...]) -> None:
    session = resuming(1, 1, 1, 1)
    with pytest.raises(BadFrame, match="a run ends with frame"):
        session.receive(Answer(3, 100, runs).encode())
    assert session.answered == 0


def test_what_nobody_asked_for_is_refused() -> None:
    with pytest.raises(BadFrame, match="behind the answer"):
        Session(1).receive(bytes(17))
    with pytest.raises(BadFrame, match="2 replies to 1 frames"):
        opened(5).receive(bytes(16))


def test_a_frame_above_a_limit_that_was_lowered_is_not_sent_again() -> None:
    session = resuming(5, 11, 5)
    assert session.receive(Answer(1, 10, ((1, 5),)).encode()) == [5]
    with pytest.raises(PendingAboveLimit, match="11"):
        session.frames()
    assert session.phase is Phase.LOST


def test_a_number_that_was_taken_back_is_given_again() -> None:
    session = opened(1, 2, window=3)
    session.take_back(1)
    assert (session.pending, session.room) == (1, 2)
    session.number("", [7, 8])
    assert session.frames() == b"".join(map(encode_frame, [1, 7, 8]))


def test_its_end_says_how_many_replies_there_are() -> None:
    session = opened(5)
    session.receive(encode_total(5))
    assert session.end() == encode_control(Control.END, 1)


def test_states_tell_what_was_settled_until_it_is_safe() -> None:
    session = opened()
    session.keep_settled()
    session.number("a", [1, 2])
    session.receive(encode_total(1))
    first = session.state
    assert (first.answered, first.pending) == (1, (Pending("a", 2),))
    assert first.settled == (Settled("a", 1, 1),)
    session.receive(encode_total(3))
    session.forget_settled(len(first.settled))
    assert session.state.settled == (Settled("a", 2, 3),)
    assert session.successor(5).state.settled == session.state.settled


names = st.text(max_size=5)
states = st.builds(
    SessionState,
    st.integers(0, 2**128 - 1),
    st.integers(5, MAX_WINDOW),
    words,
    st.lists(st.builds(Pending, names, words), max_size=5).map(tuple),
    st.lists(st.builds(Settled, names, words, words), max_size=5).map(tuple),
)


@PROPERTY
@given(states)
def test_a_state_is_one_line_of_text_and_back(state: SessionState) -> None:
    text = state.to_text()
    assert len(text.splitlines()) == 1
    assert SessionState.from_text(text) == state


GOOD = SessionState(5, 64, 1, (Pending("a", 7),), (Settled("b", 1, 1),)).to_text()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "[]",
        "{}",
        "[" * 100_000,
        GOOD[:-1],
        GOOD.replace("64", "4097"),
        GOOD.replace("64", "0"),
        GOOD.replace("64", "true"),
        GOOD.replace("7", "-7"),
        GOOD.replace("7", "7.0"),
        GOOD.replace("7", "18446744073709551616"),
        GOOD.replace('"a"', "3"),
        GOOD.replace('"a", 7', '"a"'),
        GOOD.replace("answered", "answer"),
        GOOD.replace("0" * 31 + "5", "1" + "0" * 32),
        GOOD.replace("0" * 31 + "5", "x"),
    ],
)
def test_text_that_is_no_state_is_refused(text: str) -> None:
    with pytest.raises(StateError, match="state of a session"):
        SessionState.from_text(text)


def test_a_state_with_more_pending_than_its_window_is_none() -> None:
    with pytest.raises(StateError):
        SessionState(1, 1, 0, (Pending("", 1),) * 2)


def test_a_file_keeps_the_last_state_that_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with SessionFile(path) as file:
        assert file.state is None
        for answered in range(3):
            file.save(SessionState(1, 64, answered))
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]
    assert path.stat().st_mode & 0o777 == 0o600
    with SessionFile(path) as file:
        assert file.state == SessionState(1, 64, 2)


@pytest.mark.parametrize("is_saved", [False, True])
def test_a_file_has_one_holder(tmp_path: Path, is_saved: bool) -> None:
    path = tmp_path / "state"
    with SessionFile(path) as file:
        if is_saved:
            file.save(SessionState(1, 64))
        with pytest.raises(StateError, match="another process has this session"):
            SessionFile(path)
    SessionFile(path).close()


def test_a_child_that_lives_on_does_not_keep_the_file(tmp_path: Path) -> None:
    file = SessionFile(tmp_path / "state")
    here, there = socket.socketpair()
    pid = os.fork()
    if not pid:
        here.close()
        there.sendall(b"I live")
        there.recv(1)
        os._exit(0)
    there.close()
    with here:
        assert here.recv(6) == b"I live"
        file.close()
        SessionFile(tmp_path / "state").close()
    os.waitpid(pid, 0)


def test_a_file_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "letter"
    path.write_bytes(b"Dear \xff")
    with pytest.raises(StateError, match=f"^{path}: no state of a session"):
        SessionFile(path)
    assert path.read_bytes() == b"Dear \xff"


def test_a_link_and_the_file_that_it_leads_to_are_one(tmp_path: Path) -> None:
    path, link = tmp_path / "state", tmp_path / "link"
    link.symlink_to("state")
    with SessionFile(link) as file:
        file.save(SessionState(1, 64))
        with pytest.raises(StateError, match="another process has this session"):
            SessionFile(path)
    assert link.is_symlink()
    with SessionFile(path) as file:
        assert file.state == SessionState(1, 64)


def test_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(StateError, match="name a file"):
        SessionFile(pipe)
    assert pipe.is_fifo()
    with pytest.raises(IsADirectoryError):
        SessionFile(tmp_path)


def test_a_state_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with SessionFile(tmp_path / "state") as file:
        file.save(SessionState(1, 64))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space"):
                file.save(SessionState(2, 64))
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]
    with SessionFile(tmp_path / "state") as file:
        assert file.state == SessionState(1, 64)
