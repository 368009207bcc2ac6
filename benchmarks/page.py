"""Question: how is a comparison shown, and on what machine and with which versions was it made?

Command: none, compare.py uses it. It writes docs/benchmarks.md and docs/benchmarks.svg.

Invalid if: the page is edited by hand, or kept while the code that it speaks of has changed.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sqlite3
import statistics
import subprocess
import textwrap
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from cases import (
    CASES,
    DURABLE,
    DURABLE_LENGTH,
    IDLE_CONNECTIONS,
    IDLE_SETTLE_S,
    NAMES,
    PAIR,
    PAIR_CONNECTIONS,
    SHARED_FILE,
    SHARED_REDIS,
)
from peers import Cpus
from results import FLOOR, SERVER, Case, Results, load_table, memory_table, pair_table

# This server is a warm colour, what others wrote is cool or grey.
COLOURS: Final = {
    "server": "#d1495b",
    "plain": "#edae49",
    "go": "#00798c",
    "redis": "#66a182",
    "gevent": "#8d96a3",
    "uvloop": "#2e4057",
}
LABEL_WIDTH: Final = 16  # characters, under the bars of a case
BAR_WIDTH: Final = 0.14  # of the distance between two cases

PACKAGES: Final = ("gevent", "greenlet", "xxhash", "numpy", "cffi", "redis", "uvloop")
TOOLS: Final = (("cc", "--version"), ("go", "version"), ("redis-server", "--version"))
TOOL_TIMEOUT_S: Final = 10

INTRODUCTION: Final = """\
# Benchmarks

Written by `benchmarks/compare.py`; a new run replaces it. The command was `{command}`, on {date},
{rounds} rounds of {seconds:g} s a run, {took_s:.0f} s in all.

{picture}How to read it:

- Every server had one CPU to itself and the load generator (`benchmarks/generator.c`, one thread)
  another. In each round every server ran every case, one after the other, every second round in
  the opposite order. Numbers are medians over the rounds, with the lowest and highest in brackets;
  ratios are taken within a round, as the speed of a machine drifts by more than servers differ.
- The floor (`benchmarks/floor.c`) is a C server that verifies, adds and answers with one `recv` and
  one `send` for each readable connection, and does nothing else.
- "This server" has its compiled engine; "plain engine" is the one in Python, which serves where
  no C compiler was at the installation. Both have one serving process under a master.
- A rate alone hides what a server could do where the generator was the busier side: read the
  server's CPU time per request beside it (user and kernel, all its processes, in the measured
  part). Where neither side was busy, something else had the CPUs.
- With N in flight a connection sends N frames at once and the next N when all are answered, as
  `redis-benchmark -P` does. Latency is from that send to the read that brought the reply.
- Every reply was checked: in each run the totals link into one chain from the first to the last.
- 64-bit amounts are uniform, a million different ones. Redis adds 1 there too, as its sum would
  leave the signed 64 bits it counts in.
"""

# Filled to lines when they are complete.
DURABLE_TEXT: Final = """\
`server.py --store sqlite:FILE --processes 1` beside `redis-server --appendonly yes --appendfsync
always --save ""`: both have each addition on the disk before they answer it, and one CPU each.
SQLite's file and Redis's are in one directory, on {disk}. A run is {length:g} times as long as
those above. By itself: `python benchmarks/compare.py --only {only}`."""

SHARED_FILE_TEXT: Final = """\
Here the servers may use all CPUs, the generator's too: on one CPU a second process can only be in
the way of the first. With only two CPUs it is in the way of the generator. By itself:
`python benchmarks/compare.py --only {only}`."""

SHARED_REDIS_TEXT: Final = """\
`server.py --store redis://127.0.0.1:PORT/0 --processes 1`, with a Redis that keeps nothing on the
disk, beside the same server with its total in memory. The server has one CPU; Redis {redis_cpu}.
The CPU time is this server's, without Redis's. By itself:
`python benchmarks/compare.py --only {only}`."""

PAIR_TEXT: Final = """\
{connections} connections, one frame in flight. The Go client keeps no latencies; this project's
records every one."""

IDLE_TEXT: Final = """\
What a server's processes had grown by in RAM, {settle_s:g} s after each of {connections:,}
connections had added once. The kernel's part is not in it."""

TEXT_WIDTH: Final = 100


def page(
    results: Results,
    body: Sequence[str],
    facts: Sequence[str],
    command: str,
    took_s: float,
    picture: bool,
) -> str:
    """The text of docs/benchmarks.md."""
    introduction = INTRODUCTION.format(
        command=command,
        date=time.strftime("%Y-%m-%d"),
        rounds=results.rounds,
        seconds=results.seconds,
        took_s=took_s,
        picture="![Shares of the floor, case by case](benchmarks.svg)\n\n" if picture else "",
    )
    parts = [introduction, *body, "## Where it ran", "", *facts, "", "## What was skipped", ""]
    parts += [f"- {reason}" for reason in results.skipped] or ["Nothing."]
    if results.failures:
        parts += ["", "## What failed", "", *(f"- {failure}" for failure in results.failures)]
    return "\n".join(parts) + "\n"


def tables(results: Results, cpus: Cpus, what_disk: str) -> list[str]:
    """What is printed, and the middle of the page: the tables that have rows, with their texts."""
    lines = []
    for title, text, table in _sections(results, cpus, what_disk):
        if table:
            lines += [f"## {title}", "", *([*_filled(text), ""] if text else []), *table, ""]
    return lines


def _sections(results: Results, cpus: Cpus, what_disk: str) -> list[tuple[str, str, list[str]]]:
    """Title, text and table of each."""
    floor_and_redis = {"of the floor": FLOOR, "of Redis": "redis"}
    by_memory = NAMES | {"server": "this server, memory store"}
    redis_cpu = (
        "shares that of the load generator, as there is no third"
        if cpus.behind == cpus.generator
        else "another"
    )
    return [
        ("One core each", "", load_table(results, CASES, NAMES, floor_and_redis)),
        (
            "Durable before the reply",
            DURABLE_TEXT.format(disk=what_disk, length=DURABLE_LENGTH, only=_keys(DURABLE)),
            load_table(results, DURABLE, NAMES, {"of Redis": "redis_always"}),
        ),
        (
            "Two processes on one SQLite file",
            SHARED_FILE_TEXT.format(only=SHARED_FILE.key),
            load_table(results, [SHARED_FILE], NAMES, {"of 1 process": "sqlite_one"}),
        ),
        (
            "A total in Redis",
            SHARED_REDIS_TEXT.format(redis_cpu=redis_cpu, only=SHARED_REDIS.key),
            load_table(results, [SHARED_REDIS], by_memory, {"of memory": SERVER}),
        ),
        (
            "Server and client together, on all CPUs",
            PAIR_TEXT.format(connections=PAIR_CONNECTIONS),
            pair_table(results, PAIR, NAMES),
        ),
        (
            "Memory",
            IDLE_TEXT.format(settle_s=IDLE_SETTLE_S, connections=IDLE_CONNECTIONS),
            memory_table(results, NAMES),
        ),
    ]


def _filled(text: str) -> list[str]:
    """The text in lines. A command, in backticks, is not broken: it is there to be copied."""
    whole = re.sub("`[^`]*`", lambda code: " ".join(code[0].split()).replace(" ", "\0"), text)
    lines = textwrap.wrap(whole, TEXT_WIDTH, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def _keys(cases: Sequence[Case]) -> str:
    return " ".join(case.key for case in cases)


def machine_facts(cpus: Cpus, what_disk: str) -> list[str]:
    """The machine and the versions of everything that took part, as a Markdown list."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [
        f"- {_cpu_model()}, {os.cpu_count()} CPUs, {memory_bytes / 2**30:.0f} GiB; servers on CPU"
        f" {_numbers(cpus.server)}, generator on CPU {_numbers(cpus.generator)}",
        f"- Durable files on {what_disk}",
        f"- {platform.system()} {platform.release()}, {_distribution()};"
        f" load average before the run {os.getloadavg()[0]:.2f}",
        f"- Python {platform.python_version()}, {', '.join(map(_package, PACKAGES))},"
        f" SQLite {sqlite3.sqlite_version}",
        *(f"- {line}" for name, flag in TOOLS if (line := _tool(name, flag))),
    ]


def _numbers(cpus: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(cpus)))


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return "an unnamed distribution"


def _package(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def _tool(name: str, flag: str) -> str:
    """The first line of what a program says of its version; nothing if it is not there."""
    if shutil.which(name) is None:
        return ""
    done = subprocess.run([name, flag], capture_output=True, text=True, timeout=TOOL_TIMEOUT_S)
    return (done.stdout.splitlines() or [""])[0]


def draw(results: Results, cases: Sequence[Case], names: Mapping[str, str], target: Path) -> None:
    """Draws each server's share of the floor, case by case, as SVG; needs matplotlib."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "benchmarks"  # the same numbers give the same file
    from matplotlib import pyplot

    shown = [case for case in cases if (case.key, FLOOR) in results.runs]
    figure, axes = pyplot.subplots(figsize=(13, 5.4), layout="constrained")
    for peer in COLOURS:
        _draw_peer(axes, results, shown, peer, names)
    axes.axhline(1, color="#222222", linewidth=1)
    axes.set_title("Requests a second, one core, as a share of the C floor's (the line at 1)")
    axes.set_xticks(range(len(shown)), [textwrap.fill(case.title, LABEL_WIDTH) for case in shown])
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.grid(color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(ncols=len(COLOURS), loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    figure.savefig(target, metadata={"Date": None}, facecolor="white")
    pyplot.close(figure)


def _draw_peer(
    axes: Any, results: Results, cases: Sequence[Case], peer: str, names: Mapping[str, str]
) -> None:
    """One peer's bars: its median in each case that it ran, with a line from lowest to highest."""
    middles, heights, below, above = [], [], [], []
    for place, case in enumerate(cases):
        drawn = [key for key in COLOURS if results.ratios(case.key, key, FLOOR)]
        if peer in drawn:
            ratios = results.ratios(case.key, peer, FLOOR)
            heights.append(statistics.median(ratios))
            below.append(heights[-1] - min(ratios))
            above.append(max(ratios) - heights[-1])
            middles.append(place + (drawn.index(peer) - (len(drawn) - 1) / 2) * BAR_WIDTH)
    if not heights:
        return
    bars = axes.bar(
        middles,
        heights,
        BAR_WIDTH * 0.9,
        yerr=[below, above],
        color=COLOURS[peer],
        label=names[peer],
        error_kw={"linewidth": 0.7, "ecolor": "#555555"},
    )
    if peer == SERVER:
        axes.bar_label(bars, fmt="%.2f", label_type="center", rotation=90, color="white")
