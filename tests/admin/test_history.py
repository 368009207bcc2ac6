"""What is remembered of a server's last hour: rates and commits."""

from __future__ import annotations

import pytest

from counter.admin.history import HOUR_S, MINUTES_S, History
from counter.processes.slots import (
    COMMIT_BOUNDS_S,
    COMMIT_US,
    COMMITS,
    REQUESTS,
    Slots,
)


class Server:
    """Slots that a test writes to, and a clock that it moves."""

    def __init__(self) -> None:
        self.slots = Slots(2)
        self.now_s = 1000.0
        self.history = History(self.slots, lambda: self.now_s)

    def run(self, seconds: int, requests: int = 0) -> None:
        """So many seconds, in each of which that much happened."""
        for _ in range(seconds):
            self.slots[0][REQUESTS] += requests
            self.now_s += 1.0
            self.history.note()


def test_the_rate_of_each_second_is_told_with_how_long_ago_it_was() -> None:
    server = Server()
    assert server.history.minutes() == []
    server.run(1)
    server.run(2, requests=10)
    server.run(1, requests=30)
    assert server.history.minutes() == [(2.0, 10), (1.0, 10), (0.0, 30)]
    server.now_s += 3.0
    assert server.history.minutes()[-1] == (3.0, 30)


def test_a_second_that_was_longer_has_the_rate_of_its_time() -> None:
    server = Server()
    server.run(1)
    server.now_s += 9.0  # the process did not run
    server.run(1, requests=100)
    assert server.history.minutes() == [(0.0, 10)]


def test_the_hour_has_a_rate_for_ten_seconds_each_and_one_for_the_newest() -> None:
    server = Server()
    server.run(1)
    server.run(10, requests=5)
    server.run(12, requests=7)
    assert server.history.hour() == [(12.0, 5), (2.0, 7), (0.0, 7)]


def test_memory_is_bounded_and_the_ranges_are_full() -> None:
    server = Server()
    server.run(2 * HOUR_S, requests=1)
    assert len(server.history.minutes()) == MINUTES_S
    assert server.history.minutes()[0][0] == MINUTES_S - 1
    assert HOUR_S / 10 <= len(server.history.hour()) <= HOUR_S / 10 + 1
    assert server.history.hour()[0][0] > HOUR_S - 30


def test_commits_are_told_of_the_last_seconds_alone() -> None:
    server = Server()
    assert server.history.commits() is None
    server.run(1)
    assert server.history.commits() is None
    server.slots[0][COMMITS + len(COMMIT_BOUNDS_S)] += 50  # long ago, and slow
    server.slots[0][COMMIT_US] += 10**9
    server.run(1)
    slow = server.history.commits()
    assert slow is not None
    assert slow.within_s == float("inf")
    server.run(20)
    assert server.history.commits() is None
    server.slots[0][COMMITS + 1] += 90
    server.slots[1][COMMITS + 3] += 10
    server.slots[1][COMMIT_US] += 100 * 500
    server.run(1)
    now = server.history.commits()
    assert now is not None
    assert (now.count, now.within_s) == (100, COMMIT_BOUNDS_S[3])
    assert now.mean_s == pytest.approx(0.0005)
