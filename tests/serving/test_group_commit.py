"""Group commit over a store in the test's hand: who is in which commit, and what becomes of it.

Time is what the test says it is: sweep() is given it, and what is asked is stamped with it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, Final, cast

import gevent
import gevent.event
import pytest

from counter.processes.slots import READS, REQUESTS, TOTAL, TOTAL_AT_MS, Slots
from counter.serving import group_commit, waiting
from counter.serving.group_commit import HEARTBEAT_S, SILENT_S, GroupCommit
from counter.totals.store import Found, InDoubt, Store, StoreAway
from counter.turn.engine import Engine, Event, Kind
from counter.turn.plain import Asker, BatchTurn, Part
from kit.harness import PATIENCE_S
from protocol import Batch, decode_totals

TIMEOUT_S = 10.0
TOP = 2**64

_descriptors: Final = count(100)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Lets the loop run until a condition holds; fails with `what` was waited for."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:g} s in vain until {what}"
        gevent.sleep(0.001)


class FakeStore(Store):
    """A total whose calls fail as `faults` says, one for each call, and can be held.

    Faults of commit(): `away` before and `full` after the amount was taken, `no request` and `no
    reply` leave doubt, `broken` is an error that no store may raise; of settle() and probe():
    `away`, `doubt`, `unknown`, `broken`.
    """

    def __init__(self) -> None:
        self.sum = 0
        self.calls: list[str] = []
        self.taken: list[int] = []  # the amount of each commit
        self.faults: deque[str] = deque()
        self.in_doubt: tuple[int, bool] | None = None  # amount, whether it was added
        self.closed = 0
        self.at_once = 0
        self.gate = self.make_gate()
        self.gate.set()

    def make_gate(self) -> Any:
        raise NotImplementedError

    def hold(self) -> None:
        """Commits wait from now on, after they have taken what is in them."""
        self.gate.clear()

    def let_go(self) -> None:
        self.gate.set()

    def begin(self, call: str) -> str:
        assert not self.at_once, "two calls at once"
        assert call == "settle" or self.in_doubt is None, f"{call} while an addition is in doubt"
        self.calls.append(call)
        return self.faults.popleft() if self.faults else ""

    def commit(self, amount: Callable[[], int]) -> int:
        fault = self.begin("commit")
        if fault == "away":
            raise StoreAway("not there")
        add = amount()
        self.taken.append(add)
        self.at_once += 1
        self.gate.wait(PATIENCE_S)
        self.at_once -= 1
        if fault == "full":
            raise StoreAway("no space")
        if fault == "broken":
            raise RuntimeError("a bug")
        before = self.sum
        if fault != "no request":
            self.sum = (self.sum + add) % TOP
        if fault:
            self.in_doubt = before, fault == "no reply"
            raise InDoubt("cut")
        return before

    def settle(self) -> int | None:
        fault = self.begin("settle")
        assert self.in_doubt is not None
        before, added = self.in_doubt
        if fault == "away":
            raise StoreAway("not there")
        if fault == "doubt":
            raise InDoubt("cut again")
        self.in_doubt = None
        if fault == "broken":
            raise RuntimeError("a bug")
        if fault == "unknown":
            return None
        if not added:
            self.sum = (self.sum + self.taken[-1]) % TOP
        return before

    def probe(self) -> int:
        if self.begin("probe"):
            raise StoreAway("not there")
        return self.sum

    def read(self) -> int:
        raise NotImplementedError

    def check(self, set_total: int | None = None, force: bool = False) -> Found:
        raise NotImplementedError

    def close(self) -> None:
        self.closed += 1


class BlockingStore(FakeStore):
    blocks = True

    def make_gate(self) -> Any:
        return threading.Event()


class WaitingStore(FakeStore):
    blocks = False

    def make_gate(self) -> Any:
        return gevent.event.Event()


class FakeConnection(Asker):
    """A connection as a turn knows it, which asks until it is withdrawn; keeps what it was told."""

    def __init__(self) -> None:
        super().__init__(next(_descriptors))
        self.replies = b""
        self.withdrawn = False
        self.failures = 0
        self.events: list[Event] = []  # the engine's, from when it first asks

    def reply(self, data: bytes) -> None:
        self.replies += data

    def tell(self, kind: Kind, data: bytes = b"") -> None:
        self.events.append((kind, self.fd, data))

    def void(self) -> None:
        self.is_live = False
        self.owed = 0

    @property
    def totals(self) -> list[int]:
        return list(decode_totals(self.replies)[0])


class Unsendable(FakeConnection):
    """Sending to its peer raises what nobody expects."""

    def reply(self, data: bytes) -> None:
        raise RuntimeError("a bug")


class FakeEngine:
    """Nothing is ever ready; has the events of those that ask."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def each_turn(self, take: Callable[[BatchTurn], None]) -> None:
        """Gives nothing."""


class FakeCrowd:
    """Ends connections as a server does: what they asked is void, which the group is told."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.connections: dict[int, FakeConnection] = {}
        self.note_void: Callable[[], None] = lambda: None

    def admit(self, connection: FakeConnection) -> None:
        self.connections[connection.fd] = connection
        connection.events = self.engine.events

    def withdraw(self, fd: int) -> None:
        self.connections[fd].withdrawn = True
        self.end(fd)

    def decide_events(self) -> None:
        while self.engine.events:
            _, fd, _ = self.engine.events.pop(0)
            self.connections[fd].failures += 1
            self.end(fd)

    def end(self, fd: int) -> None:
        """Without an answer to what it is owed."""
        if self.connections[fd].owed:
            self.connections[fd].void()
            self.note_void()


class Outage:
    """Says what an Outage hears, but not twice what it knows."""

    def __init__(self, said: list[str]) -> None:
        self.said = said
        self.is_away = False

    def begin(self, reason: str) -> None:
        if not self.is_away:
            self.is_away = True
            self.said.append(f"away: {reason}")

    def end(self) -> None:
        if self.is_away:
            self.is_away = False
            self.said.append("back")


class Bench:
    """Group commit in a loop, with a store and a clock in the test's hand."""

    def __init__(self, store: FakeStore) -> None:
        self.store = store
        self.slot = Slots(1)[0]
        self.said: list[str] = []
        self.engine = FakeEngine()
        self.crowd = FakeCrowd(self.engine)
        self.group = GroupCommit(
            store,
            self.slot,
            cast(Engine, self.engine),
            self.crowd,
            TIMEOUT_S,
            Outage(self.said),
            lambda: self.said.append("loss"),
        )
        self.crowd.note_void = self.group.note_void
        # Whole seconds, so that a deadline is met to the last bit.
        self.began_at = self.now = time.monotonic() // 1
        self.before_waiting = gevent.get_hub().loop.prepare()
        self.before_waiting.start(self.group.commit)

    def monotonic(self) -> float:
        """The clock that what is asked is stamped by: the moment of the last sweep_after()."""
        return self.now

    def ask(self, connection: FakeConnection, amount: int, batch: Batch | None = None) -> None:
        self.ask_together((connection, amount, batch))

    def ask_together(self, *parts: tuple[FakeConnection, int, Batch | None]) -> None:
        """All that is asked is one turn."""
        for connection, _, _ in parts:
            self.crowd.admit(connection)
        turn: list[Part] = list(parts)
        self.group.ask(BatchTurn(turn))

    def ask_and_begin(self, connection: FakeConnection, amount: int) -> None:
        """Asks, and waits until the commit is under way that holds it; the store is held."""
        self.store.hold()
        commits = len(self.store.taken)
        self.ask(connection, amount)
        wait_for(lambda: len(self.store.taken) > commits, "a commit is under way")

    def sweep_after(self, seconds: float) -> None:
        """The sweep so long after the test began."""
        self.now = self.began_at + seconds
        self.group.sweep(self.now)

    def wait_until_answered(self, *connections: FakeConnection) -> None:
        wait_for(lambda: not any(each.owed for each in connections), "all are answered")

    def wait_until_idle(self) -> None:
        """Until the store has nothing to do any more."""
        wait_for(lambda: self.group.is_idle, "the store is idle")

    def close(self) -> None:
        self.store.let_go()
        self.before_waiting.close()
        self.group.close()
        wait_for(lambda: self.store.closed > 0, "the store is closed")


@pytest.fixture(params=[BlockingStore, WaitingStore])
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(group_commit, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(group_commit, "LAST_DELAY_S", 0.004)
    bench = Bench(request.param())
    monkeypatch.setattr(waiting, "time", bench)
    yield bench
    bench.close()


@pytest.fixture
def one() -> FakeConnection:
    return FakeConnection()


@pytest.fixture
def two() -> FakeConnection:
    return FakeConnection()


@pytest.fixture
def three() -> FakeConnection:
    return FakeConnection()


# Which commit.


def test_an_addition_is_answered_with_its_total(bench: Bench, one: FakeConnection) -> None:
    bench.store.sum = 40
    bench.ask(one, 2)
    bench.wait_until_answered(one)
    assert one.totals == [42]
    assert bench.slot[REQUESTS] == 1
    assert bench.slot[TOTAL] == 42
    assert bench.slot[TOTAL_AT_MS] > 0


def test_what_is_asked_in_one_turn_is_one_commit(
    bench: Bench, one: FakeConnection, two: FakeConnection
) -> None:
    bench.ask(one, 1)
    bench.ask(two, 10)
    bench.ask(one, 100)
    bench.wait_until_answered(one, two)
    assert bench.store.taken == [111]
    assert (one.totals, two.totals) == ([1, 111], [11])


def test_what_comes_while_a_commit_is_under_way_is_the_next_one(
    bench: Bench, one: FakeConnection, two: FakeConnection, three: FakeConnection
) -> None:
    bench.ask_and_begin(one, 1)
    bench.ask(two, 2)
    bench.ask(three, 3)
    bench.group.commit()
    bench.ask(one, 4)
    bench.group.commit()
    assert bench.store.taken == [1]
    assert not one.replies
    bench.store.let_go()
    bench.wait_until_answered(one, two, three)
    assert bench.store.taken == [1, 9]
    assert (one.totals, two.totals, three.totals) == ([1, 10], [3], [6])


def test_every_frame_of_a_batch_gets_its_own_total(
    bench: Bench, one: FakeConnection, two: FakeConnection
) -> None:
    bench.store.sum = TOP - 2
    batch = Batch([1, 0, 5])
    bench.ask(one, batch.sum(), batch)
    bench.ask(two, 7)
    bench.wait_until_answered(one, two)
    assert one.totals == [TOP - 1, TOP - 1, 4]
    assert two.totals == [11]
    assert bench.slot[REQUESTS] == 4
    assert bench.slot[READS] == 2


def test_many_rounds_of_many_connections_number_all_requests(bench: Bench) -> None:
    connections = [FakeConnection() for _ in range(20)]
    for _ in range(50):
        for connection in connections:
            bench.ask(connection, 1)
        gevent.sleep(0)
    bench.wait_until_answered(*connections)
    totals = [connection.totals for connection in connections]
    assert sorted(total for each in totals for total in each) == list(range(1, 1001))
    assert all(each == sorted(each) for each in totals)


def test_a_connection_that_fails_does_not_hinder_the_next(
    bench: Bench, one: FakeConnection
) -> None:
    broken = Unsendable()
    bench.ask(broken, 1)
    bench.ask(one, 1)
    bench.wait_until_answered(broken, one)
    assert broken.failures == 1
    assert one.totals == [2]


class SlowClock:
    """By it every commit takes very long."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        self.now += 100
        return self.now


@pytest.fixture
def slow(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench at which every commit takes long."""
    monkeypatch.setattr(group_commit, "time", SlowClock())
    return bench


def commit_four(bench: Bench) -> None:
    """One commit of four reads."""
    four = [FakeConnection() for _ in range(4)]
    bench.ask_together(*((each, 1, None) for each in four))
    bench.wait_until_answered(*four)


def test_a_commit_waits_for_half_of_those_who_were_answered(
    slow: Bench, one: FakeConnection, two: FakeConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "LONGEST_GATHER_S", 2 * PATIENCE_S)
    commit_four(slow)
    slow.ask(one, 1)
    for _ in range(20):
        gevent.sleep(0)
    assert slow.store.taken == [4]
    slow.ask(two, 1)
    slow.wait_until_answered(one, two)
    assert slow.store.taken == [4, 2]


def test_a_commit_waits_for_those_who_were_answered_no_longer_than_a_moment(
    slow: Bench, one: FakeConnection
) -> None:
    commit_four(slow)
    slow.ask(one, 1)
    slow.wait_until_answered(one)
    assert slow.store.taken == [4, 1]


# A store that is away.


def test_a_store_that_nobody_asks_is_asked_whether_it_is_there(
    bench: Bench, one: FakeConnection
) -> None:
    bench.ask(one, 1)
    bench.wait_until_answered(one)
    bench.wait_until_idle()
    answered_at = time.monotonic()
    bench.group.sweep(answered_at)
    assert bench.store.calls == ["commit"]
    bench.store.faults += ["away"] * 3
    bench.group.sweep(answered_at + HEARTBEAT_S)
    wait_for(lambda: bench.said == ["away: not there", "back"], "it is away, and back")
    assert bench.store.calls == ["commit", *["probe"] * 4]


def test_what_a_failed_commit_held_is_in_the_next_before_what_came_since(
    bench: Bench, one: FakeConnection, two: FakeConnection
) -> None:
    bench.store.faults.append("full")
    bench.ask_and_begin(one, 1)
    bench.ask(two, 2)
    bench.store.let_go()
    bench.wait_until_answered(one, two)
    assert bench.store.taken == [1, 3]
    assert (one.totals, two.totals) == ([1], [3])
    assert bench.said == []  # the first failure is tried again at once


@pytest.mark.parametrize("fault", ["away", "full"])
def test_an_outage_begins_once_and_ends_once(bench: Bench, one: FakeConnection, fault: str) -> None:
    bench.store.faults += [fault] * 6
    bench.ask(one, 5)
    bench.wait_until_answered(one)
    assert one.totals == [5]
    assert bench.store.sum == 5
    assert bench.store.calls == ["commit"] * 7
    reason = {"away": "not there", "full": "no space"}[fault]
    assert bench.said == [f"away: {reason}", "back"]
    bench.store.faults += [fault] * 2
    bench.ask(one, 5)
    bench.wait_until_answered(one)
    assert bench.said == [f"away: {reason}", "back"] * 2


def test_a_store_is_tried_while_nobody_waits(bench: Bench, one: FakeConnection) -> None:
    bench.store.faults += ["away"] * 3
    bench.ask(one, 5)
    wait_for(lambda: bench.said != [], "the store is away")
    bench.store.faults += ["away"] * 20
    bench.sweep_after(0)
    bench.sweep_after(TIMEOUT_S)
    assert one.withdrawn
    wait_for(lambda: "back" in bench.said, "the store is back")
    bench.wait_until_idle()
    assert bench.store.calls[-1] == "probe"
    assert bench.store.taken == []


def test_a_silent_store_is_away_until_it_answers(bench: Bench, one: FakeConnection) -> None:
    bench.ask_and_begin(one, 1)
    began_at = bench.group._started_at
    bench.group.sweep(began_at + SILENT_S - 0.1)
    assert bench.said == []
    bench.group.sweep(began_at + SILENT_S)
    bench.group.sweep(began_at + SILENT_S + 1)
    assert bench.said == ["away: no answer for 1 s"]
    bench.store.let_go()
    bench.wait_until_answered(one)
    assert one.totals == [1]
    assert bench.said == ["away: no answer for 1 s", "back"]


def test_an_idle_store_is_not_silent(bench: Bench, one: FakeConnection) -> None:
    bench.ask(one, 1)
    bench.wait_until_answered(one)
    bench.sweep_after(1000)
    assert bench.said == []


def test_a_loss_is_told_once(bench: Bench, one: FakeConnection) -> None:
    bench.store.losses = 1
    for _ in range(3):
        bench.ask(one, 1)
        bench.wait_until_answered(one)
    assert bench.said == ["loss"]
    bench.store.losses = 2
    bench.ask(one, 1)
    bench.wait_until_answered(one)
    assert bench.said == ["loss", "loss"]


# A commit in doubt.


@pytest.mark.parametrize("fault", ["no request", "no reply"])
@pytest.mark.parametrize("settling", [[], ["away"], ["doubt", "away", "doubt", "doubt"]])
def test_a_commit_in_doubt_is_settled_before_anything_else(
    bench: Bench, one: FakeConnection, two: FakeConnection, fault: str, settling: list[str]
) -> None:
    bench.store.faults += [fault, *settling]
    bench.ask_and_begin(one, 1)
    bench.ask(two, 2)
    bench.store.let_go()
    bench.wait_until_answered(one, two)
    assert bench.store.calls == ["commit", *["settle"] * (len(settling) + 1), "commit"]
    assert (one.totals, two.totals) == ([1], [3])
    assert bench.store.sum == 3
    assert bench.slot[REQUESTS] == 2


def test_a_commit_that_stays_unknown_is_withdrawn(
    bench: Bench, one: FakeConnection, two: FakeConnection
) -> None:
    bench.store.faults += ["no reply", "unknown"]
    bench.ask_and_begin(one, 1)
    bench.ask(two, 2)
    bench.store.let_go()
    bench.wait_until_answered(one, two)
    assert one.withdrawn
    assert not one.replies
    assert two.totals == [3]


def test_a_withdrawn_commit_in_doubt_is_settled_all_the_same(
    bench: Bench, one: FakeConnection, two: FakeConnection
) -> None:
    bench.store.faults += ["no reply", *["away"] * 10]
    bench.ask(one, 1)
    wait_for(lambda: "settle" in bench.store.calls, "the commit is in doubt")
    bench.sweep_after(TIMEOUT_S + 5)
    assert one.withdrawn
    bench.ask(two, 2)
    bench.wait_until_answered(two)
    assert two.totals == [3]
    assert bench.store.calls == ["commit", *["settle"] * 11, "commit"]


# Waiting too long.


def test_what_waits_and_what_is_under_way_is_withdrawn_in_time_and_the_commit_goes_on(
    bench: Bench, one: FakeConnection, two: FakeConnection, three: FakeConnection
) -> None:
    bench.ask_and_begin(one, 1)
    bench.sweep_after(1)
    bench.ask(two, 2)
    bench.sweep_after(TIMEOUT_S - 0.1)
    assert [one.withdrawn, two.withdrawn] == [False, False]
    bench.sweep_after(TIMEOUT_S + 0.9)
    assert [one.withdrawn, two.withdrawn] == [True, False]
    bench.sweep_after(TIMEOUT_S + 1)
    assert [one.withdrawn, two.withdrawn] == [True, True]
    bench.ask(three, 4)
    bench.store.let_go()
    bench.wait_until_answered(three)
    assert three.totals == [5]
    assert bench.store.taken == [1, 4]
    assert not one.replies
    assert not two.replies


def test_whoever_came_later_waits_as_long_as_the_others(
    bench: Bench, one: FakeConnection, two: FakeConnection, three: FakeConnection
) -> None:
    """Withdrawing the first does not give the second its time anew."""
    bench.ask_and_begin(three, 100)
    bench.sweep_after(5)
    bench.ask(one, 1)
    bench.sweep_after(8)
    bench.ask(two, 2)
    bench.sweep_after(5 + TIMEOUT_S)
    assert one.withdrawn
    assert not two.withdrawn
    bench.sweep_after(8 + TIMEOUT_S - 0.1)
    assert not two.withdrawn
    bench.sweep_after(8 + TIMEOUT_S)
    assert two.withdrawn


def test_a_withdrawn_commit_that_failed_takes_nobody_with_it(
    bench: Bench, one: FakeConnection, two: FakeConnection
) -> None:
    """It leaves nothing that waits, so that what has just come is not taken for old."""
    bench.store.faults += ["full", *["away"] * 10_000]
    bench.ask_and_begin(one, 1)
    bench.sweep_after(TIMEOUT_S + 1)
    assert one.withdrawn
    bench.ask(two, 2)
    bench.store.let_go()
    wait_for(lambda: len(bench.store.calls) > 2, "the store is tried again")
    bench.sweep_after(TIMEOUT_S + 1.1)
    assert not two.withdrawn
    bench.store.faults.clear()
    bench.wait_until_answered(two)
    assert two.totals == [2]


def test_time_spent_in_a_commit_that_failed_counts(
    bench: Bench, one: FakeConnection, two: FakeConnection
) -> None:
    bench.store.faults += ["full", *["away"] * 10_000]
    bench.ask_and_begin(one, 1)
    bench.sweep_after(5)
    bench.ask(two, 2)
    bench.store.let_go()
    wait_for(lambda: len(bench.store.calls) > 2, "the store is tried again")
    bench.sweep_after(TIMEOUT_S + 1)
    assert one.withdrawn
    assert not two.withdrawn
    bench.sweep_after(TIMEOUT_S + 5)
    assert two.withdrawn
    bench.store.faults.clear()


def test_nothing_more_is_added_for_a_connection_that_was_withdrawn(
    bench: Bench, one: FakeConnection, two: FakeConnection
) -> None:
    bench.ask_and_begin(one, 1)
    bench.ask(one, 10)
    bench.sweep_after(TIMEOUT_S + 1)
    assert one.withdrawn
    bench.ask(two, 100)
    bench.store.let_go()
    bench.wait_until_answered(two)
    assert two.totals == [101]
    assert bench.store.sum == 101
    assert not one.replies


def test_nothing_more_is_added_for_a_connection_whose_commit_stays_unknown(
    bench: Bench, one: FakeConnection, two: FakeConnection
) -> None:
    bench.store.faults += ["no request", "unknown"]
    bench.ask_and_begin(one, 1)
    bench.ask(one, 10)
    bench.ask(two, 100)
    bench.store.let_go()
    bench.wait_until_answered(two)
    assert one.withdrawn
    assert bench.store.taken == [1, 100]


def test_who_is_gone_while_it_waits_is_not_added_and_the_rest_of_its_turn_is(
    bench: Bench, one: FakeConnection, two: FakeConnection, three: FakeConnection
) -> None:
    bench.ask_and_begin(three, 100)
    bench.ask_together((one, 1, None), (two, 7, Batch([2, 5])))
    bench.crowd.end(one.fd)
    bench.store.let_go()
    bench.wait_until_answered(two, three)
    assert bench.store.taken == [100, 7]
    assert two.totals == [102, 107]
    assert not one.replies
    assert [bench.slot[REQUESTS], bench.slot[READS]] == [3, 2]


def test_who_is_gone_while_its_commit_is_under_way_is_added_and_not_answered(
    bench: Bench, one: FakeConnection, two: FakeConnection
) -> None:
    bench.store.hold()
    bench.ask_together((one, 1, None), (two, 2, None))
    wait_for(lambda: bench.store.taken == [3], "the commit is under way")
    bench.crowd.end(one.fd)
    bench.store.let_go()
    bench.wait_until_answered(two)
    assert two.totals == [3]
    assert not one.replies
    assert bench.slot[REQUESTS] == 1


# Errors and the end.


@pytest.mark.parametrize("faults", [["broken"], ["no reply", "broken"]])
def test_an_error_of_the_stores_own_withdraws_and_the_store_is_opened_anew(
    bench: Bench,
    one: FakeConnection,
    two: FakeConnection,
    faults: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench.store.faults += faults
    bench.ask_and_begin(one, 1)
    bench.ask(two, 2)
    bench.store.let_go()
    with caplog.at_level(logging.ERROR):
        bench.wait_until_answered(one, two)
    assert one.withdrawn
    assert bench.store.closed == 1
    assert two.totals == [bench.store.sum]
    assert "the store failed" in caplog.text


def test_nothing_is_committed_after_the_end(bench: Bench, one: FakeConnection) -> None:
    bench.ask(one, 1)
    bench.wait_until_answered(one)
    bench.wait_until_idle()
    bench.group.close()
    bench.ask(one, 2)
    bench.group.commit()
    wait_for(lambda: bench.store.closed == 1, "the store is closed")
    assert bench.store.calls == ["commit"]


def test_the_end_does_not_wait_for_a_store_that_is_away(bench: Bench, one: FakeConnection) -> None:
    bench.store.faults += ["away"] * 10_000
    bench.ask(one, 1)
    wait_for(lambda: bench.said != [], "the store is away")
    bench.group.close()
    wait_for(lambda: bench.store.closed == 1, "the store is closed")


def test_a_store_that_blocks_ends_its_commit_before_it_is_closed(one: FakeConnection) -> None:
    bench = Bench(BlockingStore())
    bench.ask_and_begin(one, 1)
    bench.group.close()
    assert bench.store.closed == 0
    bench.store.let_go()
    wait_for(lambda: bench.store.closed == 1, "the store is closed")
    assert bench.store.sum == 1
    bench.before_waiting.close()
