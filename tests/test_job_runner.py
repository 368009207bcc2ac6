"""The worked example of docs/: killed at any moment, over connections that break, each job counts
once.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from itertools import accumulate
from pathlib import Path

from kit.cutting_proxy import Cut, CuttingProxy
from kit.harness import ROOT, wait_until
from kit.session_server import SessionServer, session_server

JOBS = 300


def runner(address: str, path: Path) -> subprocess.Popen[str]:
    """The example, started."""
    return subprocess.Popen(
        [sys.executable, "docs/job_runner.py", address, str(path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def fill(path: Path) -> None:
    """Jobs of many amounts."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE jobs (name TEXT PRIMARY KEY, amount INTEGER, total TEXT)")
        jobs = [(f"job-{number:04}", number % 7 + 1) for number in range(JOBS)]
        database.executemany("INSERT INTO jobs (name, amount) VALUES (?, ?)", jobs)


def is_killed(process: subprocess.Popen[str], server: SessionServer, due: int) -> bool:
    """Kills a runner when the total is as high; whether it had not ended by itself before."""
    wait_until(lambda: server.total >= due or process.poll() is not None, "it works")
    if process.poll() is None:
        process.kill()
    return process.wait() == -signal.SIGKILL


def finished(path: Path) -> list[tuple[int, int]]:
    """Amount and total of each job that has one, by the totals."""
    with closing(sqlite3.connect(path, timeout=20)) as database:
        rows = database.execute("SELECT amount, total FROM jobs WHERE total IS NOT NULL").fetchall()
    return sorted(((amount, int(total)) for amount, total in rows), key=lambda row: row[1])


def test_each_job_is_counted_once_through_kills_and_breaks(tmp_path: Path) -> None:
    chance = random.Random(3)
    path = tmp_path / "jobs"
    fill(path)
    with session_server() as server:
        cuts = [Cut(back=chance.randrange(300)) for _ in range(40)]
        with CuttingProxy(server.port, cuts) as proxy:
            kills = 0
            while len(finished(path)) < JOBS:
                process = runner(proxy.address, path)
                kills += is_killed(process, server, server.total + chance.randrange(5, 150))
                _, said = process.communicate()
                assert not said
            assert kills >= 3
            assert proxy.made >= 3
        rows = finished(path)
        assert [total for _, total in rows] == list(accumulate(amount for amount, _ in rows))
        assert server.total == sum(number % 7 + 1 for number in range(JOBS))


def test_a_database_has_one_runner(tmp_path: Path) -> None:
    path = tmp_path / "jobs"
    fill(path)
    with session_server() as server, server._lock:
        first = runner(server.address, path)
        wait_until(lambda: bool(server._peers), "it says hello")
        second = runner(server.address, path)
        _, said = second.communicate(timeout=20)
        assert second.returncode == 1
        assert "another job runner has it" in said
        first.kill()
        first.communicate()


def test_jobs_that_a_forgetful_server_leaves_in_doubt_are_named(tmp_path: Path) -> None:
    path = tmp_path / "jobs"
    fill(path)
    with session_server("forgets") as server:
        with CuttingProxy(server.port, [Cut(back=16 + 3)]) as proxy:
            process = runner(proxy.address, path)
            _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "['job-0000']" in said
    assert "does not know the session" in said
