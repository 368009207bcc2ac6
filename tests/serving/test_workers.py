"""Who gets a worker, who gives one up, and in which order."""

from __future__ import annotations

from typing import Any

import pytest
from gevent.pool import Pool

from counter.serving import workers as workers_module
from counter.serving.workers import SILENT_S, Workers

SLICE_S = 0.05


class Clock:
    """Time as the test says it is."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class FakeTimer:
    def __init__(self) -> None:
        self.runs = False

    def start(self, _: Any) -> None:
        self.runs = True

    def stop(self) -> None:
        self.runs = False

    def close(self) -> None:
        self.runs = False


class FakeLoop:
    def __init__(self) -> None:
        self.made = FakeTimer()

    def timer(self, _: float, __: float) -> FakeTimer:
        return self.made


class FakeReader:
    """A connection, and what became of it."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name = name
        self.clock = clock
        self.state = "new"
        self.read_at = 0.0

    def serve(self) -> None:
        self.state = "served"

    def park(self) -> None:
        self.state = "parked"

    def last_read_at(self) -> float:
        return self.read_at

    def reads(self) -> None:
        self.read_at = self.clock.now


class Hall:
    """So many workers, and readers by their names."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        monkeypatch.setattr(workers_module, "time", self.clock)
        self.loop = FakeLoop()
        self.pool = Pool(size)
        self.workers: Workers[FakeReader] = Workers(self.pool, self.loop, SLICE_S)

    def readers(self, names: str) -> list[FakeReader]:
        return [FakeReader(name, self.clock) for name in names]

    def admitted(self, names: str) -> list[FakeReader]:
        readers = self.readers(names)
        for reader in readers:
            self.workers.admit(reader)
        return readers

    def passes(self, seconds: float, *busy: FakeReader) -> None:
        """Time passes, in which these read all the while."""
        self.clock.now += seconds
        for reader in busy:
            reader.reads()
        self.workers.look()


@pytest.fixture
def hall(monkeypatch: pytest.MonkeyPatch) -> Hall:
    return Hall(2, monkeypatch)


def states(readers: list[FakeReader]) -> list[str]:
    return [reader.state for reader in readers]


def test_while_there_are_enough_everybody_keeps_one(hall: Hall) -> None:
    readers = hall.admitted("ab")
    hall.passes(3600)
    assert states(readers) == ["served", "served"]
    assert hall.workers.taken == len(hall.pool) == 2
    assert not hall.loop.made.runs


def test_one_too_many_is_parked_and_asks_for_nothing(hall: Hall) -> None:
    a, b, c = hall.admitted("abc")
    hall.passes(3600)
    assert states([a, b, c]) == ["served", "served", "parked"]
    assert hall.workers.waiting == 0
    assert hall.workers.waiting_since is None


def test_an_idle_worker_is_given_up_at_once_and_no_more_than_wait(hall: Hall) -> None:
    a, b, c = hall.admitted("abc")
    hall.passes(1)
    hall.workers.request(c)
    assert states([a, b, c]) == ["parked", "served", "served"]
    assert hall.workers.waiting == 0


def test_busy_ones_are_left_for_their_slice_and_the_longest_gives_way_then(hall: Hall) -> None:
    a, b, c = hall.admitted("abc")
    hall.passes(SLICE_S / 2, a, b)
    hall.workers.request(c)
    assert hall.workers.waiting == 1
    assert hall.loop.made.runs
    hall.passes(SLICE_S / 4, a, b)
    assert states([a, b, c])[:2] == ["served", "served"]
    hall.passes(SLICE_S / 4, a, b)
    assert states([a, b, c]) == ["parked", "served", "served"]
    assert not hall.loop.made.runs


def test_those_who_wait_are_served_in_their_order(hall: Hall) -> None:
    a, b, c, d, e = hall.admitted("abcde")
    hall.passes(SILENT_S / 2, a, b)
    for reader in (e, c, d):
        hall.workers.request(reader)
    hall.passes(SLICE_S, a, b)
    assert states([e, c, d]) == ["served", "served", "parked"]
    assert states([a, b]) == ["parked", "parked"]
    hall.passes(SLICE_S, c, e)
    assert d.state == "served"


def test_one_that_was_just_served_is_not_the_next_to_give_way(hall: Hall) -> None:
    a, b, c, d = hall.admitted("abcd")
    hall.passes(1)
    hall.workers.request(c)
    hall.workers.request(d)
    assert states([a, b, c, d]) == ["parked", "served", "served", "parked"]
    hall.passes(SILENT_S)
    assert states([a, b, c, d]) == ["parked", "parked", "served", "served"]


def test_whoever_leaves_hands_its_worker_on(hall: Hall) -> None:
    a, b, c = hall.admitted("abc")
    hall.passes(SILENT_S / 2, a, b)
    hall.workers.request(c)
    hall.workers.leave(a)
    assert c.state == "served"
    assert hall.workers.taken == len(hall.pool) == 2
    hall.workers.leave(b)
    hall.workers.leave(c)
    hall.workers.leave(c)
    assert hall.workers.taken == len(hall.pool) == 0


def test_one_that_leaves_while_it_waits_is_not_served(hall: Hall) -> None:
    a, b, c = hall.admitted("abc")
    hall.passes(SILENT_S / 2, a, b)
    hall.workers.request(c)
    hall.workers.leave(c)
    assert not hall.loop.made.runs
    hall.passes(1)
    assert states([a, b, c]) == ["served", "served", "parked"]


def test_a_newcomer_does_not_overtake_those_who_wait(hall: Hall) -> None:
    a, b, c = hall.admitted("abc")
    hall.passes(SILENT_S / 2, a, b)
    hall.workers.request(c)
    (d,) = hall.admitted("d")
    assert d.state == "parked"
    hall.workers.request(d)
    hall.workers.leave(a)
    assert states([c, d]) == ["served", "parked"]
    assert hall.workers.waiting_since == hall.clock.now


def test_the_wait_is_bounded_whatever_the_others_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The contract: at most (waiting / workers + 1) slices, and a turn for each."""
    hall = Hall(4, monkeypatch)
    busy = hall.admitted("abcdefghijkl")
    for reader in busy[4:]:
        hall.workers.request(reader)
    (late,) = hall.admitted("z")
    hall.workers.request(late)
    began = hall.clock.now
    bound_s = (hall.workers.waiting / 4 + 1) * SLICE_S
    while late.state != "served":
        hall.passes(SILENT_S, *[reader for reader in busy if reader.state == "served"])
        for reader in busy:
            if reader.state == "parked" and reader not in hall.workers._waiting:
                hall.workers.request(reader)
        assert hall.clock.now - began <= bound_s + 4 * SILENT_S
