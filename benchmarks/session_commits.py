"""Question: what does a session cost a commit to a SQLite file, beside the commit itself?

Command: .venv/bin/python benchmarks/session_commits.py [--rounds N]
It takes some seconds and prints a Markdown table.

One writer commits by itself, one frame of each session, on a file in memory, so that the disk is
not what is measured. "Plain" is the same addition without a session. Each figure is the median of
the rounds, which take all cases in turn; sessions have as many runs as their window has frames, as
they do after a while.

Invalid if: other work runs on this CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from counter.totals.session_store import Claim, Work
from counter.totals.sqlite import SqliteStore
from protocol import Control, Hello

COMMITS: Final = 200
CASES: Final = [(40, 1), (40, 64), (200, 1), (200, 64)]  # sessions, frames of their windows


class Writer:
    """A store with so many sessions."""

    def __init__(self, folder: str, sessions: int, window: int) -> None:
        self.store = SqliteStore(f"{folder}/{sessions}-{window}.db")
        self.store.check()
        self.sessions = sessions
        ids = range(1, sessions + 1)
        self.shares = [(i, 1, i) for i in ids]
        claims = [Claim(Hello(i, Control.OPEN, window)) for i in ids]
        self.store.commit_work(lambda: Work(0, [], [*claims]))
        self.commit_us(True, 100)

    def commit_us(self, has_sessions: bool, commits: int = COMMITS) -> float:
        """Microseconds that a commit takes."""
        shares = self.shares if has_sessions else []
        began = time.perf_counter()
        for _ in range(commits):
            self.store.commit_work(lambda: Work(self.sessions, shares))
        return (time.perf_counter() - began) / commits * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="What a session costs a commit.")
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        writers = [Writer(folder, *case) for case in CASES]
        taken = [[(w.commit_us(False), w.commit_us(True)) for w in writers] for _ in range(rounds)]
    print("| sessions | window | plain | with them | a session |")
    print("|---|---|---|---|---|")
    for at, (sessions, window) in enumerate(CASES):
        plain, full = (median(row[at][i] for row in taken) for i in (0, 1))
        each = (full - plain) / sessions
        print(f"| {sessions} | {window} | {plain:.0f} us | {full:.0f} us | {each:.1f} us |")


if __name__ == "__main__":
    main()
