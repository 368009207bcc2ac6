"""Sessions in a SQLite file: writers that take them from each other, fences, doubt, room, age."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from counter.totals import sqlite_sessions
from counter.totals.session_page import Record, pack
from counter.totals.session_store import Claim, End, Fenced, Granted, Park, Wish, Work
from counter.totals.sqlite import SqliteStore
from counter.totals.sqlite_sessions import LIFE_S, SPARE_S, SqlitePages
from counter.totals.store import InDoubt, StoreAway
from protocol import Control, Hello, Refused

A, B, C = 2**127 + 5, 7, 2**64 + 1


class Clock:
    """Seconds, as the test says."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Writer:
    """A process's store, as its group commit uses it."""

    def __init__(self, path: str, most: int = 10_000, clock: Clock | None = None) -> None:
        self.store = SqliteStore(path)
        self.store.check()
        self.store._pages = SqlitePages(most, clock or Clock())

    def do(self, *wishes: Wish, amount: int = 0, shares: Any = ()) -> int:
        """One commit; the total before."""
        return self.store.commit_work(lambda: Work(amount, list(shares), list(wishes)))

    def claim(self, hello: Hello) -> Granted | Refused | None:
        """What becomes of a hello, again where the writer is Fenced."""
        claim = Claim(hello)
        try:
            self.do(claim)
        except Fenced:
            self.do(claim)
        return claim.outcome

    def add(self, session_id: int, *amounts: int) -> int:
        """Adds amounts of a session, in one read; the total after them."""
        total = sum(amounts)
        return self.do(amount=total, shares=[(session_id, len(amounts), total)]) + total


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "counter.db")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pair(path: str, clock: Clock) -> Iterator[tuple[Writer, Writer]]:
    """Two writers on one file."""
    with ExitStack() as stack:
        writers = Writer(path, clock=clock), Writer(path, clock=clock)
        for writer in writers:
            stack.callback(writer.store.close)
        yield writers


@pytest.fixture
def here(pair: tuple[Writer, Writer]) -> Writer:
    return pair[0]


@pytest.fixture
def there(pair: tuple[Writer, Writer]) -> Writer:
    return pair[1]


def opening(session_id: int = A, window: int = 8) -> Hello:
    return Hello(session_id, Control.OPEN, window)


def resuming(have: int, session_id: int = A) -> Hello:
    return Hello(session_id, Control.RESUME, have)


def sql(path: str, statement: str, *values: Any) -> list[Any]:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        return db.execute(statement, values).fetchall()


def in_pages(path: str) -> list[tuple[int, int]]:
    """Fence and number of each page, those first whose fence was raised more often."""
    return sql(path, "SELECT fence, number FROM session_page ORDER BY fence DESC, number DESC")


# One writer.


def test_what_was_applied_is_told_with_its_totals(here: Writer) -> None:
    assert here.claim(opening()) == Granted(0, ())
    assert here.add(A, 5, 6) == 11
    assert here.add(A, 1) == 12
    assert here.claim(resuming(1)) == Granted(3, ((2, 11), (3, 12)))
    assert here.claim(resuming(3)) == Granted(3, ())


def test_frames_of_several_sessions_and_reads_are_one_addition(here: Writer, path: str) -> None:
    here.do(Claim(opening(A)), Claim(opening(B)))
    here.store.add(100)
    shares = [(A, 1, 10), (B, 2, 13), (A, 1, 20)]
    assert here.do(amount=27, shares=shares) == 100
    assert here.claim(resuming(0, A)) == Granted(2, ((1, 110), (2, 120)))
    assert here.claim(resuming(0, B)) == Granted(2, ((2, 113),))
    assert sql(path, "SELECT total FROM counter") == [("127",)]


def test_reads_of_a_session_are_applied_though_the_total_stays(here: Writer) -> None:
    here.claim(opening())
    here.add(A, 0)
    assert here.claim(resuming(0)) == Granted(1, ((1, 0),))


def test_totals_of_a_session_wrap_as_all_do(here: Writer) -> None:
    here.claim(opening())
    here.store.add(2**64 - 1)
    assert here.do(amount=3, shares=[(A, 1, 3)]) == 2**64 - 1
    assert here.claim(resuming(0)) == Granted(1, ((1, 2),))


@pytest.mark.parametrize("hello", [resuming(0, 99), opening(), resuming(0)])
def test_what_is_unknown_late_or_opened_twice_is_refused(here: Writer, hello: Hello) -> None:
    here.claim(opening(window=2))
    here.add(A, 1, 1, 1)
    assert here.claim(hello) is Refused.UNKNOWN
    assert here.claim(resuming(3)) == Granted(3, ())


def test_opened_again_before_anything_was_applied_it_is_the_same(
    here: Writer, there: Writer
) -> None:
    here.claim(opening())
    assert there.claim(opening()) == Granted(0, ())
    there.add(A, 1)
    assert here.claim(opening()) is Refused.UNKNOWN


@pytest.mark.parametrize("place", ["here", "parked", "elsewhere"])
def test_who_has_more_than_was_applied_is_told_so_and_the_session_ends(
    here: Writer, there: Writer, path: str, place: str
) -> None:
    (there if place == "elsewhere" else here).claim(opening())
    if place == "parked":
        here.do(Park(A))
    assert here.claim(resuming(2)) == Granted(0, (), is_over=True)
    assert here.claim(resuming(0)) is Refused.UNKNOWN
    assert sql(path, "SELECT id FROM session") == []


def test_an_end_frees_a_session_and_says_what_was_applied(here: Writer, path: str) -> None:
    here.claim(opening())
    here.add(A, 1, 2)
    end = End(A)
    # What came before it is in it.
    here.do(end, amount=3, shares=[(A, 1, 3)])
    assert end.applied == 3
    assert sql(path, "SELECT id FROM session") == []
    assert here.claim(resuming(3)) is Refused.UNKNOWN
    again = End(A)
    here.do(again)
    assert again.applied is None


def test_a_session_that_is_parked_is_in_its_own_row(here: Writer, there: Writer, path: str) -> None:
    here.claim(opening())
    here.do(Park(A), amount=4, shares=[(A, 1, 4)])
    assert there.claim(resuming(0)) == Granted(1, ((1, 4),))
    assert there.add(A, 5) == 9
    # Nothing was taken out of anybody's page.
    assert [fence for fence, _ in in_pages(path)] == [0, 0]
    here.do(Park(A))
    assert there.add(A, 1) == 10


# Two writers.


def test_who_loses_a_session_adds_nothing_of_it_any_more(
    here: Writer, there: Writer, path: str
) -> None:
    here.do(Claim(opening(A)), Claim(opening(B)))
    here.add(A, 1)
    assert there.claim(resuming(0)) == Granted(1, ((1, 1),))
    with pytest.raises(Fenced) as fenced:
        here.do(amount=30, shares=[(A, 1, 10), (B, 1, 30)])
    assert fenced.value.lost == {A}
    assert sql(path, "SELECT total FROM counter") == [("1",)]
    # Without it, it goes on.
    assert here.add(B, 20) == 21
    assert there.add(A, 4) == 25
    assert here.claim(resuming(0, B)) == Granted(1, ((1, 21),))


def test_the_fence_is_raised_and_the_number_stays(here: Writer, there: Writer, path: str) -> None:
    here.claim(opening())
    here.add(A, 1)
    assert in_pages(path) == [(0, 2)]
    there.claim(resuming(1))
    assert in_pages(path) == [(1, 2), (0, 1)]


def test_a_session_goes_back_and_forth(here: Writer, there: Writer) -> None:
    here.claim(opening())
    for turn in range(6):
        one = there if turn % 2 else here
        if turn > 1:
            with pytest.raises(Fenced):
                one.do(Claim(resuming(turn)))
        assert one.claim(resuming(turn)) == Granted(turn, ())
        assert one.add(A, 1) == turn + 1


def test_a_hello_that_was_late_takes_nothing_over(here: Writer, there: Writer, path: str) -> None:
    here.claim(opening(window=1))
    here.add(A, 1)
    here.add(A, 1)
    assert there.claim(resuming(0)) is Refused.UNKNOWN
    assert in_pages(path)[0] == (0, 3)
    assert here.add(A, 1) == 3


def test_plain_additions_need_no_page(here: Writer, there: Writer, path: str) -> None:
    here.claim(opening())
    there.claim(resuming(0))
    assert here.do(amount=5) == 0
    assert here.store.add(5) == 5
    assert in_pages(path) == [(1, 1), (0, 1)]


def test_several_are_taken_out_of_one_page_at_once(here: Writer, there: Writer, path: str) -> None:
    here.do(*(Claim(opening(i)) for i in range(1, 9)))
    claims = [Claim(resuming(0, i)) for i in range(1, 6)]
    there.do(*claims)
    assert all(claim.outcome == Granted(0, ()) for claim in claims)
    assert in_pages(path) == [(1, 1), (0, 1)]
    with pytest.raises(Fenced) as fenced:
        here.add(8, 1)
    assert fenced.value.lost == {1, 2, 3, 4, 5}


def test_a_page_that_is_gone_is_never_made_anew(here: Writer, path: str) -> None:
    here.claim(opening())
    (writer,) = sql(path, "SELECT writer FROM session_page")[0]
    sql(path, "DELETE FROM session_page")
    with pytest.raises(Fenced) as fenced:
        here.add(A, 1)
    assert fenced.value.lost == {A}
    assert here.claim(resuming(0)) is Refused.UNKNOWN
    here.claim(opening(B))
    assert sql(path, "SELECT writer FROM session_page") != [(writer,)]


def test_who_writes_in_ones_name_is_noticed(here: Writer, path: str) -> None:
    here.claim(opening())
    sql(path, "UPDATE session_page SET number = number + 1")
    with pytest.raises(Fenced) as fenced:
        here.add(A, 1)
    assert fenced.value.lost == {A}
    # It is another's now, from whom it is taken.
    assert here.claim(resuming(0)) == Granted(0, ())
    assert here.add(A, 1) == 1


def test_a_file_that_went_back_is_noticed_and_every_client_learns_it(
    here: Writer, path: str, tmp_path: Path
) -> None:
    here.do(Claim(opening(A)), Claim(opening(B)))
    here.add(A, 1)
    older = str(tmp_path / "older.db")
    with closing(sqlite3.connect(path)) as db, closing(sqlite3.connect(older)) as copy:
        db.backup(copy)
    here.add(A, 1)
    with closing(sqlite3.connect(older)) as copy, closing(sqlite3.connect(path)) as db:
        copy.backup(db)
    with pytest.raises(Fenced) as fenced:
        here.add(B, 1)
    assert fenced.value.lost == {A, B}
    assert here.claim(resuming(2, A)) == Granted(1, (), is_over=True)
    assert here.claim(resuming(0, B)) == Granted(0, ())
    assert here.add(B, 1) == 2


# Doubt.


class Faulty(sqlite3.Connection):
    """Says of a COMMIT that the disk failed, before or after it."""

    fails = ""

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        if statement != "COMMIT" or not self.fails:
            return super().execute(statement, *values)
        if self.fails == "after":
            super().execute(statement)
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
        raise error


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> type[Faulty]:
    plain = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda *args, **named: plain(*args, factory=Faulty, **named)
    )
    monkeypatch.setattr(Faulty, "fails", "")
    return Faulty


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_commit_in_doubt_is_made_once(
    faulty: type[Faulty], here: Writer, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    here.claim(opening())
    monkeypatch.setattr(faulty, "fails", when)
    claim = Claim(opening(B))
    with pytest.raises(InDoubt):
        here.do(claim, amount=5, shares=[(A, 1, 5)])
    if when == "before":
        with pytest.raises(InDoubt):
            here.store.settle()
    monkeypatch.setattr(faulty, "fails", "")
    assert here.store.settle() == 0
    assert claim.outcome == Granted(0, ())
    assert here.claim(resuming(0)) == Granted(1, ((1, 5),))
    assert here.add(B, 1) == 6


def test_a_commit_in_doubt_that_is_fenced_is_not_made(
    faulty: type[Faulty], here: Writer, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.claim(opening())
    monkeypatch.setattr(faulty, "fails", "before")
    with pytest.raises(InDoubt):
        here.add(A, 5)
    monkeypatch.setattr(faulty, "fails", "")
    sql(path, "UPDATE session_page SET fence = fence + 1, records = ?", pack([]))
    with pytest.raises(Fenced) as fenced:
        here.store.settle()
    assert fenced.value.lost == {A}
    assert here.do(amount=5) == 0  # nothing is in doubt any more


def test_a_disk_that_is_full_leaves_the_page_as_it_was(here: Writer, path: str) -> None:
    here.claim(opening())
    assert here.store._db is not None
    ((pages,),) = here.store._db.execute("PRAGMA page_count")
    here.store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreAway, match="full"):
        here.do(*(Claim(opening(i)) for i in range(1, 1000)))
    here.store._db.execute("PRAGMA max_page_count = 100000")
    assert here.add(A, 3) == 3
    assert here.claim(resuming(0)) == Granted(1, ((1, 3),))


NEWER = b"\x09\0\0\0\0"


def test_what_a_newer_release_has_written_is_not_written_over(
    here: Writer, there: Writer, path: str
) -> None:
    here.claim(opening())
    sql(path, "UPDATE session_page SET fence = 1, records = ?", NEWER)
    held = Claim(resuming(0))
    # A plain peer's addition in the same commit is made.
    assert there.do(held, amount=5) == 0
    assert held.outcome is Refused.HELD
    with pytest.raises(Fenced) as fenced:
        here.add(A, 1)
    assert fenced.value.lost == {A}
    assert here.do(Claim(opening(B)), amount=1) == 5
    assert sql(path, "SELECT records FROM session_page WHERE fence = 1") == [(NEWER,)]


# Room and age.


def test_there_is_room_for_so_many_of_all_writers(path: str, clock: Clock) -> None:
    with ExitStack() as stack:
        here, there = Writer(path, 3, clock), Writer(path, 3, clock)
        stack.callback(here.store.close)
        stack.callback(there.store.close)
        claims = [Claim(opening(i)) for i in (1, 2)]
        here.do(*claims)
        assert there.claim(opening(3)) == Granted(0, ())
        here.do(Park(1))
        assert here.claim(opening(4)) is Refused.NO_ROOM
        clock.now += SPARE_S + 1
        late = Claim(opening(4))
        there.do(late)
        assert (late.outcome, late.evicted) == (Granted(0, ()), 1)
        assert here.claim(resuming(0, 1)) is Refused.UNKNOWN
        # Those that are connected never give way.
        clock.now += SPARE_S + 1
        assert here.claim(opening(5)) is Refused.NO_ROOM
        assert here.add(2, 1) == 1


def test_who_was_idle_for_longest_gives_way_first(path: str, clock: Clock) -> None:
    with closing(SqliteStore(path)):
        writer = Writer(path, 3, clock)
        for session_id in (1, 2, 3):
            writer.claim(opening(session_id))
            writer.do(Park(session_id))
            clock.now += SPARE_S
        writer.do(*(Claim(opening(i)) for i in (4, 5)))
        assert writer.claim(resuming(0, 3)) == Granted(0, ())
        assert writer.claim(resuming(0, 1)) is Refused.UNKNOWN
        writer.store.close()


def test_windows_are_bounded_in_a_page_and_altogether(
    here: Writer, there: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_sessions, "PAGE_FRAMES", 200)
    monkeypatch.setattr(sqlite_sessions, "ALL_FRAMES", 300)
    claims = [Claim(opening(i, 100)) for i in (1, 2, 3)]
    here.do(*claims)
    assert [claim.outcome for claim in claims] == [Granted(0, ())] * 2 + [Refused.NO_ROOM]
    assert there.claim(opening(4, 100)) == Granted(0, ())
    assert there.claim(opening(5, 1)) is Refused.NO_ROOM
    # One that is gone on with is never refused for it.
    assert there.claim(resuming(0, 1)) == Granted(0, ())


def test_a_session_without_a_connection_lives_for_a_day(here: Writer, clock: Clock) -> None:
    here.do(Claim(opening(A)), Claim(opening(B)))
    here.do(Park(A))
    clock.now += LIFE_S - 1
    assert here.claim(resuming(0, A)) == Granted(0, ())
    here.do(Park(A))
    clock.now += LIFE_S
    assert here.claim(resuming(0, A)) is Refused.UNKNOWN
    assert here.add(B, 1) == 1  # it was connected


def test_the_page_of_a_writer_that_died_goes_after_a_day(
    here: Writer, there: Writer, clock: Clock, path: str
) -> None:
    here.claim(opening(A))
    clock.now += LIFE_S
    there.claim(opening(B))
    assert sql(path, "SELECT count(*) FROM session_page") == [(1,)]
    assert there.claim(resuming(0, A)) is Refused.UNKNOWN
    # Nobody is counted in its name, though it was only asleep.
    with pytest.raises(Fenced) as fenced:
        here.add(A, 1)
    assert fenced.value.lost == {A}


def test_a_writer_that_is_idle_gives_word(here: Writer, there: Writer, clock: Clock) -> None:
    here.claim(opening(A))
    for _ in range(30):
        clock.now += LIFE_S / 24 + 1
        here.store.probe()
    there.claim(opening(B))
    assert here.add(A, 1) == 1


# Files of other releases, and processes that die.


def test_a_file_of_an_older_release_is_carried_over(path: str) -> None:
    sql(path, "CREATE TABLE counter (id INTEGER PRIMARY KEY CHECK (id = 1), total TEXT NOT NULL)")
    sql(path, "INSERT INTO counter VALUES (1, '41')")
    sql(path, "PRAGMA application_id = 1131312242")
    sql(path, "PRAGMA user_version = 1")
    writer = Writer(path)
    assert writer.do(amount=1) == 41
    # Without sessions it stays what the older release knows.
    assert sql(path, "SELECT name FROM sqlite_master WHERE name LIKE 'session%'") == []
    writer.claim(opening())
    assert writer.add(A, 1) == 43
    assert sql(path, "PRAGMA user_version") == [(1,)]
    writer.store.close()


def claim_and_die(path: str, at_commit: bool) -> None:
    """In a process that is killed: takes a session over and adds 7, up to the COMMIT or behind."""
    writer = Writer(path)
    writer.claim(resuming(1))
    if at_commit:
        assert writer.store._db is not None
        writer.store._db.set_trace_callback(
            lambda statement: (
                os.kill(os.getpid(), signal.SIGKILL) if statement == "COMMIT" else None
            )
        )
    writer.add(A, 7)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("at_commit", [True, False])
def test_of_a_process_that_was_killed_all_or_nothing_is_found(
    here: Writer, path: str, at_commit: bool
) -> None:
    here.claim(opening())
    here.add(A, 1)
    pid = os.fork()
    if not pid:
        try:
            claim_and_die(path, at_commit)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    with pytest.raises(Fenced) as fenced:
        here.add(A, 100)
    assert fenced.value.lost == {A}
    expected = Granted(1, ()) if at_commit else Granted(2, ((2, 8),))
    assert here.claim(resuming(1)) == expected
    assert here.add(A, 1) == (2 if at_commit else 9)


def race(path: str, session_id: int, adds: int) -> int:
    """In a process: takes a session over again and again and adds 1; how many were answered."""
    writer, have, answered = Writer(path), 0, 0
    held = False
    while answered < adds:
        try:
            if not held:
                claim = Claim(resuming(have, session_id))
                writer.do(claim)
                assert isinstance(claim.outcome, Granted)
                have, held = claim.outcome.applied, True
            writer.add(session_id, 1)
            have += 1
            answered += 1
        except Fenced:
            held = False
    writer.store.close()
    return answered


def test_processes_that_take_a_session_from_each_other_count_what_was_answered(path: str) -> None:
    with closing(SqliteStore(path)) as store:
        store.check()
    opener = Writer(path)
    opener.claim(opening(window=4096))
    pids = []
    for _ in range(3):
        pid = os.fork()
        if not pid:
            status = 1
            try:
                status = 0 if race(path, A, 150) == 150 else 1
            finally:
                os._exit(status)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert sql(path, "SELECT total FROM counter") == [("450",)]
    assert opener.claim(resuming(450)) == Granted(450, ())
    opener.store.close()


def test_an_id_of_zeros_is_one_like_any_other(here: Writer, there: Writer) -> None:
    here.claim(opening(0))
    here.add(0, 5)
    assert there.claim(resuming(0, 0)) == Granted(1, ((1, 5),))
    assert Record(0, 1).session_id == 0
