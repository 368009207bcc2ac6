"""The sessions of a total in a SQLite file: the page of one writer, and the rows of all sessions.

Two tables beside the total's, made when a session is first wanted. Releases that know nothing of
them leave them alone, and may use the file at the same time: so no version tells of them.

    session_page   a row for each writer: fence, number of its last commit, when, its records
    session        a row for each session: whose page it is in, or its record, and since when it has
                   no connection

The invariant: a session is in one page, or in its own row. What takes one out of another writer's
page raises that page's fence in the same transaction. All here is done within a transaction of
sqlite.py's, alone in the queue, and becomes true with adopt(), after it has ended.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from counter.totals.session_page import PageError, Record, join, pack, unpack
from counter.totals.session_store import Claim, End, Fenced, Granted, Park, Wish, Work
from protocol import TOTAL_MASK, Control, Refused

# A session is kept for so long since it had a connection, and the page of a writer since its last
# word, which those that have sessions give more often.
LIFE_S: Final = 24 * 3600
WORD_S: Final = 3600
# Where there is no room for another one, those give way that had no connection for so long.
SPARE_S: Final = 300

# So many frames may the windows of all sessions of a page have together, and of all: a run for each
# is kept at most, and a page is written with each commit.
PAGE_FRAMES: Final = 512 << 10
ALL_FRAMES: Final = 4 << 20

_TABLES: Final = (
    "CREATE TABLE IF NOT EXISTS session_page (writer INTEGER PRIMARY KEY, fence INTEGER NOT NULL, "
    "number INTEGER NOT NULL, used_at INTEGER NOT NULL, records BLOB NOT NULL)",
    "CREATE TABLE IF NOT EXISTS session (id BLOB PRIMARY KEY, frames INTEGER NOT NULL, "
    "writer INTEGER, idle_since INTEGER, record BLOB) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS session_idle ON session (idle_since, frames)",
)
_MARKS: Final = "SELECT fence, number FROM session_page WHERE writer = ?"
_INSERT_PAGE: Final = "INSERT INTO session_page VALUES (?, ?, ?, ?, ?)"
_UPDATE_PAGE: Final = (
    "UPDATE session_page SET number = ?, used_at = ?, records = ? WHERE writer = ?"
)
_HOLD: Final = (
    "INSERT INTO session VALUES (?, ?, ?, NULL, NULL) ON CONFLICT (id) DO UPDATE "
    "SET writer = excluded.writer, idle_since = NULL, record = NULL"
)


class Page(NamedTuple):
    """A writer's page as it is, or is to be, in the file; number 0: it is not there yet."""

    writer: int
    fence: int
    number: int
    records: dict[int, Record]
    packed: dict[int, bytes]  # of the same


class SqlitePages:
    """The sessions as one writer has them; `most` of all writers together, by the clock `now`."""

    def __init__(self, most: int, now: Callable[[], float] = time.time) -> None:
        self._most = most
        self._now = now
        self._page = _new_page()
        self._has_tables = False
        self._word_at = 0.0  # when the page was written last
        self._expired_at = 0.0  # when what is too old was looked for last

    def write(self, db: sqlite3.Connection, before: int, work: Work) -> Page:
        """Writes what a commit changes of sessions, `before` being the total before it; gives back
        the page as it is then.

        Fenced where the page is not as it was left; sqlite3.Error.
        """
        if not self._has_tables:
            for statement in _TABLES:
                db.execute(statement)
        page, now = self._page, int(self._now())
        self._look(db)
        records, packed = page.records.copy(), page.packed.copy()
        for session_id, frames, offset in work.shares:
            record = records[session_id].after(frames, (before + offset) & TOTAL_MASK)
            records[session_id] = record
            packed[session_id] = record.packed()
        change = _Change(db, page.writer, records, now, self._most)
        if now - self._expired_at >= WORD_S:
            self._expired_at = now
            change.expire()
        change.grant(work.wishes)
        for session_id in {wish.session_id for wish in work.wishes}:
            packed.pop(session_id, None)
            if session_id in records:
                packed[session_id] = records[session_id].packed()
        number, data = page.number + 1, join(list(packed.values()))
        if page.number:
            db.execute(_UPDATE_PAGE, (number, now, data, page.writer))
        else:
            db.execute(_INSERT_PAGE, (page.writer, page.fence, number, now, data))
        return Page(page.writer, page.fence, number, records, packed)

    def adopt(self, page: Page) -> None:
        """The transaction has ended that wrote it."""
        self._page = page
        self._word_at = self._now()
        self._has_tables = True

    def doubt_tables(self) -> None:
        """Something failed: the tables are to be looked for again, as after a file was restored."""
        self._has_tables = False

    def is_written(self, db: sqlite3.Connection, page: Page) -> bool:
        """Whether the transaction that wrote it was made, by its number."""
        marks = _marks(db, page.writer)
        return marks is not None and marks[1] == page.number

    def give_word(self, db: sqlite3.Connection) -> None:
        """Says that this writer lives, where it has sessions and has not committed for long."""
        now = self._now()
        if self._page.records and now - self._word_at >= WORD_S:
            statement = "UPDATE session_page SET used_at = ? WHERE writer = ? AND fence = ?"
            db.execute(statement, (int(now), self._page.writer, self._page.fence))
            self._word_at = now

    def _look(self, db: sqlite3.Connection) -> None:
        """Fenced unless the page is as it was left; then what is there is this writer's page from
        now on, or a new one where that is not this writer's work."""
        page = self._page
        marks = _marks(db, page.writer)
        if marks == ((page.fence, page.number) if page.number else None):
            return
        mine = frozenset(page.records)
        if marks is None or marks[1] > page.number:
            self._page = _new_page()
            raise Fenced(mine)
        try:
            kept = _records(db, page.writer)
        except PageError:
            # A newer release has taken something out of it.
            self._page = _new_page()
            raise Fenced(mine) from None
        packed = {session_id: record.packed() for session_id, record in kept.items()}
        self._page = Page(page.writer, *marks, kept, packed)
        # Below: the file went back, and each client has to learn what was lost.
        raise Fenced(mine if marks[1] < page.number else mine - kept.keys())


class _Change:
    """What one transaction does to sessions; `records` are those of the writer's page."""

    def __init__(
        self, db: sqlite3.Connection, writer: int, records: dict[int, Record], now: int, most: int
    ) -> None:
        self._db = db
        self._writer = writer
        self._records = records
        self._now = now
        self._most = most
        self._frames: int | None = None  # of the page, or more
        self._others: dict[int, dict[int, Record]] = {}  # what is in other writers' pages
        self._thinned: set[int] = set()  # of those, the writers that lose a session
        self._room: tuple[int, int] | None = None  # how many more sessions, of how many frames

    def grant(self, wishes: list[Wish]) -> None:
        """Does what is wished."""
        for wish in wishes:
            if isinstance(wish, Claim):
                wish.evicted = 0
                wish.outcome = self._claim(wish)
            elif isinstance(wish, Park):
                self._park(wish.session_id)
            else:
                wish.applied = self._end(wish)
        for writer in self._thinned:
            self._db.execute(
                "UPDATE session_page SET fence = fence + 1, records = ? WHERE writer = ?",
                (pack(self._others[writer].values()), writer),
            )

    def expire(self) -> None:
        """Takes away what is too old, in rows of its own or in the page of a dead writer."""
        db, since = self._db, self._now - LIFE_S
        db.execute("DELETE FROM session WHERE idle_since <= ?", (since,))
        statement = "SELECT writer FROM session_page WHERE used_at <= ? AND writer <> ?"
        for (writer,) in db.execute(statement, (since, self._writer)).fetchall():
            db.execute("DELETE FROM session WHERE writer = ?", (writer,))
            db.execute("DELETE FROM session_page WHERE writer = ?", (writer,))

    def _claim(self, claim: Claim) -> Granted | Refused:
        hello = claim.hello
        try:
            writer, record = self._find(hello.session_id)
        except PageError:
            # A newer release has it. That is no reason to hold up everybody else's commit.
            return Refused.HELD
        if record is None:
            return self._open(claim) if hello.kind is Control.OPEN else Refused.UNKNOWN
        have = hello.value if hello.kind is Control.RESUME else 0
        applied = record.applied
        # Nothing is taken over by a hello that was late.
        if (hello.kind is Control.OPEN and applied) or have + record.window < applied:
            return Refused.UNKNOWN
        if writer is not None:
            del self._others[writer][record.session_id]
            self._thinned.add(writer)
        if have > applied:
            # What was answered is not in the total: the client has to learn it, and then knows more
            # than there is here.
            self._records.pop(record.session_id, None)
            self._forget(record.session_id)
            return Granted(applied, (), is_over=True)
        self._hold(record)
        return Granted(applied, record.runs_behind(have))

    def _find(self, session_id: int) -> tuple[int | None, Record | None]:
        """A session, and the other writer in whose page it is."""
        if session_id in self._records:
            return None, self._records[session_id]
        statement = "SELECT writer, idle_since, record FROM session WHERE id = ?"
        row = self._db.execute(statement, (session_id.to_bytes(16),)).fetchone()
        if row is None:
            return None, None
        writer, idle_since, data = row
        if writer is None:
            (record,) = unpack(data)
            return None, record if idle_since > self._now - LIFE_S else None
        if writer == self._writer:
            return None, None
        if writer not in self._others:
            self._others[writer] = _records(self._db, writer)
        return writer, self._others[writer].get(session_id)

    def _open(self, claim: Claim) -> Granted | Refused:
        hello = claim.hello
        # One of this id may be there that is too old.
        self._forget(hello.session_id)
        window = hello.value
        if self._frames is None:
            self._frames = sum([record.window for record in self._records.values()])
        if self._frames + window > PAGE_FRAMES:
            return Refused.NO_ROOM
        if not self._has_room(window):
            claim.evicted = self._make_room(window)
            if not self._has_room(window):
                return Refused.NO_ROOM
        sessions, frames = self._left()
        self._room = sessions - 1, frames - window
        self._frames += window
        self._hold(Record(hello.session_id, window))
        return Granted(0, ())

    def _left(self) -> tuple[int, int]:
        if self._room is None:
            statement = "SELECT count(*), total(frames) FROM session"
            ((count, frames),) = self._db.execute(statement)
            self._room = self._most - count, ALL_FRAMES - int(frames)
        return self._room

    def _has_room(self, window: int) -> bool:
        sessions, frames = self._left()
        return sessions > 0 and frames >= window

    def _make_room(self, window: int) -> int:
        """Has sessions give way that had no connection for longest; how many did."""
        self.expire()
        self._room = None
        evicted = 0
        statement = "SELECT id FROM session WHERE idle_since <= ? ORDER BY idle_since LIMIT ?"
        while not self._has_room(window):
            missing = max(1, 1 - self._left()[0])
            ids = self._db.execute(statement, (self._now - SPARE_S, missing)).fetchall()
            if not ids:
                break
            self._db.executemany("DELETE FROM session WHERE id = ?", ids)
            self._room = None
            evicted += len(ids)
        return evicted

    def _hold(self, record: Record) -> None:
        """Puts a session into the writer's page."""
        self._records[record.session_id] = record
        values = record.session_id.to_bytes(16), record.window, self._writer
        self._db.execute(_HOLD, values)

    def _park(self, session_id: int) -> None:
        record = self._records.pop(session_id, None)
        if record is not None:
            self._db.execute(
                "UPDATE session SET writer = NULL, idle_since = ?, record = ? WHERE id = ?",
                (self._now, pack([record]), session_id.to_bytes(16)),
            )

    def _end(self, end: End) -> int | None:
        record = self._records.pop(end.session_id, None)
        if record is None:
            return None
        self._forget(end.session_id)
        return record.applied

    def _forget(self, session_id: int) -> None:
        self._db.execute("DELETE FROM session WHERE id = ?", (session_id.to_bytes(16),))


def _new_page() -> Page:
    """The page of a writer that there never was."""
    return Page(random.SystemRandom().getrandbits(63), 0, 0, {}, {})


def _marks(db: sqlite3.Connection, writer: int) -> tuple[int, int] | None:
    """Fence and number of a writer's page."""
    row: tuple[int, int] | None = db.execute(_MARKS, (writer,)).fetchone()
    return row


def _records(db: sqlite3.Connection, writer: int) -> dict[int, Record]:
    """What is in a writer's page; nothing where there is none."""
    statement = "SELECT records FROM session_page WHERE writer = ?"
    row = db.execute(statement, (writer,)).fetchone()
    return {record.session_id: record for record in unpack(row[0])} if row else {}
