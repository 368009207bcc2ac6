"""Question: what does one load on one running server give?

Command: none, compare.py and commit_ways.py use it.

Invalid if: another load runs at the same time.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import peers
from peers import Running
from results import Measurement

# Long enough for caches and socket buffers to settle, short enough for many rounds.
WARMUP_S: Final = 0.2
# What a run may take beyond its warm-up and measured part; the generator gives up before.
GRACE_S: Final = 75.0


class RunError(Exception):
    """A run that says nothing: a wrong reply, a lost connection, no end in time."""


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


def generator_command(generator: Path, running: Running, flags: Sequence[str]) -> list[str]:
    command = [str(generator), "--port", str(running.port), *flags]
    if running.peer.protocol == "redis":
        command += ["--protocol", "redis", "--amount", "1"]
    return command


def load(
    generator: Path,
    running: Running,
    flags: Sequence[str],
    seconds: float,
    cpus: frozenset[int],
) -> Measurement:
    """One run of the load generator on these CPUs; RunError if it says nothing."""
    command = generator_command(generator, running, flags)
    command += ["--warmup", str(WARMUP_S), "--seconds", str(seconds)]
    command += ["--cpu-of", ",".join(map(str, running.pids()))]
    result = run_json(command, cpus, WARMUP_S + seconds + GRACE_S)
    return Measurement(
        rate=result["rate"],
        p50_us=result["p50_us"],
        p99_us=result["p99_us"],
        cpu_us=result["server_cpu_us_per_request"],
        generator_share=result["generator_cpu_share"],
    )
