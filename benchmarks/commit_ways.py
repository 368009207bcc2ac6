"""Question: where is a commit best made: in the loop's own thread, in gevent's thread pool, or in
the native thread that serving/store_calls.py has? And what does handing it over cost?

Command: .venv/bin/python benchmarks/commit_ways.py [--rounds N] [--seconds S] [--directory DIR]
It takes half a minute and prints a Markdown table.

Three servers run at the same time, each with a SQLite file of its own in one directory and on one
CPU. They differ in the class that calls the store, which this program puts in the place of
store_calls' before it becomes server.py. In each round one generator loads them in turn, every
second round in the opposite order; ratios are taken within a round.

"A commit takes" is the mean time from its start by the loop to its end in the loop; "of it SQLite"
the part that the store's own call takes, which includes waiting for the interpreter's lock after
the disk has answered. Both are counted in the warm-up too.

Invalid if: the directory is in memory (it then says so), or other work runs.
"""

from __future__ import annotations

import argparse
import mmap
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

import disk
import measure
import peers
from measure import RunError
from peers import Peer, PeerError, Running
from results import Case, Results, markdown_table, rate_text, ratio_text, three_digits, time_text

sys.path.insert(0, str(peers.ROOT))

from counter.serving import group_commit, store_calls

CASES: Final = (
    Case("40", "40 connections", (), ("native", "pool", "loop")),
    Case("400", "400 connections", ("--connections", "400"), ("native", "pool", "loop")),
)
BASE: Final = "native"
NAMES: Final = {
    "native": "a native thread (this server)",
    "pool": "gevent's ThreadPool",
    "loop": "the loop's thread",
}


# --- the ways; each stands where store_calls.ThreadCaller does ---


class LoopCaller(store_calls.StoreCaller):
    """Calls the store in the loop's thread, which serves nobody meanwhile."""

    def __init__(self, on_end: store_calls.OnEnd, last: Callable[[], None]) -> None:
        self._on_end, self._last = on_end, last

    def run(self, call: store_calls.Call) -> None:
        self._on_end(*store_calls.attempt(call))

    def close(self) -> None:
        self._last()


class PoolCaller(store_calls.StoreCaller):
    """Calls the store in the one thread of a gevent ThreadPool."""

    def __init__(self, on_end: store_calls.OnEnd, last: Callable[[], None]) -> None:
        from gevent.threadpool import ThreadPool

        self._on_end, self._last = on_end, last
        self._pool: Any = ThreadPool(1)

    def run(self, call: store_calls.Call) -> None:
        spawned = self._pool.spawn(store_calls.attempt, call)
        spawned.rawlink(lambda ended: self._on_end(*ended.value))

    def close(self) -> None:
        self._pool.spawn(self._last)


CALLERS: Final[Mapping[str, Any]] = {
    "native": store_calls.ThreadCaller,
    "pool": PoolCaller,
    "loop": LoopCaller,
}


# --- what is counted in the server, and read from outside: doubles in a shared file ---

COMMITS, REQUESTS, WHOLE_S, STORE_S = range(4)
TALLY_BYTES: Final = 4 * 8


def open_tally(file: Path) -> memoryview[float]:
    """The four sums in a file, which every process that opens it shares."""
    with file.open("r+b") as opened:
        return memoryview(mmap.mmap(opened.fileno(), TALLY_BYTES)).cast("d")


def count_commits(tally: memoryview[float]) -> None:
    """Has every commit of this process counted, and timed with and without its handing over."""
    group_class: Any = group_commit.GroupCommit
    call, succeed = group_class._commit_or_probe, group_class._succeed

    def timed_call(group: Any) -> Any:
        started_s = time.monotonic()
        try:
            return call(group)
        finally:
            tally[STORE_S] += time.monotonic() - started_s

    def counted_succeed(group: Any, before: int | None, took_s: float) -> None:
        tally[WHOLE_S] += took_s
        tally[COMMITS] += 1
        tally[REQUESTS] += len(group._waiting._under_way)  # with one frame in flight
        succeed(group, before, took_s)

    group_class._commit_or_probe, group_class._succeed = timed_call, counted_succeed


def serve(way: str, tally: Path, flags: Sequence[str]) -> int:
    """Is server.py with another caller of its store."""
    import server  # here, so that the comparison itself stays without a loop

    store_calls.ThreadCaller = CALLERS[way]  # type: ignore[misc]
    count_commits(open_tally(tally))
    return server.main(flags)


# --- the comparison ---


@dataclass
class Comparison:
    """One under way; `commits` has a run's four sums, by case and way."""

    directory: Path
    generator: Path
    cpus: peers.Cpus
    results: Results
    running: dict[str, Running] = field(default_factory=dict)
    commits: dict[tuple[str, str], list[list[float]]] = field(default_factory=dict)


def make_peer(way: str, directory: Path) -> Peer:
    tally = directory / f"{way}.tally"
    tally.write_bytes(bytes(TALLY_BYTES))
    flags = ["--port", "0", "--multiplier", str(peers.MULTIPLIER), "--processes", "1"]
    flags += ["--store", f"sqlite:{directory / way}.db"]
    return Peer([sys.executable, __file__, "--serve", way, str(tally), *flags])


def run_round(comparison: Comparison, number: int) -> None:
    for case in CASES:
        for way in case.peers if number % 2 else reversed(case.peers):
            sums = open_tally(comparison.directory / f"{way}.tally")
            before = list(sums)
            measurement = measure.load(
                comparison.generator,
                comparison.running[way],
                case.flags,
                comparison.results.seconds,
                comparison.cpus.generator,
            )
            grown = [now - then for now, then in zip(sums, before, strict=True)]
            comparison.results.add(case.key, way, number, measurement)
            comparison.commits.setdefault((case.key, way), []).append(grown)


def table(comparison: Comparison) -> list[str]:
    """One row for each case and way, as a Markdown table."""
    header = ["case", "commits are made in", "requests/s", "of the native thread"]
    header += ["requests a commit", "a commit takes", "of it SQLite"]
    header += ["server CPU us/request", "p50", "p99"]
    rows = []
    for case in CASES:
        for place, way in enumerate(case.peers):
            rows.append(
                [case.title if place == 0 else "", NAMES[way], *_cells(comparison, case, way)]
            )
    return markdown_table(header, rows)


def _cells(comparison: Comparison, case: Case, way: str) -> list[str]:
    results, runs = comparison.results, comparison.commits[case.key, way]
    cpu_us = results.median(case.key, way, lambda run: run.cpu_us)
    return [
        rate_text(results.rates(case.key, way)),
        ratio_text(results.ratios(case.key, way, BASE)),
        three_digits(median(run[REQUESTS] / run[COMMITS] for run in runs)),
        time_text(median(run[WHOLE_S] / run[COMMITS] for run in runs) * 1e6),
        time_text(median(run[STORE_S] / run[COMMITS] for run in runs) * 1e6),
        "-" if cpu_us is None else three_digits(cpu_us),
        time_text(results.median(case.key, way, lambda run: run.p50_us)),
        time_text(results.median(case.key, way, lambda run: run.p99_us)),
    ]


def compare(directory: Path, rounds: int, seconds: float) -> list[str]:
    """The table; PeerError or RunError if something cannot be measured."""
    generator = peers.compile_c("generator.c", directory)
    results = Results(rounds, seconds)
    comparison = Comparison(directory, generator, peers.choose_cpus(), results)
    with ExitStack() as stack:
        for way in CALLERS:
            started = peers.started(
                make_peer(way, directory), comparison.cpus.server, directory / f"{way}.log"
            )
            comparison.running[way] = stack.enter_context(started)
        for number in range(1, rounds + 1):
            run_round(comparison, number)
    return table(comparison)


def main() -> int:
    if sys.argv[1:2] == ["--serve"]:
        return serve(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(description="Ways to make a commit, in rounds.")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="of each run; default: 1"
    )
    parser.add_argument("--directory", type=disk.directory, metavar="DIR", help="on a disk")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    place = arguments.directory or disk.choose_directory()
    with tempfile.TemporaryDirectory(prefix="counter-benchmarks-", dir=place) as name:
        print(f"SQLite's files are on {disk.description(Path(name))}.\n")
        try:
            lines = compare(Path(name), arguments.rounds, arguments.seconds)
        except (PeerError, RunError) as error:
            sys.stderr.write(f"commit_ways.py: {error}\n")
            return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
