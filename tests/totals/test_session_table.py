"""The table of sessions: who is told what, what is kept of the totals, and who gives way."""

from __future__ import annotations

import mmap
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counter.totals import sessions
from counter.totals.sessions import LIFE_MS, RING_BYTES, SPARE_MS, Claimed, Held, SessionTable
from protocol import MAX_WINDOW, Answer, Control, Hello, Refused

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
LIMIT = 99


def opened(table: SessionTable, session_id: int, window: int = 4, place: int = 0) -> int:
    claim = table.claim(place, Hello(session_id, Control.OPEN, window), LIMIT)
    assert isinstance(claim, Claimed), claim
    assert claim.slot is not None
    return claim.slot


def claimed(table: SessionTable, session_id: int, have: int, place: int = 0) -> Any:
    return table.claim(place, Hello(session_id, Control.RESUME, have), LIMIT)


def add(table: SessionTable, slot: int, frames: int, total: int) -> None:
    applied, number = table.progress(slot)
    table.note(slot, applied + frames, number, total)


class Clock:
    """The time that a table sees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 10 * LIFE_MS
        monkeypatch.setattr(sessions, "now_ms", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@PROPERTY
@given(st.integers(1, MAX_WINDOW), st.lists(st.integers(1, 40), max_size=60), st.data())
def test_of_the_totals_all_are_kept_that_a_client_may_not_have(
    window: int, batches: list[int], data: st.DataObject
) -> None:
    table = SessionTable(1, 1)
    slot = opened(table, 5, window)
    runs, applied = [], 0
    for number, frames in enumerate(batches):
        applied += frames
        runs.append((applied, number * 7))
        add(table, slot, frames, number * 7)
    table.release(slot)
    have = data.draw(st.integers(max(0, applied - window), applied))
    claim = claimed(table, 5, have)
    assert claim.answer == Answer(applied, LIMIT, tuple(run for run in runs if run[0] > have))


def test_a_ring_of_one_keeps_the_last_total(clock: Clock) -> None:
    table = SessionTable(1, 1)
    slot = opened(table, 5, 1)
    for total in (3, 5, 8):
        add(table, slot, 1, total)
    table.release(slot)
    assert claimed(table, 5, 1) is Refused.UNKNOWN
    assert claimed(table, 5, 2).answer == Answer(3, LIMIT, ((3, 8),))


def test_who_has_a_session_is_named_and_left_alone() -> None:
    table = SessionTable(4, 2)
    slot = opened(table, 5, place=1)
    assert claimed(table, 5, 0) == Held(slot, 1)
    assert table.claim(0, Hello(5, Control.OPEN, 4), LIMIT) == Held(slot, 1)
    table.want(slot, 0)
    assert table.wanted_by(slot) == 0
    table.release(slot)
    assert claimed(table, 5, 0).slot == slot
    assert table.wanted_by(slot) is None
    assert table.count() == (1, 1)


def test_an_id_that_begins_in_another_is_not_that_one() -> None:
    table = SessionTable(3, 1)
    for session_id in (1 << 64, (1 << 64) + 1, 1):
        table.release(opened(table, session_id))
    assert claimed(table, 1 << 56, 0) is Refused.UNKNOWN
    assert claimed(table, 0, 0) is Refused.UNKNOWN
    assert claimed(table, 1, 0).slot == 2


def test_a_slot_that_is_free_again_knows_nothing_of_before() -> None:
    table = SessionTable(1, 1)
    slot = opened(table, 5)
    add(table, slot, 3, 3)
    assert table.end(slot) == 3
    assert claimed(table, 5, 3) is Refused.UNKNOWN
    again = opened(table, 6)
    assert again == slot
    add(table, slot, 1, 9)
    table.release(slot)
    assert claimed(table, 6, 0).answer == Answer(1, LIMIT, ((1, 9),))


def test_what_is_noted_of_a_session_that_ended_changes_nothing() -> None:
    table = SessionTable(1, 1)
    slot = opened(table, 5)
    table.end(slot)
    table.note(slot, 5, 0, 5)
    assert table.progress(slot) == (0, 0)


def test_a_session_without_a_connection_is_over_after_an_hour(clock: Clock) -> None:
    table = SessionTable(2, 1)
    table.release(opened(table, 5))
    held = opened(table, 6)
    clock.now += LIFE_MS - 1
    assert isinstance(claimed(table, 5, 0), Claimed)
    table.release(0)
    clock.now += LIFE_MS
    assert claimed(table, 5, 0) is Refused.UNKNOWN
    assert claimed(table, 6, 0) == Held(held, 0)


def test_where_there_is_no_room_who_was_gone_for_longest_gives_way(clock: Clock) -> None:
    table = SessionTable(3, 1)
    held = opened(table, 1)
    for session_id in (2, 3):
        table.release(opened(table, session_id))
        clock.now += 1
    clock.now += SPARE_MS - 2
    assert table.claim(0, Hello(4, Control.OPEN, 4), LIMIT) != Refused.NO_ROOM
    assert table.evicted == 1
    assert claimed(table, 2, 0) is Refused.UNKNOWN
    assert (
        table.claim(0, Hello(5, Control.OPEN, 4), LIMIT) is Refused.NO_ROOM
    )  # 3 was gone too late
    clock.now += 1
    assert isinstance(table.claim(0, Hello(5, Control.OPEN, 4), LIMIT), Claimed)
    assert claimed(table, 1, 0) == Held(held, 0)


def test_each_process_opens_its_share(clock: Clock) -> None:
    table = SessionTable(4, 2)
    assert [opened(table, number, place=1) for number in (1, 2)] == [2, 3]
    assert table.claim(1, Hello(3, Control.OPEN, 4), LIMIT) is Refused.NO_ROOM
    assert opened(table, 3, place=0) == 0
    assert claimed(table, 1, 0, place=0) == Held(2, 1)


def test_large_windows_are_bounded_by_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "RING_BYTES", 4 * 65536)
    table = SessionTable(100, 2)
    slots = [opened(table, number, MAX_WINDOW) for number in (1, 2)]
    assert table.claim(0, Hello(3, Control.OPEN, 1), LIMIT) is Refused.NO_ROOM
    table.end(slots[0])
    for number in range(4, 4 + 65536 // mmap.PAGESIZE):
        opened(table, number, 1)
    assert table.claim(0, Hello(99, Control.OPEN, 1), LIMIT) is Refused.NO_ROOM
    assert opened(table, 99, 1, place=1) == 50  # another process has room of its own


def test_a_ring_that_was_large_gives_its_memory_back() -> None:
    table = SessionTable(64, 1)
    before = resident_bytes()
    for number in range(1, 65):
        slot = opened(table, number, MAX_WINDOW)
        for run in range(MAX_WINDOW):
            table.note(slot, run + 1, run, run)
    assert resident_bytes() - before > 3 << 20
    for slot in range(64):
        table.end(slot)
    assert resident_bytes() - before < 1 << 20


def resident_bytes() -> int:
    """Of shared memory, in this process."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE


def test_a_default_table_takes_what_is_used_of_it() -> None:
    before = resident_bytes()
    table = SessionTable(10_000, 2)
    assert table.count() == (0, 0)
    assert resident_bytes() - before < 2 << 20
    assert RING_BYTES == 64 << 20


def test_who_dies_while_it_opens_a_session_leaves_no_half_of_one() -> None:
    table: Any = SessionTable(2, 2)
    pid = os.fork()
    if not pid:
        try:
            with table.lock:
                table._window = Deadly(table._window)
                opened(table, 5)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    with table.lock:  # the kernel dropped it
        table.release_all(0)
    assert table.count() == (0, 0)
    assert opened(table, 5) == 0


class Deadly:
    """Words of which none is ever stored."""

    def __init__(self, words: Any) -> None:
        self.words = words

    def __getitem__(self, at: Any) -> Any:
        return self.words[at]

    def __len__(self) -> int:
        return len(self.words)

    def __setitem__(self, at: int, value: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
