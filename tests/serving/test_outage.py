"""An outage as the processes of one server see it: said once as it begins and once as it ends."""

from __future__ import annotations

import logging

import pytest

from counter.processes.slots import AWAY_SINCE_MS, Slots
from counter.serving.outage import Outage
from kit.lines import LineList


class Bench:
    """The outage of each of some processes, with their clock and log in the test's hand."""

    def __init__(self, processes: int) -> None:
        handler = LineList()
        logger = logging.Logger("test", logging.DEBUG)
        logger.addHandler(handler)
        self.now_s = 1000.0
        self.lines = handler.lines
        self.slots = Slots(processes)
        self.outages = [
            Outage(self.slots, index, logger, "redis://h/0", "30s", lambda: self.now_s)
            for index in range(processes)
        ]

    def since_ms(self) -> list[int]:
        return [self.slots[index][AWAY_SINCE_MS] for index in range(len(self.slots))]


BEGAN = (
    "WARNING store redis://h/0 is away (refused); additions wait up to 30s for it, "
    "then their connections close unanswered"
)


def test_an_outage_of_one_process_has_two_lines() -> None:
    bench = Bench(1)
    (outage,) = bench.outages
    outage.begin("refused")
    assert bench.lines == [BEGAN]
    assert bench.since_ms() == [1_000_000]
    bench.now_s += 2.54
    outage.end()
    assert bench.lines == [BEGAN, "WARNING store redis://h/0 is back after 2.5 s"]
    assert bench.since_ms() == [0]


def test_the_first_to_notice_says_it_and_the_last_to_get_on() -> None:
    bench = Bench(3)
    one, two, three = bench.outages
    one.begin("refused")
    bench.now_s += 1
    two.begin("cut")
    three.begin("cut")
    assert bench.lines == [BEGAN]
    assert bench.since_ms() == [1_000_000, 1_001_000, 1_001_000]
    bench.now_s += 1
    one.end()
    three.end()
    assert bench.lines == [BEGAN]
    bench.now_s += 1
    two.end()
    assert bench.lines == [BEGAN, "WARNING store redis://h/0 is back after 3.0 s"]
    assert bench.since_ms() == [0, 0, 0]


def test_a_process_that_died_during_an_outage_does_not_keep_it_open() -> None:
    bench = Bench(2)
    one, two = bench.outages
    one.begin("refused")
    two.begin("refused")
    bench.slots.clear_gauges(1)
    one.end()
    assert len(bench.lines) == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_every_outage_is_said_and_timed_anew(processes: int) -> None:
    bench = Bench(processes)
    for _ in range(2):
        bench.outages[0].begin("refused")
        bench.now_s += 5
        bench.outages[0].end()
        bench.now_s += 100
    assert bench.lines == [BEGAN, "WARNING store redis://h/0 is back after 5.0 s"] * 2


def test_an_outage_at_the_clocks_beginning_is_one() -> None:
    """Zero milliseconds in a slot say that there is no outage."""
    bench = Bench(2)
    bench.now_s = 0.0
    for outage in bench.outages:
        outage.begin("refused")
    assert bench.lines == [BEGAN]
    assert all(bench.since_ms())
