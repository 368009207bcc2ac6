"""The total in a SQLite file: durable, shared by the processes and servers of one machine.

An addition is one transaction in WAL mode with synchronous=FULL: it is on the disk before it is
answered. The total is kept as decimal text, because SQLite's integers are signed and what exceeds
them becomes a float in silence; a person reads it with

    sqlite3 counter.db 'SELECT total FROM counter'

Writers queue on a lock file beside the database, which the kernel hands on at once and takes from
a process that dies; SQLite's own waiting sleeps and tries again. The lock only keeps the queue:
exactness rests on one statement that replaces the total if it still is what it was.
"""

from __future__ import annotations

import fcntl
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Final
from urllib.parse import quote

from counter.totals.store import Found, InDoubt, Store, StoreAway, StoreError
from protocol import TOTAL_MASK

# Marks the file as this project's, in the field SQLite keeps for that; any fixed number would do.
APPLICATION_ID: Final = 0x436E7472  # "Cntr"
SCHEMA_VERSION: Final = 1

# How long another program, such as a backup, may hold SQLite's own lock before it is an outage.
BUSY_S: Final = 1.0

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

_SELECT: Final = "SELECT total FROM counter WHERE id = 1"
_REPLACE: Final = "UPDATE counter SET total = ? WHERE id = 1 AND total = ?"


class SqliteStore(Store):
    """The total in the file `path`; its calls block for as long as the disk takes."""

    blocks = True

    def __init__(self, path: str) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._lock = -1
        self._identity = (0, 0)
        self._look_at = 0.0
        self._last = 0  # the total after this process's last transaction, a guess at what it is
        self._doubted: tuple[int, int] | None = None  # total before and after the one in doubt

    def check(self, set_total: int | None = None, force: bool = False) -> Found:
        try:
            with self._creating():
                is_new = self._make(set_total or 0)
                if set_total is not None and not is_new:
                    self._overwrite(set_total, force)
                total = self.probe()
        except (sqlite3.Error, OSError, StoreAway) as error:
            raise StoreError(f"cannot use {self._path}: {_said(error)}{_remedy(error)}") from None
        return Found(total, is_new, "power loss: each is on the disk before it is answered")

    @contextmanager
    def _creating(self) -> Iterator[None]:
        """Alone with the file, whether or not it exists; refuses one that is not a total's."""
        if self._path and not os.path.isdir(os.path.dirname(self._path) or "."):
            raise StoreError(f"cannot use {self._path}: there is no such folder")
        if os.path.isdir(self._path):
            raise StoreError(f"cannot use {self._path}: it is a folder; name a file in it")
        if os.path.exists(self._path) and not os.path.isfile(self._path):
            raise StoreError(f"cannot use {self._path}: it is not a regular file; name another")
        if os.path.exists(self._path) and os.path.getsize(self._path):
            self._check_shape()
        self._lock = _open_lock(self._path)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _check_shape(self) -> None:
        """StoreError for a file of another kind; nothing is written to it or beside it."""
        # Reading another program's file in WAL mode would leave two new ones beside it, unless it
        # is read as it is; what is still in a WAL would be overlooked by that.
        in_use = os.path.exists(self._path + "-wal")
        try:
            with closing(_connect(self._path, "ro" if in_use else "ro&immutable=1")) as db:
                ((application,),) = db.execute("PRAGMA application_id")
                ((version,),) = db.execute("PRAGMA user_version")
                ((objects,),) = db.execute("SELECT count(*) FROM sqlite_master")
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_NOTADB:
                raise
            raise StoreError(
                f"cannot use {self._path}: it is not a SQLite database; name another file"
            ) from None
        if application == APPLICATION_ID and version > SCHEMA_VERSION:
            raise StoreError(
                f"cannot use {self._path}: a newer release wrote it (schema {version}, "
                f"this one reads {SCHEMA_VERSION})"
            )
        if application != APPLICATION_ID and (application or version or objects):
            raise StoreError(
                f"cannot use {self._path}: it is another program's database; name another file"
            )

    def _make(self, start: int) -> bool:
        """Makes the table unless it is there; true if it made it."""
        with closing(_connect(self._path, "rwc")) as db:
            ((application,),) = db.execute("PRAGMA application_id")
            if application == APPLICATION_ID:
                return False
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("BEGIN IMMEDIATE")
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
            raise StoreError(
                f"cannot set the total of {self._path} to {total:,}: it holds {before:,}; "
                "leave --setTotal out to go on from there, or add --force to overwrite it"
            )
        db.execute("UPDATE counter SET total = ? WHERE id = 1", (str(total),))

    def commit(self, amount: Callable[[], int]) -> int:
        assert self._doubted is None
        db = self._open()
        with self._queue(), self._errors():
            add = amount() & TOTAL_MASK
            if not add:
                return _total(db)
            before = self._last
            if not self._replace(db, before, (before + add) & TOTAL_MASK):
                before = _total(db)
                if not self._replace(db, before, (before + add) & TOTAL_MASK):
                    # Under the lock, so it was no writer of this project.
                    raise StoreAway("another program changes the total all the time")
            return before

    def settle(self) -> int | None:
        assert self._doubted is not None
        before, after = self._doubted
        db = self._open()
        with self._queue():
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
                if self._lock < 0:
                    self._lock = _open_lock(self._path)
                self._db = _connect(self._path, "rw")
                self._identity = found.st_dev, found.st_ino
                self._last = _total(self._db)
        except (sqlite3.Error, OSError) as error:
            raise StoreAway(_said(error)) from None
        if self._identity != (found.st_dev, found.st_ino):
            raise StoreAway(f"{self._path} was replaced while it was in use; start the server anew")
        self._look_at = now + LOOK_S
        return self._db


def _connect(path: str, mode: str) -> sqlite3.Connection:
    """An open database; the caller of a store is one thread at a time, not always the same."""
    db = sqlite3.connect(
        f"file:{quote(os.fsencode(path))}?mode={mode}",
        uri=True,
        timeout=BUSY_S,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        db.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error:
        db.close()
        raise
    return db


def _open_lock(path: str) -> int:
    return os.open(path + "-queue", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


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
