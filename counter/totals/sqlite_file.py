"""Whether a file may hold a total: where a path leads, and whose the file there is.

What is said of a path holds for the file that it leads to, so links are resolved before this is
asked. Nothing is written here, neither to a file nor beside it, but that SQLite may make the index
of a WAL which lies there without one. Each answer is the reason why not, in words, or nothing.
"""

from __future__ import annotations

import os
import re
import sqlite3
from contextlib import closing, suppress
from typing import Final
from urllib.parse import quote

# Marks the file as this project's, in the field SQLite keeps for that; any fixed number would do.
APPLICATION_ID: Final = 0x436E7472  # "Cntr"
SCHEMA_VERSION: Final = 1

# The shape of a database that nobody has written to: no mark, no version, no table.
EMPTY: Final = (0, 0, 0)

# So long is another program's lock waited for, as it begins or checkpoints a WAL.
BUSY_S: Final = 1.0


def wrong_place(path: str, file: str) -> str:
    """Why no database can be where `path` leads, which is `file`; nothing if it can."""
    folders = os.path.dirname(path) or ".", os.path.dirname(file)
    if path and not all(map(os.path.isdir, folders)):
        return "there is no such folder"
    if os.path.isdir(path):
        return "it is a folder; name a file in it"
    if os.path.islink(file):
        return "its links lead in a circle; name a file"
    if not os.path.exists(path):
        return ""
    if not os.path.isfile(path):
        return "it is not a regular file; name another"
    if not os.path.exists(file) or not os.path.samefile(path, file):
        return "the file that it leads to has no name; name another"
    if os.stat(file).st_nlink > 1:
        return (
            "the file has several names (hard links), and SQLite keeps what is newest beside "
            "the one that it is opened by; remove the others, or copy the file"
        )
    if _is_mounted(file):
        return (
            "it is mounted by itself, and SQLite keeps what is newest in files beside it; "
            "mount its folder"
        )
    return ""


def wrong_content(file: str) -> str:
    """Why a file is not a total's; nothing if it is, or is empty or not there."""
    if not os.path.exists(file) or not os.path.getsize(file):
        return _orphan_beside(file)
    # Reading another program's file in WAL mode would leave two new ones beside it, unless it is
    # read as it is. What that does not show, a WAL may, or it is written at this moment.
    try:
        shape = _read_shape(file, "ro&immutable=1")
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
            return "it is not a SQLite database; name another file"
        shape = EMPTY
    if shape == EMPTY:
        shape = _read_shape(file, "ro")
    return wrong_shape(shape)


def connect(path: str, mode: str, busy_s: float) -> sqlite3.Connection:
    """A database, open; another program's lock is waited for up to `busy_s`.

    Its caller is one thread at a time, not always the same.
    """
    return sqlite3.connect(
        f"file:{quote(os.fsencode(path))}?mode={mode}",
        uri=True,
        timeout=busy_s,
        isolation_level=None,
        check_same_thread=False,
    )


def _read_shape(path: str, mode: str) -> tuple[int, int, int]:
    with closing(connect(path, mode, BUSY_S)) as db:
        return shape_of(db)


def shape_of(db: sqlite3.Connection) -> tuple[int, int, int]:
    """What tells whose database it is: the application's mark, its version, how much is in it."""
    ((application,),) = db.execute("PRAGMA application_id")
    ((version,),) = db.execute("PRAGMA user_version")
    ((objects,),) = db.execute("SELECT count(*) FROM sqlite_master")
    return application, version, objects


def wrong_shape(shape: tuple[int, int, int]) -> str:
    """Why a database is not a total's; nothing if it is, or nobody's yet."""
    application, version, _ = shape
    if application == APPLICATION_ID and version > SCHEMA_VERSION:
        return f"a newer release wrote it (schema {version}, this one reads {SCHEMA_VERSION})"
    if application != APPLICATION_ID and shape != EMPTY:
        return "it is another program's database; name another file"
    return ""


def _orphan_beside(path: str) -> str:
    """Why no new database may be begun beside what is left of one; nothing if it may.

    SQLite would delete it as it makes the file.
    """
    for end in ("-wal", "-journal"):
        with suppress(FileNotFoundError), open(path + end, "rb") as file:
            # A journal says how many pages there were before: none, if it was a new database's.
            head = file.read(20)
            if head and (end == "-wal" or any(head[16:])):
                return (
                    f"{path}{end} is left of a database that is gone from there; "
                    "put that back, or remove what is left of it"
                )
    return ""


def _is_mounted(path: str) -> bool:
    """Whether a file is a mount of its own, as containers are given single files."""
    # The kernel writes these characters in octal, so that a line can be split.
    name = re.sub(rb"[ \t\n\\]", lambda found: b"\\%03o" % found[0][0], os.fsencode(path))
    try:
        with open("/proc/self/mountinfo", "rb") as mounts:
            return any(line.split()[4] == name for line in mounts)
    except OSError:
        return False
