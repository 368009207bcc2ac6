"""Slots: what one process may read of the others."""

from __future__ import annotations

import os

import pytest

from counter.processes.slots import (
    BACKLOG,
    CONNECTIONS,
    CONNECTIONS_TOTAL,
    MOST_CONNECTIONS,
    REQUESTS,
    WAITING,
    WAITING_SINCE_MS,
    WORKERS,
    WORKERS_TAKEN,
    Slots,
)


def make_slots(*processes: tuple[int, int]) -> Slots:
    """Slots of processes with so many open connections of so many that each may have."""
    slots = Slots(len(processes))
    for index, (connections, most) in enumerate(processes):
        slots[index][CONNECTIONS], slots[index][MOST_CONNECTIONS] = connections, most
    return slots


@pytest.mark.parametrize(
    ("processes", "fewest"),
    [
        ([(9, 50)], None),
        ([(9, 50), (7, 50)], 7),
        ([(9, 50), (30, 50), (12, 50)], 12),
        ([(9, 50), (0, 50), (12, 50)], 0),
        ([(9, 50), (50, 50), (12, 50)], 12),  # it has its share
        ([(9, 50), (0, 0), (12, 50)], 12),  # it does not accept
        ([(9, 50), (50, 50), (0, 0)], None),
    ],
)
def test_the_fewest_connections_are_those_of_a_process_that_can_take_one_more(
    processes: list[tuple[int, int]], fewest: int | None
) -> None:
    assert make_slots(*processes).fewest_connections(but=0) == fewest


def test_workers_that_are_all_taken_keep_no_process_from_taking_connections() -> None:
    slots = make_slots((30, 50), (20, 50))
    slots[1][WORKERS] = slots[1][WORKERS_TAKEN] = 20
    assert slots.fewest_connections(but=0) == 20


def test_a_dead_process_keeps_its_counts_and_no_gauge() -> None:
    slots = make_slots((20, 50), (3, 50))
    gauges = (
        CONNECTIONS, WORKERS, BACKLOG, WORKERS_TAKEN, WAITING, WAITING_SINCE_MS, MOST_CONNECTIONS,
    )  # fmt: skip
    for cell in (REQUESTS, CONNECTIONS_TOTAL, *gauges):
        slots[0][cell] = slots[1][cell] = 5
    slots.clear_gauges(0)
    assert [slots[0][cell] for cell in gauges] == [0] * len(gauges)
    assert [slots[1][cell] for cell in gauges] == [5] * len(gauges)
    assert slots.cells(REQUESTS) == slots.cells(CONNECTIONS_TOTAL) == [5, 5]


def test_every_cell_has_a_place_of_its_own_in_memory_that_a_child_shares() -> None:
    slots = Slots(2)
    gauges = (
        CONNECTIONS, WORKERS, BACKLOG, WORKERS_TAKEN, WAITING, WAITING_SINCE_MS, MOST_CONNECTIONS,
    )  # fmt: skip
    pid = os.fork()
    if not pid:
        for number, cell in enumerate(gauges, 1):
            slots[1][cell] = number
        os._exit(0)
    os.waitpid(pid, 0)
    assert [slots[1][cell] for cell in gauges] == list(range(1, len(gauges) + 1))
    assert [slots[0][cell] for cell in gauges] == [0] * len(gauges)
