"""PYTHONPATH=. python docs/job_runner.py HOST:PORT DATABASE: counts each job exactly once.

A worked example of an application that survives its own kill -9, its server's and both. Its work is
in a SQLite file: `INSERT INTO jobs (name, amount) VALUES ('one', 5)`, and in the end each job has
the total right after it. Run it as often as you like, after whatever happened: it goes on.

Why it is right: before a frame leaves, one transaction has written the state of the session, in
which each addition under way has the name of its job. So at any instant a job is finished, or is in
that state and the server knows whether it was counted, or was never sent. An application whose
additions come from many threads needs nothing more: the same transaction finishes what was settled
since the one before. An installed library is `from counter_client import ...`.
"""

from __future__ import annotations

import fcntl
import sqlite3
import sys
from collections.abc import Iterable
from contextlib import closing

from client import CounterClient, CounterError, OutcomeUnknown, SessionState, Settled

TABLES = """
CREATE TABLE IF NOT EXISTS jobs (name TEXT PRIMARY KEY, amount INTEGER NOT NULL, total TEXT);
CREATE TABLE IF NOT EXISTS session (id INTEGER PRIMARY KEY CHECK (id = 1), state TEXT NOT NULL);
"""


class Work:
    """The jobs and the session, in one database: what belongs together changes in one commit."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        database.execute("PRAGMA synchronous=FULL")
        database.executescript(TABLES)

    def unfinished(self) -> list[tuple[str, int]]:
        """Name and amount of each job that has no total."""
        jobs = self._database.execute("SELECT name, amount FROM jobs WHERE total IS NULL")
        return jobs.fetchall()

    def state(self) -> SessionState | None:
        """What a process before this one left."""
        row = self._database.execute("SELECT state FROM session").fetchone()
        return SessionState.from_text(row[0]) if row else None

    def keep(self, state: SessionState) -> None:
        """Writes down a state, and finishes what it tells of as settled."""
        with self._database:
            self._finish(state.settled)
            keep = "INSERT OR REPLACE INTO session (id, state) VALUES (1, ?)"
            self._database.execute(keep, (state.to_text(),))

    def finish(self, settled: Iterable[Settled]) -> None:
        """Writes down totals."""
        with self._database:
            self._finish(settled)

    def _finish(self, settled: Iterable[Settled]) -> None:
        # A total is text: SQLite's numbers end at 2^63.
        totals = [(str(each.total), each.name) for each in settled]
        self._database.executemany("UPDATE jobs SET total = ? WHERE name = ?", totals)


def run(address: str, work: Work) -> None:
    """Counts what is unfinished, whatever a process before this one left."""
    state = work.state()
    with CounterClient(address, 60, session=state or True, on_state=work.keep) as counter:
        work.finish(state.settled if state else ())
        work.finish(counter.settle())
        for name, amount in work.unfinished():
            total = counter.add(amount, name=name)
            work.finish([Settled(name, amount, total)])


def main(address: str, path: str) -> int:
    """The command; gives back its exit code."""
    with open(f"{path}.lock", "w") as lock, closing(sqlite3.connect(path)) as database:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path}: another job runner has it", file=sys.stderr)
            return 1
        work = Work(database)
        try:
            run(address, work)
        except OutcomeUnknown as error:
            pending = work.state()
            names = [each.name for each in pending.pending] if pending else []
            print(f"look at these yourself, then delete the session: {names}", file=sys.stderr)
            print(error, file=sys.stderr)
            return 1
        except CounterError as error:
            print(f"{error}; run it again", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
