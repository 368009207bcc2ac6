"""How a command tells its result: on standard output, at once, and once.

What cannot be told is an OSError for whoever tells it; it knows what the result is worth.
"""

from __future__ import annotations

import os
import sys


def write_result(text: str) -> None:
    """Writes to standard output at once, also into a pipe; OSError if it cannot be written.

    Where standard output was closed before the program began, Python has none: nothing is written.
    """
    try:
        print(text, end="", flush=True)
    except OSError:
        _give_up_standard_output()
        raise


def _give_up_standard_output() -> None:
    """Points it at nothing. The interpreter writes what is left in it once more at its end, and
    would print a traceback and change the exit code."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)
