"""Question: how fast is this server beside the fastest that could be, and beside what people would
use instead, at the same work, on the same machine, in the same minutes?

Command: make bench, or python benchmarks/compare.py [--rounds N] [--seconds S] [--only CASE ...]
The whole of it takes under five minutes and writes docs/benchmarks.md and docs/benchmarks.svg; with
--only it prints its tables and writes nothing.

Every server is started once, on one CPU, and stays; the load generator has another CPU. In each
round every case is run against every server that takes part in it, one after the other, every
second round in the opposite order. So a drift of the machine touches all alike, and ratios are
taken within a round.

Invalid if: other work ran meanwhile (neither server nor generator was busy then: the table has
both); the generator was fully busy and the server was not (then the rate is the generator's, and
the CPU time per request is what to read); there are fewer than two CPUs (it then says so).
"""

from __future__ import annotations

import argparse
import json
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
from typing import Any, Final

import page
import peers
from peers import Cpus, Peer, PeerError, Running
from results import Case, Measurement, Results, amount_text, load_table, memory_table, pair_table

# Long enough for caches and socket buffers to settle, short enough for many rounds.
WARMUP_S: Final = 0.2
# What a run may take beyond its warm-up and measured part; the generator gives up before.
GRACE_S: Final = 75.0

IDLE_CONNECTIONS: Final = 4000
IDLE_FIRST: Final = 20  # held before, so that what a server allocates once is not counted
# Redis shrinks an idle client's buffers after some seconds, and its allocator takes ten more.
IDLE_SETTLE_S: Final = 15.0
PAIR_CONNECTIONS: Final = 40

FAST: Final = ("floor", "server", "go", "redis")
SLOW: Final = ("gevent", "uvloop")

_MANY: Final = ("--connections", "4000")
_RANDOM: Final = ("--amount", "random", "--in-flight")
CASES: Final = (
    Case("steady-40", "1 in flight, 40 connections", (), (*FAST, "plain", *SLOW)),
    Case("steady-400", "1 in flight, 400 connections", ("--connections", "400"), (*FAST, *SLOW)),
    Case("steady-4000", "1 in flight, 4,000 connections", _MANY, (*FAST, *SLOW)),
    Case("flight-16", "16 in flight, 40 connections", ("--in-flight", "16"), (*FAST, "plain")),
    Case("flight-256", "256 in flight, 40 connections", ("--in-flight", "256"), FAST),
    Case("flight-1024", "1,024 in flight, 40 connections", ("--in-flight", "1024"), FAST),
    Case("flight-4096", "4,096 in flight, 40 connections", ("--in-flight", "4096"), FAST),
    Case("random-256", "64-bit amounts, 256 in flight", (*_RANDOM, "256"), FAST),
    Case("random-4096", "64-bit amounts, 4,096 in flight", (*_RANDOM, "4096"), FAST),
    Case("churn", "connect, add one, close, 40 at a time", ("--mode", "churn"), (*FAST, *SLOW)),
)
PAIR: Final = Case("pair", "server and client", (), ("pair", "pair_default", "go_pair"))
IDLE: Final = Case("idle", "memory", ("--mode", "idle"), (*FAST, *SLOW))
EVERY: Final = (*CASES, PAIR, IDLE)

OWN: Final = {"server", "plain", "pair", "pair_default"}  # peers that must not be missing

NAMES: Final = {
    "floor": "C floor",
    "server": "this server",
    "plain": "this server, --processes 0",
    "go": "Go, GOMAXPROCS=1",
    "redis": "Redis, INCRBY 1",
    "gevent": "gevent, textbook",
    "uvloop": "asyncio, uvloop",
    "pair": "this project's, one process each",
    "pair_default": "this project's, processes by default",
    "go_pair": "Go",
}


class RunError(Exception):
    """A run that says nothing: a wrong reply, a lost connection, no end in time."""


@dataclass
class Bench:
    """One comparison under way."""

    directory: Path  # for programs and logs, temporary
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


def make_peer(key: str, directory: Path) -> Peer:
    """The server that NAMES calls so; PeerError if this machine lacks what it needs."""
    match key:
        case "floor":
            return peers.floor(directory)
        case "server" | "pair":
            return peers.this_server("--processes", "1")
        case "plain":
            return peers.this_server("--processes", "0")
        case "pair_default":
            return peers.this_server()
        case "go":
            return peers.go(directory, {"GOMAXPROCS": "1"})
        case "go_pair":
            return peers.go(directory)
        case "redis":
            return peers.redis(directory)
        case _:
            return peers.python_peer(f"peer_{key}.py", key)


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
    """Starts a server, on its own CPU or in a pair on all; PeerError if it does not come up."""
    cpus = bench.cpus.all if key in PAIR.peers else bench.cpus.server
    log = bench.directory / f"{key}.log"
    bench.running[key] = stack.enter_context(peers.started(bench.peers[key], cpus, log))
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


def run_json(command: Sequence[str], cpus: frozenset[int], limit_s: float) -> Any:
    """Runs a load generator to its end; gives back the JSON it printed. RunError otherwise."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=limit_s,
            env=peers.environment({}),
            preexec_fn=lambda: peers.prepare_child(cpus),
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"no end after {limit_s:g} s") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise RunError(f"status {done.returncode}, {said[-1]}")
    return json.loads(done.stdout)


def generator_command(bench: Bench, running: Running, flags: Sequence[str]) -> list[str]:
    command = [str(bench.generator), "--port", str(running.port), *flags]
    if running.peer.protocol == "redis":
        command += ["--protocol", "redis", "--amount", "1"]
    return command


def run_case(bench: Bench, case: Case, running: Running) -> Measurement:
    seconds = bench.results.seconds
    command = generator_command(bench, running, case.flags)
    command += ["--warmup", str(WARMUP_S), "--seconds", str(seconds)]
    command += ["--cpu-of", ",".join(map(str, running.pids()))]
    result = run_json(command, bench.cpus.generator, WARMUP_S + seconds + GRACE_S)
    return Measurement(
        rate=result["rate"],
        p50_us=result["p50_us"],
        p99_us=result["p99_us"],
        cpu_us=result["server_cpu_us_per_request"],
        generator_share=result["generator_cpu_share"],
    )


def run_pair(bench: Bench, key: str, running: Running) -> Measurement:
    seconds = bench.results.seconds
    if key == "go_pair":
        command = [str(bench.go_client), "--port", str(running.port)]
        command += ["--seconds", str(seconds), "--warmup", str(WARMUP_S)]
    else:
        command = [sys.executable, str(peers.ROOT / "client.py"), "--json", "-"]
        command += ["--serverAddress", f"127.0.0.1:{running.port}"]
        command += ["--duration", f"{seconds}s", "--warmup", f"{WARMUP_S}s"]
        if key == "pair":
            command += ["--processes", "1"]
    command += ["--connections", str(PAIR_CONNECTIONS)]
    result = run_json(command, bench.cpus.all, WARMUP_S + seconds + GRACE_S)
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
    flags = [*IDLE.flags, "--connections", str(connections)]
    process = subprocess.Popen(
        generator_command(bench, bench.running[key], flags),
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


def tables(results: Results) -> list[str]:
    """What is printed, and the middle of the page: the tables that have rows."""
    idle = (
        f"What a server's processes had grown by in RAM, {IDLE_SETTLE_S:g} s after each of"
        f" {IDLE_CONNECTIONS:,} connections had added once. The kernel's part is not in it."
    )
    pair = (
        f"{PAIR_CONNECTIONS} connections, one frame in flight. The Go client keeps no latencies;"
        " this project's records every one."
    )
    lines = []
    for title, text, table in (
        ("One core each", "", load_table(results, CASES, NAMES)),
        ("Server and client together, on all CPUs", pair, pair_table(results, PAIR, NAMES)),
        ("Memory", idle, memory_table(results, NAMES)),
    ):
        if table:
            lines += [f"## {title}", "", *([text, ""] if text else []), *table, ""]
    return lines


def write_page(bench: Bench, facts: Sequence[str], took_s: float, output: Path) -> None:
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
    text = page.page(bench.results, tables(bench.results), facts, command, took_s, picture.exists())
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
    facts = page.machine_facts(cpus.server, cpus.generator)
    cases = [case for case in EVERY if arguments.only is None or case.key in arguments.only]
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="counter-benchmarks-") as directory:
        results = Results(arguments.rounds, arguments.seconds)
        bench = Bench(Path(directory), cpus, cases, results)
        if cpus.server == cpus.generator:
            bench.skip("pinning server and generator apart", "there is only one CPU to use")
        run_all(bench)
    print("\n".join(tables(results)))
    took_s = time.monotonic() - begin_s
    note(f"took {took_s:.0f} s")
    if arguments.only is None:
        write_page(bench, facts, took_s, arguments.output)
    for line in (*results.skipped, *results.failures):
        print(f"- {line}")
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
