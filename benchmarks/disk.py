"""Question: on what disk is a total made durable, and how long does that disk take by itself?

Command: none, compare.py and commit_ways.py use it.

Invalid if: the file system is in memory. Nothing is durable there, and a commit costs nearly
nothing: then is_memory() is true, and whoever measures has to say so.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Final

from results import time_text

IN_MEMORY: Final = {"tmpfs", "ramfs", "devtmpfs"}

# What a commit writes at least, so often that the median says something, in half a second or so.
PAGE_BYTES: Final = 4096
WRITES: Final = 300
LONGEST_S: Final = 2.0


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`: ext4, tmpfs, overlay and so on."""
    found, depth = "unknown", -1
    target = path.resolve()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        escaped = before.split()[4]  # a space in it is \040
        point = Path(escaped.encode().decode("unicode_escape"))
        # The last of equal ones lies on top.
        if target.is_relative_to(point) and len(point.parts) >= depth:
            found, depth = after.split()[0], len(point.parts)
    return found


def is_memory(path: Path) -> bool:
    return file_system(path) in IN_MEMORY


def directory(text: str) -> Path:
    """A directory that is named on a command line; for argparse."""
    path = Path(text).resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {text}")
    return path


def choose_directory() -> Path:
    """The first of the usual places for temporary files that is on a disk; any if none is."""
    places = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]
    usable = [place for place in places if place.is_dir() and os.access(place, os.W_OK)]
    return next((place for place in usable if not is_memory(place)), usable[0])


def description(place: Path) -> str:
    """What holds the directory, in words for the report."""
    kind = file_system(place)
    if kind in IN_MEMORY:
        return f"{kind}, which is memory and no disk"
    return f"{kind}, where writing 4 KiB and `fdatasync` takes {time_text(sync_us(place))}"


def sync_us(place: Path) -> float:
    """The median time of writing a page over an old one and having it on the disk."""
    page, times_s = bytes(PAGE_BYTES), list[float]()
    with tempfile.TemporaryFile(dir=place) as file:
        os.pwrite(file.fileno(), page, 0)
        os.fsync(file.fileno())
        begin_s = time.perf_counter()
        while len(times_s) < WRITES and time.perf_counter() - begin_s < LONGEST_S:
            started_s = time.perf_counter()
            os.pwrite(file.fileno(), page, 0)
            os.fdatasync(file.fileno())
            times_s.append(time.perf_counter() - started_s)
    return statistics.median(times_s) * 1e6
