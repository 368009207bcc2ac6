"""Since when something is waited for, by a clock in the test's hand."""

from __future__ import annotations

import pytest

from counter.serving import deadlines
from counter.serving.deadlines import Deadlines

TIMEOUT_S = 5.0


class Clock:
    """Stands in for the module time; the test says what moment it is."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(deadlines, "time", clock)
    return clock


@pytest.fixture
def waited(clock: Clock) -> Deadlines[str]:
    return Deadlines(TIMEOUT_S)


def test_it_is_overdue_when_the_time_is_over_and_not_before(waited: Deadlines[str]) -> None:
    waited.begin("one")
    assert waited.overdue(104.9) == []
    assert waited.overdue(105) == ["one"]
    assert waited.overdue(200) == ["one"], "it is for whoever asks to end it"


def test_each_has_its_own_deadline(waited: Deadlines[str], clock: Clock) -> None:
    waited.begin("one")
    clock.now = 102
    waited.begin("two")
    assert waited.overdue(106.9) == ["one"]
    assert waited.overdue(107) == ["one", "two"]


def test_what_begins_again_has_its_whole_time(waited: Deadlines[str], clock: Clock) -> None:
    waited.begin("one")
    clock.now = 103
    waited.begin("one")
    assert waited.overdue(107.9) == []
    assert waited.overdue(108) == ["one"]


def test_it_may_have_begun_before(waited: Deadlines[str]) -> None:
    waited.begin("one", 97)
    assert waited.overdue(102) == ["one"]


def test_what_has_begun_does_not_begin_anew(waited: Deadlines[str], clock: Clock) -> None:
    waited.begin_unless_begun("one")
    clock.now = 103
    waited.begin_unless_begun("one")
    assert waited.overdue(105) == ["one"]


def test_what_has_ended_is_not_overdue(waited: Deadlines[str]) -> None:
    waited.begin("one")
    assert waited.end("one") == 100
    assert waited.overdue(1000) == []
    assert waited.end("one") is None


def test_it_stands_still_and_goes_on_where_it_stood(waited: Deadlines[str], clock: Clock) -> None:
    waited.begin("one")
    clock.now = 103
    waited.pause("one")
    assert waited.overdue(1000) == []
    clock.now = 500
    waited.resume("one")
    assert waited.overdue(501.9) == []
    assert waited.overdue(502) == ["one"]


def test_it_can_stand_still_again_and_again(waited: Deadlines[str], clock: Clock) -> None:
    waited.begin("one")
    for _ in range(4):
        clock.now += 1
        waited.pause("one")
        waited.pause("one")
        clock.now += 100
        waited.resume("one")
        waited.resume("one")
    assert waited.overdue(clock.now + 0.9) == []
    assert waited.overdue(clock.now + 1) == ["one"]


def test_where_nothing_is_waited_for_nothing_stands_still(waited: Deadlines[str]) -> None:
    waited.pause("one")
    waited.resume("one")
    assert waited.overdue(1000) == []


def test_what_ends_while_it_stands_still_does_not_go_on(waited: Deadlines[str]) -> None:
    waited.begin("one")
    waited.pause("one")
    waited.end("one")
    waited.resume("one")
    assert waited.overdue(1000) == []


def test_what_stands_still_does_not_begin_anew(waited: Deadlines[str], clock: Clock) -> None:
    waited.begin("one")
    clock.now = 104
    waited.pause("one")
    waited.begin_unless_begun("one")
    assert waited.overdue(1000) == []
    waited.resume("one")
    assert waited.overdue(105) == ["one"]
