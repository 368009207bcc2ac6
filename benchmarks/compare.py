"""Question: how fast is this server beside the fastest that could be, and beside what people would
use instead, at the same work, on the same machine, in the same minutes?

Command: make bench, or python benchmarks/compare.py [--rounds N] [--seconds S] [--only CASE ...]
The whole of it takes about ten minutes and writes docs/benchmarks.md and docs/benchmarks.svg;
with --only it prints its tables and writes nothing. Files are made in a temporary directory, which
has to be on a disk; --directory says where.

Every server is started once, on one CPU, and stays; the load generator has another CPU. In each
round every case is run against every server that takes part in it, one after the other, every
second round in the opposite order. So a drift of the machine touches all alike, and ratios are
taken within a round.

Invalid if: other work ran meanwhile (neither server nor generator was busy then: the table has
both); the generator was fully busy and the server was not (then the rate is the generator's, and
the CPU time per request is what to read); there are fewer than two CPUs, or no disk for what is to
be durable (it then says so).
"""

from __future__ import annotations

import argparse
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import disk
import measure
import page
import peers
from cases import (
    CASES,
    EVERY,
    EVERYWHERE,
    IDLE,
    IDLE_CONNECTIONS,
    IDLE_FIRST,
    IDLE_SETTLE_S,
    NAMES,
    OWN,
    PAIR,
    PAIR_CONNECTIONS,
    PLAIN_ENGINE,
    make_peer,
)
from measure import GRACE_S, WARMUP_S, RunError
from peers import Cpus, Peer, PeerError, Running
from results import Case, Measurement, Results, amount_text


@dataclass
class Bench:
    """One comparison under way."""

    directory: Path  # for programs, logs and what is durable; temporary
    cpus: Cpus
    cases: Sequence[Case]
    results: Results
    generator: Path | None = None
    go_client: Path | None = None
    peers: dict[str, Peer] = field(default_factory=dict)
    running: dict[str, Running] = field(default_factory=dict)
    failed: set[tuple[str, str]] = field(default_factory=set)  # case and peer: not run again

    def skip(self, what: str, why: object) -> None:
        self.results.skipped.append(f"{what}: {why}")
        note(f"skipped {what}: {why}")

    def fail(self, case: str, peer: str, why: object) -> None:
        self.failed.add((case, peer))
        self.results.failures.append(f"{NAMES[peer]}, {case}: {why}")
        note(f"FAILED {self.results.failures[-1]}")


def note(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


# --- who takes part ---


def gather(bench: Bench) -> None:
    """Compiles the load generators and finds out which of the wanted peers there are."""
    try:
        bench.generator = peers.compile_c("generator.c", bench.directory)
    except PeerError as error:
        bench.skip("everything but the pairs, which need no load generator", error)
        bench.cases = [case for case in bench.cases if case is PAIR]
    wanted = dict.fromkeys(peer for case in bench.cases for peer in case.peers)
    for key in wanted:
        try:
            bench.peers[key] = make_peer(key, bench.directory)
            if key == "go_pair":
                bench.go_client = peers.compile_go("peer_client.go", bench.directory)
        except PeerError as error:
            bench.skip(NAMES[key], error)


def start_peer(bench: Bench, key: str, stack: ExitStack) -> Running:
    """Starts a server and what is behind it; PeerError if one of them does not come up."""
    peer = bench.peers[key]
    cpus = bench.cpus.all if key in EVERYWHERE else bench.cpus.server
    log = bench.directory / f"{key}.log"
    if peer.behind is not None:
        behind_log = bench.directory / f"{key}-behind.log"
        stack.enter_context(peers.started(peer.behind, bench.cpus.behind, behind_log))
    bench.running[key] = stack.enter_context(peers.started(peer, cpus, log))
    return bench.running[key]


def start_peers(bench: Bench, stack: ExitStack) -> None:
    """Starts every server that the rounds need; one that does not come up is left out."""
    needed = {peer for case in bench.cases if case is not IDLE for peer in case.peers}
    for key in [key for key in bench.peers if key in needed]:
        try:
            start_peer(bench, key, stack)
        except PeerError as error:
            if key in OWN:
                bench.fail("start", key, error)
            else:
                bench.skip(NAMES[key], error)


# --- one run ---


def run_case(bench: Bench, case: Case, running: Running) -> Measurement:
    assert bench.generator is not None
    seconds = bench.results.seconds * case.length
    return measure.load(bench.generator, running, case.flags, seconds, bench.cpus.generator)


def run_pair(bench: Bench, key: str, running: Running) -> Measurement:
    seconds = bench.results.seconds
    if key == "go_pair":
        command = [str(bench.go_client), "--port", str(running.port)]
        command += ["--seconds", str(seconds), "--warmup", str(WARMUP_S)]
    else:
        command = [sys.executable, str(peers.ROOT / "client.py"), "--json", "-"]
        command += ["--serverAddress", f"127.0.0.1:{running.port}"]
        command += ["--duration", f"{seconds}s", "--warmup", f"{WARMUP_S}s"]
        if key != "pair_default":
            command += ["--processes", "1"]
        if key == "pair_plain":
            command += PLAIN_ENGINE
    command += ["--connections", str(PAIR_CONNECTIONS)]
    result = measure.run_json(command, bench.cpus.all, WARMUP_S + seconds + GRACE_S)
    return Measurement(rate=result["requests_per_s"])


def run_round(bench: Bench, number: int) -> None:
    for case in bench.cases:
        if case is IDLE:
            continue
        rates = []
        for key in case.peers if number % 2 else reversed(case.peers):
            if key not in bench.running or (case.key, key) in bench.failed:
                continue
            running = bench.running[key]
            try:
                if case is PAIR:
                    measurement = run_pair(bench, key, running)
                else:
                    measurement = run_case(bench, case, running)
            except RunError as error:
                bench.fail(case.key, key, error)
                continue
            bench.results.add(case.key, key, number, measurement)
            rates.append(f"{NAMES[key]} {amount_text(measurement.rate)}")
        note(f"round {number} of {bench.results.rounds}, {case.key}: {'; '.join(rates)}")


# --- memory ---


@contextmanager
def held(bench: Bench, key: str, connections: int) -> Iterator[None]:
    """So many connections, each with one addition behind it, open and idle in the block.

    RunError if they cannot be opened; a wrong total at their end is noted as a failure.
    """
    assert bench.generator is not None
    flags = [*IDLE.flags, "--connections", str(connections)]
    process = subprocess.Popen(
        measure.generator_command(bench.generator, bench.running[key], flags),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: peers.prepare_child(bench.cpus.generator),
    )
    assert process.stdout is not None
    try:
        if not process.stdout.readline():
            raise RunError("the connections could not be opened")
        yield
    finally:
        _, said = process.communicate(timeout=GRACE_S)
        if process.returncode != 0:
            bench.fail(IDLE.key, key, said.strip())


def measure_idle(bench: Bench) -> None:
    """What a connection costs each server's processes: of two numbers of them, the difference.

    The servers are new ones, as one that has served before has memory to use again. All wait at the
    same time.
    """
    with ExitStack() as stack:
        first_bytes = {}
        for key in [key for key in IDLE.peers if key in bench.peers]:
            try:
                running = start_peer(bench, key, stack)
                with held(bench, key, IDLE_FIRST):
                    before_bytes = running.resident_bytes()
                stack.enter_context(held(bench, key, IDLE_FIRST + IDLE_CONNECTIONS))
                first_bytes[key] = before_bytes
            except (PeerError, RunError) as error:
                bench.fail(IDLE.key, key, error)
        time.sleep(IDLE_SETTLE_S)
        for key, before_bytes in first_bytes.items():
            grown_bytes = bench.running[key].resident_bytes() - before_bytes
            bench.results.idle_bytes[key] = grown_bytes / IDLE_CONNECTIONS


# --- the whole ---


def run_all(bench: Bench) -> None:
    gather(bench)
    with ExitStack() as stack:
        start_peers(bench, stack)
        for number in range(1, bench.results.rounds + 1):
            run_round(bench, number)
    if IDLE in bench.cases:
        measure_idle(bench)


def write_page(
    bench: Bench, tables: Sequence[str], facts: Sequence[str], took_s: float, output: Path
) -> None:
    """Writes the page and, if matplotlib is there, the plot."""
    output.mkdir(parents=True, exist_ok=True)
    picture = output / "benchmarks.svg"
    picture.unlink(missing_ok=True)  # an old one would show other numbers than the page
    if bench.generator is not None:
        try:
            page.draw(bench.results, CASES, NAMES, picture)
        except ImportError:
            bench.skip("the plot", "matplotlib is not installed")
    command = shlex.join(["python", "benchmarks/compare.py", *sys.argv[1:]])
    text = page.page(bench.results, tables, facts, command, took_s, picture.exists())
    (output / "benchmarks.md").write_text(text)
    note(f"wrote {output / 'benchmarks.md'}")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="This server beside others, in rounds.")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.6,
        metavar="S",
        help="measured, of each run; default: 0.6",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[case.key for case in EVERY],
        metavar="CASE",
        help=f"only these, and write no page: {', '.join(case.key for case in EVERY)}",
    )
    parser.add_argument(
        "--output", type=Path, default=peers.ROOT / "docs", metavar="DIR", help="default: docs"
    )
    parser.add_argument(
        "--directory",
        type=disk.directory,
        metavar="DIR",
        help="on a disk; a temporary directory is made in it; default: the usual place for those",
    )
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.seconds < 0.05:
        parser.error("at least one round, of at least 0.05 s a run")
    return arguments


def main() -> int:
    arguments = read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # for 4,000 connections, inherited
    cpus = peers.choose_cpus()
    place = arguments.directory or disk.choose_directory()
    results = Results(arguments.rounds, arguments.seconds)
    cases = [case for case in EVERY if arguments.only is None or case.key in arguments.only]
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="counter-benchmarks-", dir=place) as directory:
        bench = Bench(Path(directory), cpus, cases, results)
        what_disk = disk.description(bench.directory)
        facts = page.machine_facts(cpus, what_disk)
        if cpus.server == cpus.generator:
            bench.skip("pinning server and generator apart", "there is only one CPU to use")
        if disk.is_memory(bench.directory):
            bench.skip("durability", f"{what_disk}: no disk was found, see --directory")
        run_all(bench)
    tables = page.tables(results, cpus, what_disk)
    print("\n".join(tables))
    took_s = time.monotonic() - begin_s
    note(f"took {took_s:.0f} s")
    if arguments.only is None:
        write_page(bench, tables, facts, took_s, arguments.output)
    for line in (*results.skipped, *results.failures):
        print(f"- {line}")
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
