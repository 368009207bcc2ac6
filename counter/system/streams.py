"""A command's standard streams: its result on standard output, what it says beside it on the other.

A result that cannot be told is an OSError for whoever tells it; it knows what the result is worth.
What is said beside it is worth less than that: it is told or not, and nothing else depends on it.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from io import TextIOWrapper


def prepare_streams() -> None:
    """Makes the standard streams such that whatever is said can be written; a command's first act.

    A stream that was closed before the program began is nothing from here on: Python has None for
    it, and its descriptor would go to the next file or socket, for others to write into. What the
    encoding of a terminal lacks, or a file name has that is no text, is written as Python does.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_RDWR)  # its own descriptor: the lowest that is free
            setattr(sys, name, os.fdopen(nothing, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def write_result(text: str) -> None:
    """Writes to standard output at once, also into a pipe; OSError if it cannot be written.

    Where standard output was closed before the program began, Python has none: nothing is written.
    """
    try:
        print(text, end="", flush=True)
    except OSError:
        _give_up_standard_output()
        raise


def write_error(text: str) -> None:
    """Writes to standard error what somebody asked for. Where nobody reads it (a pipe that is
    closed, a full disk) nothing is said, as nothing is of a line of the log."""
    with suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _give_up_standard_output() -> None:
    """Points it at nothing. The interpreter writes what is left in it once more at its end, and
    would print a traceback and change the exit code."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)
