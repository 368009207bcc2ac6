"""What is made of the slots: who waits, for how long, what is full; no server runs here."""

from __future__ import annotations

import re

import pytest

from counter.admin.metrics import scrape
from counter.admin.status import Status
from counter.processes.slots import (
    BACKLOG,
    CONNECTIONS,
    MOST_CONNECTIONS,
    WAITING,
    WAITING_SINCE_MS,
    WORKERS,
    WORKERS_TAKEN,
    Slots,
    now_ms,
)


class Server:
    """Two processes with 20 workers and room for 50 connections each, whose slots a test fills."""

    def __init__(self) -> None:
        self.slots = Slots(2)
        self.status = Status(self.slots, "memory", lambda: 7, 0)
        for index in (0, 1):
            self.fill(index, WORKERS, 20)
            self.fill(index, MOST_CONNECTIONS, 50)

    def fill(self, index: int, cell: int, value: int) -> None:
        self.slots[index][cell] = value

    def wait(self, index: int, count: int, since_s: float) -> None:
        """So many connections of a process wait, the first of them for so long."""
        self.fill(index, WAITING, count)
        self.fill(index, WAITING_SINCE_MS, now_ms() - int(since_s * 1000))

    def metric(self, name: str) -> float:
        match = re.search(rf"^{name} (\S+)$", scrape(self.status).decode(), re.MULTILINE)
        assert match, name
        return float(match[1])


def test_a_server_with_room_says_nothing_of_a_crowd() -> None:
    server = Server()
    server.fill(0, CONNECTIONS, 20)
    server.fill(0, WORKERS_TAKEN, 20)
    assert server.status.crowd() == ""
    assert server.metric("counter_connections") == 20
    assert server.metric("counter_workers") == 40
    assert server.metric("counter_workers_taken") == 20
    assert server.metric("counter_max_connections") == 100
    for name in ("pool_full", "waiting_connections", "longest_wait_seconds", "backlog_connections"):
        assert server.metric(f"counter_{name}") == 0


def test_idle_connections_may_have_every_worker_and_nobody_waits() -> None:
    server = Server()
    for index in (0, 1):
        server.fill(index, CONNECTIONS, 45)
        server.fill(index, WORKERS_TAKEN, 20)
    assert server.metric("counter_pool_full") == 1
    assert server.metric("counter_connections") == 90
    assert server.status.crowd() == ""


def test_who_waits_in_any_process_is_counted_and_keeps_the_server_ready() -> None:
    server = Server()
    server.wait(0, 3, since_s=0.2)
    server.wait(1, 1500, since_s=2.5)
    assert server.status.crowd() == "full: 1,503 wait"
    assert server.status.readiness().ready
    assert server.metric("counter_waiting_connections") == 1503
    assert server.metric("counter_longest_wait_seconds") == pytest.approx(2.5, abs=1)


def test_a_wait_in_one_process_shows_while_the_other_has_free_workers() -> None:
    """Each has workers and a queue of its own."""
    server = Server()
    server.fill(0, WORKERS_TAKEN, 20)
    server.wait(0, 1, since_s=0.1)
    assert server.status.crowd() == "full: 1 wait"
    assert server.metric("counter_pool_full") == 0
    state = server.status.as_json()
    assert [one["waiting"] for one in state["processes"]] == [1, 0]
    assert [one["workers_taken"] for one in state["processes"]] == [20, 0]


def test_a_wait_begins_anew_with_each_that_is_the_first() -> None:
    server = Server()
    server.wait(0, 2, since_s=30)
    assert 30 <= server.status.longest_wait_s() < 40
    server.wait(0, 1, since_s=0)
    assert server.status.longest_wait_s() < 10


def test_who_is_not_accepted_is_told_of_only_when_no_more_connections_may_be_open() -> None:
    server = Server()
    for index in (0, 1):
        server.fill(index, BACKLOG, 12)  # of one queue, which each has looked at
        server.fill(index, CONNECTIONS, 49)
    assert server.metric("counter_backlog_connections") == 12
    assert server.status.crowd() == ""
    server.fill(0, CONNECTIONS, 50)
    assert server.status.crowd() == "", "the other process has room"
    server.fill(1, CONNECTIONS, 50)
    assert server.status.crowd() == "full: 12 wait in the backlog"
    server.wait(0, 30, since_s=1)
    assert server.status.crowd() == "full: 30 wait, 12 more in the backlog"
    assert server.status.readiness().ready


def test_a_process_that_died_has_nobody_waiting() -> None:
    server = Server()
    server.wait(0, 30, since_s=5)
    server.wait(1, 2, since_s=1)
    server.slots.clear_gauges(0)
    assert server.status.crowd() == "full: 2 wait"
    assert server.status.longest_wait_s() < 5
    assert server.metric("counter_workers") == 20
