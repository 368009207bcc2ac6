"""Where reports go: files that are found unusable before the run, and written after it.

The run costs minutes and the file an instant: what can be known of a file before is looked at
before. What fails nevertheless is said, costs exit code 5, and takes no other report with it.
"""

from __future__ import annotations

import importlib.util
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import Final

from counter.options.client import ClientSettings
from counter.report.check import first_of
from counter.report.json_report import as_json
from counter.report.table import lines
from counter.report.thresholds import Outcome
from counter.results.result import Result
from counter.system.exits import EXIT_ERRORS
from counter.system.streams import write_error, write_result

STANDARD_OUTPUT: Final = "-"


class OutputError(Exception):
    """A report that cannot be made or written; its text names the option and the remedy."""


def places(settings: ClientSettings) -> list[tuple[str, str]]:
    """The reports that are asked for: option and file."""
    asked = (("--json", settings.json), ("--html", settings.html), ("--hgrm", settings.hgrm))
    return [
        (option, STANDARD_OUTPUT if _is_standard_output(path) else path)
        for option, path in asked
        if path is not None
    ]


def _is_standard_output(path: str) -> bool:
    """Whether it is the file or pipe that standard output goes to, by whatever name: opened once
    more, a file would lose what is in it. Devices can be opened several times."""
    with suppress(OSError, ValueError):  # it is not there, or there is no standard output
        found = os.stat(path)
        return not stat.S_ISCHR(found.st_mode) and os.path.samestat(found, os.fstat(1))
    return False


def check(settings: ClientSettings) -> None:
    """OutputError if a report is sure to fail; leaves no file behind that was not there."""
    seen: dict[object, str] = {}
    for option, path in places(settings):
        place = _identity(path)
        if place in seen and not _takes_several(path):
            raise OutputError(f"{option} and {seen[place]} both name {path}; give each its own")
        seen[place] = option
        if path != STANDARD_OUTPUT and not _takes_several(path):
            _check_file(option, path)
    if settings.html is not None and importlib.util.find_spec("pygal") is None:
        raise OutputError("--html needs pygal; pip install -r requirements.txt")


def _identity(path: str) -> object:
    """The same for all names of one file, links among them."""
    if path != STANDARD_OUTPUT:
        with suppress(OSError, ValueError):
            found = os.stat(path)
            return found.st_dev, found.st_ino
        return os.path.realpath(path)
    return path


def _takes_several(path: str) -> bool:
    """Whether it is a device or a pipe, which opening and closing would end for its reader."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _check_file(option: str, path: str) -> None:
    was_there = os.path.exists(path)
    try:
        open(path, "a").close()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"{option} {path}: {reason}; choose another file") from None
    if not was_there:
        os.unlink(path)


def write(
    result: Result, settings: ClientSettings, outcomes: list[Outcome], cpus: float, code: int
) -> int:
    """Prints the table and writes every report; gives back the exit code, 5 if one failed.

    The table goes to standard error where a report goes to standard output.
    """
    wanted = places(settings)
    taken = any(path == STANDARD_OUTPUT for _, path in wanted)
    table = "\n".join(lines(result, outcomes)) + "\n"
    for option, path, text in [
        ("the table", "stderr" if taken else STANDARD_OUTPUT, table),
        *_texts(result, settings, outcomes, cpus, wanted),
    ]:
        try:
            _write(path, text)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            write_error(f"client.py: {_failure(option, path, reason, text)}\n")
            code = first_of(code, EXIT_ERRORS)
    return code


def _texts(
    result: Result,
    settings: ClientSettings,
    outcomes: list[Outcome],
    cpus: float,
    wanted: list[tuple[str, str]],
) -> Iterator[tuple[str, str, str]]:
    for option, path in wanted:
        if option == "--json":
            yield option, path, as_json(result, settings, outcomes) + "\n"
        elif option == "--hgrm":
            from counter.report.percentiles import as_hgrm

            yield option, path, as_hgrm(result.latencies) + "\n"
        else:
            from counter.report.page import Conditions, as_html

            now = datetime.now().astimezone()
            conditions = Conditions(["python", *sys.argv], cpus, now)
            yield option, path, as_html(result, settings, outcomes, conditions)


def _write(path: str, text: str) -> None:
    if path == "stderr":
        sys.stderr.write(text)
    elif path == STANDARD_OUTPUT:
        write_result(text)
    else:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


def _failure(option: str, path: str, reason: str, text: str) -> str:
    if path == STANDARD_OUTPUT:
        return f"cannot write the result: {reason}; it was: {text}"
    return f"{option} {path}: {reason}; the file is not whole"
