"""The total in a SQLite file: durable, shared by the processes and servers of one machine.

An addition is one transaction in WAL mode with synchronous=FULL: it is on the disk before it is
answered. Both are set and looked at whenever the file is opened, since a copy may have lost them.
The total is kept as decimal text, because SQLite's integers are signed and what exceeds them
becomes a float in silence; a person reads it with

    sqlite3 counter.db 'SELECT total FROM counter'

Writers queue on a lock file beside the database, which the kernel hands on at once and takes from
a process that dies; SQLite's own waiting sleeps and tries again. The lock only keeps the queue:
exactness rests on one statement that replaces the total if it still is what it was.

Links are resolved before anything is looked for or made, so that two names of one file have one
queue. Whether a file may be used at all is in sqlite_file.py.
"""

from __future__ import annotations

import fcntl
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Final, NamedTuple

from counter.totals.session_store import Fenced, SessionStore, Work
from counter.totals.sqlite_file import (
    APPLICATION_ID,
    EMPTY,
    SCHEMA_VERSION,
    connect,
    shape_of,
    wrong_content,
    wrong_place,
    wrong_shape,
)
from counter.totals.sqlite_sessions import Page, SqlitePages
from counter.totals.store import (
    Found,
    InDoubt,
    StoreAway,
    StoreError,
    counts_already,
)
from protocol import TOTAL_MASK

# How long another program, such as a backup, may hold SQLite's own lock before it is an outage.
BUSY_S: Final = 1.0

# SQLite begins its WAL anew at 4 MB; a reader that stays makes it longer, and a commit after it has
# gone cuts it to this, which leaves alone what is usual.
WAL_LIMIT_BYTES: Final = 6 << 20

# How often the file at the path is compared with the one that is open.
LOOK_S: Final = 1.0

# I/O errors, of which a transaction may have reached the disk all the same, are of this primary
# code; those of the memory file that writers share come before a transaction writes anything.
_IO_ERROR: Final = 10
_BEFORE_WRITING: Final = {
    sqlite3.SQLITE_IOERR_SHMOPEN,
    sqlite3.SQLITE_IOERR_SHMSIZE,
    sqlite3.SQLITE_IOERR_SHMLOCK,
    sqlite3.SQLITE_IOERR_SHMMAP,
}

# The sessions of a store that nobody told otherwise.
MOST_SESSIONS: Final = 10_000

FULL: Final = 2  # SQLite's number for synchronous=FULL

_SELECT: Final = "SELECT total FROM counter WHERE id = 1"
_REPLACE: Final = "UPDATE counter SET total = ? WHERE id = 1 AND total = ?"


class _WorkInDoubt(NamedTuple):
    """A commit that changes sessions too, of which nobody knows whether it was made."""

    before: int
    after: int
    page: Page
    work: Work


class SqliteStore(SessionStore):
    """The total in the file `path`; its calls block for as long as the disk takes."""

    blocks = True

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = path  # what it leads to, when it was last looked for
        self._db: sqlite3.Connection | None = None
        self._lock = -1
        self._identity = (0, 0)
        self._beside: list[tuple[int, int]] = []
        self._look_at = 0.0
        self._last = 0  # the total after this process's last transaction, a guess at what it is
        # The commit in doubt; of one without sessions the total before and after it.
        self._doubted: tuple[int, int] | _WorkInDoubt | None = None
        self._pages = SqlitePages(MOST_SESSIONS)

    def check(self, set_total: int | None = None, force: bool = False) -> Found:
        try:
            with self._creating():
                is_new = self._make(set_total or 0)
                if set_total is not None and not is_new:
                    self._overwrite(set_total, force)
                total = self.probe()
        except (sqlite3.Error, OSError, StoreAway) as error:
            raise StoreError(self._refusal(f"{_said(error)}{_remedy(error)}")) from None
        return Found(total, is_new, "power loss: each is on the disk before it is answered")

    @contextmanager
    def _creating(self) -> Iterator[None]:
        """Alone with the file, whether or not it exists; refuses one that is not a total's."""
        self._file = os.path.realpath(self._path)
        wrong = wrong_place(self._path, self._file) or wrong_content(self._file)
        if wrong:
            raise StoreError(self._refusal(wrong))
        self._keep_queue()
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _refusal(self, why: str) -> str:
        leads = f", which leads to {self._file}" if os.path.islink(self._path) else ""
        return f"cannot use {self._path}{leads}: {why}"

    def _make(self, start: int) -> bool:
        """Makes the table unless it is there; true if it made it."""
        with closing(connect(self._file, "rwc", BUSY_S)) as db:
            db.execute("BEGIN IMMEDIATE")
            shape = shape_of(db)  # again, as another program may have begun with it meanwhile
            if wrong := wrong_shape(shape):
                raise StoreError(self._refusal(wrong))
            if shape != EMPTY:
                return False
            db.execute(
                "CREATE TABLE counter (id INTEGER PRIMARY KEY CHECK (id = 1), total TEXT NOT NULL)"
            )
            db.execute("INSERT INTO counter VALUES (1, ?)", (str(start),))
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            db.execute("COMMIT")
        return True

    def _overwrite(self, total: int, force: bool) -> None:
        db = self._open()
        before = _total(db)
        if not force:
            raise StoreError(self._refusal(counts_already(before, total)))
        db.execute("UPDATE counter SET total = ? WHERE id = 1", (str(total),))

    def commit(self, amount: Callable[[], int]) -> int:
        assert self._doubted is None
        db = self._open()
        with self._queue(), self._errors():
            return self._add(db, amount())

    def keep_sessions(self, most: int) -> None:
        self._pages = SqlitePages(most)

    def commit_work(self, take: Callable[[], Work]) -> int:
        assert self._doubted is None
        db = self._open()
        with self._queue(), self._errors():
            work = take()
            if not (work.shares or work.wishes):
                return self._add(db, work.amount)
            return self._do(db, work)

    def settle(self) -> int | None:
        assert self._doubted is not None
        db = self._open()
        with self._queue():
            if isinstance(self._doubted, _WorkInDoubt):
                return self._settle_work(db, self._doubted)
            before, after = self._doubted
            try:
                now = _total(db)
                made = now == after or (now == before and self._replace(db, before, after))
            except sqlite3.Error as error:
                raise InDoubt(_said(error)) from None
            self._doubted = None
            return before if made else None

    def read(self) -> int:
        db = self._open()
        with self._errors():
            return _total(db)

    def probe(self) -> int:
        db = self._open()
        with self._queue(), self._errors():
            # A write, since a full disk can still be read. Not of the total: a row that is replaced
            # by the same is not written.
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            self._pages.give_word(db)
            return _total(db)

    def close(self) -> None:
        if self._db is not None:
            with suppress(sqlite3.Error):
                self._db.close()
            self._db = None
        self._doubted = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _add(self, db: sqlite3.Connection, amount: int) -> int:
        """Adds to the total alone; gives back the total before."""
        add = amount & TOTAL_MASK
        if not add:
            return _total(db)
        before = self._last
        if not self._replace(db, before, (before + add) & TOTAL_MASK):
            before = _total(db)
            if not self._replace(db, before, (before + add) & TOTAL_MASK):
                # Under the lock, so it was no writer of this project.
                raise StoreAway("another program changes the total all the time")
        return before

    def _do(self, db: sqlite3.Connection, work: Work) -> int:
        """One transaction: total and sessions change together; gives back the total before."""
        try:
            db.execute("BEGIN IMMEDIATE")
            before = _total(db)
            after = (before + work.amount) & TOTAL_MASK
            page = self._pages.write(db, before, work)
            if after != before:
                db.execute("UPDATE counter SET total = ? WHERE id = 1", (str(after),))
            self._doubted = _WorkInDoubt(before, after, page, work)
            db.execute("COMMIT")
        except sqlite3.Error:
            self._pages.doubt_tables()
            raise
        finally:
            if db.in_transaction:
                with suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
        self._done(page, after)
        return before

    def _done(self, page: Page, after: int) -> None:
        self._doubted = None
        self._pages.adopt(page)
        self._last = after

    def _settle_work(self, db: sqlite3.Connection, doubted: _WorkInDoubt) -> int:
        """Looks whether a commit in doubt was made, and makes it otherwise; InDoubt, Fenced."""
        try:
            if self._pages.is_written(db, doubted.page):
                self._done(doubted.page, doubted.after)
                return doubted.before
            return self._do(db, doubted.work)
        except Fenced:
            self._doubted = None
            raise
        except (sqlite3.Error, StoreAway) as error:
            raise InDoubt(_said(error)) from None

    def _replace(self, db: sqlite3.Connection, before: int, after: int) -> bool:
        """One transaction: the total becomes `after` if it is `before`; whether it was."""
        self._doubted = before, after
        done = db.execute(_REPLACE, (str(after), str(before))).rowcount == 1
        self._doubted = None
        if done:
            self._last = after
        return done

    @contextmanager
    def _queue(self) -> Iterator[None]:
        """This writer's turn. An addition in doubt keeps it: nobody adds until it is settled."""
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if self._doubted is None:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Tells what became of a transaction that failed, which SQLite rolled back unless the
        disk itself failed."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) or 0
            if self._doubted and code & 0xFF == _IO_ERROR and code not in _BEFORE_WRITING:
                raise InDoubt(_said(error)) from None
            self._doubted = None
            raise StoreAway(_said(error)) from None

    def _open(self) -> sqlite3.Connection:
        """The open database, for as long as the path still leads to it; StoreAway otherwise."""
        now = time.monotonic()
        if self._db is not None and now < self._look_at:
            return self._db
        try:
            found = os.stat(self._path)
            if self._db is None:
                self._file = os.path.realpath(self._path)
                self._db, self._last = _open_total(self._file)
                self._identity = found.st_dev, found.st_ino
                self._beside = _identities_beside(self._file)
            self._keep_queue()
            beside = _identities_beside(self._file)
        except (sqlite3.Error, OSError) as error:
            raise StoreAway(_said(error)) from None
        if self._identity != (found.st_dev, found.st_ino):
            raise StoreAway(f"{self._path} was replaced while it was in use; start the server anew")
        if self._beside != beside:
            # Who opens the file from now on sees nothing of this WAL, unless it is in the file.
            with suppress(sqlite3.Error):
                self._db.execute("PRAGMA wal_checkpoint")
            raise StoreAway(
                f"{self._file}-wal or -shm was removed while it was in use; start the server anew"
            )
        self._look_at = now + LOOK_S
        return self._db

    def _keep_queue(self) -> None:
        """Opens the lock file, anew where it was removed: the other writers queue at the new one.

        An addition in doubt keeps the turn that it has.
        """
        if self._doubted is not None:
            return
        name = self._file + "-queue"
        if self._lock >= 0:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._lock), os.stat(name)):
                    return
        before, self._lock = self._lock, os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if before >= 0:
            os.close(before)


def _identities_beside(file: str) -> list[tuple[int, int]]:
    """What the two files are that SQLite keeps beside a database, without those that are gone."""
    found = []
    for end in ("-wal", "-shm"):
        with suppress(FileNotFoundError):
            stat = os.stat(file + end)
            found.append((stat.st_dev, stat.st_ino))
    return found


def _open_total(path: str) -> tuple[sqlite3.Connection, int]:
    """A database that keeps what is answered, and the total in it; StoreAway."""
    db = connect(path, "rw", BUSY_S)
    try:
        _make_durable(db)
        return db, _total(db)
    except BaseException:
        db.close()
        raise


def _make_durable(db: sqlite3.Connection) -> None:
    """Sets what the promise rests on; StoreAway if it is not so then."""
    try:
        ((mode,),) = db.execute("PRAGMA journal_mode = WAL")
    except sqlite3.Error as error:
        raise StoreAway(f"it cannot be put into WAL mode: {error}") from None
    db.execute("PRAGMA synchronous = FULL")
    ((synchronous,),) = db.execute("PRAGMA synchronous")
    if (mode, synchronous) != ("wal", FULL):
        raise StoreAway(
            f"SQLite keeps it in journal mode {mode} with synchronous {synchronous}, where WAL and "
            f"{FULL} (FULL) are needed; on the file system of a network that cannot be"
        )
    db.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")


def _total(db: sqlite3.Connection) -> int:
    row = db.execute(_SELECT).fetchone()
    text = row[0] if row else None
    # No zeros before it: _REPLACE compares the text.
    plain = isinstance(text, str) and re.fullmatch("0|[1-9][0-9]{0,19}", text)
    if not plain or int(plain[0]) > TOTAL_MASK:
        raise StoreAway(f"it holds {text!r} where its total should be")
    return int(plain[0])


def _said(error: Exception) -> str:
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    return str(error)


def _remedy(error: Exception) -> str:
    text = str(error).lower()
    if "readonly" in text or "unable to open" in text or isinstance(error, PermissionError):
        return "; the file and its folder must be writable, SQLite keeps two files beside it"
    if "full" in text or "no space" in text:
        return "; free some space"
    return ""
