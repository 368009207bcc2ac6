"""Question: who takes part in the comparison, and how is each one built, started, pinned and ended?

Command: none, compare.py and commit_ways.py use it. Everything that is a process is here, and no
number is judged.

Invalid if: a peer is given less than its users would give it. Each is started as its own manual
says for one core, with a backlog that holds a burst of connections, and without persistence unless
that is what it is compared for.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Final

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent

START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 10.0
COMPILE_TIMEOUT_S: Final = 120.0

# Workers per CPU, so that every connection of the largest case has one even on half a CPU.
MULTIPLIER: Final = 8192

_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None)


class PeerError(Exception):
    """A peer that cannot take part, and why, in words for the report."""


@dataclass(frozen=True)
class Peer:
    """A server that can be started. `ready` is matched against its lines; its group is the port."""

    command: Sequence[str]
    protocol: str = "counter"
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: str = r"Listening on 127\.0\.0\.1:(\d+)"
    port: int = 0  # where `ready` has no group
    behind: Peer | None = None  # what it needs running: the Redis that it keeps its total in


@dataclass(frozen=True)
class Cpus:
    """Which CPUs the server, the generator, what is behind a server, and all together may use."""

    server: frozenset[int]
    generator: frozenset[int]
    behind: frozenset[int]
    all: frozenset[int]


@dataclass(frozen=True)
class Running:
    """A peer that answers on a port of 127.0.0.1."""

    peer: Peer
    process: subprocess.Popen[bytes]
    port: int

    def pids(self) -> list[int]:
        """The process and its descendants, now."""
        pids = [self.process.pid]
        for pid in pids:  # grows while it is walked
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                pids += [int(child) for child in task.read_text().split()]
        return pids

    def resident_bytes(self) -> int:
        """Memory in RAM, of all processes."""
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.pids())
        return pages * resource.getpagesize()


def choose_cpus() -> Cpus:
    """One CPU for the server and one for the generator, not two threads of one core if possible.

    What is behind a server has a third one, or the generator's if there is none: on the server's
    it would take the time that is measured.
    """
    usable = sorted(os.sched_getaffinity(0))
    siblings = Path(f"/sys/devices/system/cpu/cpu{usable[0]}/topology/thread_siblings_list")
    shared = set(re.findall(r"\d+", siblings.read_text())) if siblings.exists() else set()
    others = [cpu for cpu in usable[1:] if str(cpu) not in shared] or usable[1:] or usable
    behind = others[1:2] or others[:1]
    return Cpus(*map(frozenset, (usable[:1], others[:1], behind, usable)))


def compile_c(source: str, directory: Path) -> Path:
    """Compiles a program of this folder; PeerError without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise PeerError("no C compiler (cc)")
    target = directory / Path(source).stem
    return _compile([compiler, "-O2", "-o", str(target), str(HERE / source)], target)


def compile_go(source: str, directory: Path) -> Path:
    """Compiles a program of this folder; PeerError without `go`."""
    if shutil.which("go") is None:
        raise PeerError("no go")
    target = directory / Path(source).stem
    return _compile(["go", "build", "-o", str(target), str(HERE / source)], target)


def _compile(command: Sequence[str], target: Path) -> Path:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    if done.returncode != 0:
        raise PeerError(f"{command[0]} failed: {done.stderr.strip()}")
    return target


def floor(directory: Path) -> Peer:
    return Peer([str(compile_c("floor.c", directory)), "0"])


def this_server(*flags: str) -> Peer:
    """This project's server with workers for every case; flags such as `--processes 1`.

    It has the compiled engine unless the flags name another, and does not start without it.
    """
    command = [sys.executable, str(ROOT / "server.py"), "--port", "0", "--engine", "compiled"]
    return Peer([*command, "--multiplier", str(MULTIPLIER), *flags])


def sqlite_store_server(file: Path, *flags: str) -> Peer:
    """This project's server with its total in a SQLite file, which it makes."""
    return this_server("--store", f"sqlite:{file}", *flags)


def redis_store_server(directory: Path, *flags: str) -> Peer:
    """This project's server with its total in a Redis without persistence; PeerError without."""
    behind = redis(directory)
    store = f"redis://127.0.0.1:{behind.port}/0"
    return replace(this_server("--store", store, "--processes", "1", *flags), behind=behind)


def go(directory: Path, environment: Mapping[str, str] | None = None) -> Peer:
    """The Go server; without `environment` it uses every core it may."""
    return Peer([str(compile_go("peer.go", directory))], environment=environment or {})


def redis(directory: Path, *flags: str) -> Peer:
    """Redis without persistence unless the flags say otherwise. Bound to loopback it needs no
    protected mode, which would refuse the addresses 127.0.0.2 and up that the generator takes when
    it connects very often."""
    program = shutil.which("redis-server")
    if program is None:
        raise PeerError("no redis-server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)]
    command += ["--protected-mode", "no", "--save", "", *(flags or ("--appendonly", "no"))]
    return Peer(command, protocol="redis", ready="Ready to accept connections", port=port)


def python_peer(script: str, module: str) -> Peer:
    """A peer of this folder; PeerError without the module that it is about."""
    if find_spec(module) is None:
        raise PeerError(f"{module} is not installed")
    return Peer([sys.executable, str(HERE / script)])


def prepare_child(cpus: frozenset[int]) -> None:
    """In a child before exec: its CPUs, and a SIGTERM if this program dies without ending it."""
    os.sched_setaffinity(0, cpus)
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what would configure the project's programs."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("COUNTER_")}
    return plain | dict(extra)


@contextmanager
def started(peer: Peer, cpus: frozenset[int], log: Path) -> Iterator[Running]:
    """Runs a peer, without what is behind it, on these CPUs until the block ends.

    PeerError if it does not come up.
    """
    with log.open("wb") as errors:
        process = subprocess.Popen(
            peer.command,
            bufsize=0,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment(peer.environment),
            preexec_fn=lambda: prepare_child(cpus),
        )
    try:
        assert process.stdout is not None
        yield Running(peer, process, _ready_port(peer, process.stdout, log))
    finally:
        _stop(process)


def _ready_port(peer: Peer, lines: IO[bytes], log: Path) -> int:
    deadline = time.monotonic() + START_TIMEOUT_S
    while select.select([lines], [], [], max(0.0, deadline - time.monotonic()))[0]:
        line = lines.readline().decode(errors="replace")
        if match := re.search(peer.ready, line):
            return int(match[1]) if match.groups() else peer.port
        if not line:
            said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise PeerError(f"it ended at its start: {said[-1]}")
    raise PeerError(f"it was not ready within {START_TIMEOUT_S:g} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
