"""Results on standard output: whole, at once, and with one word where they cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import IO, Any

from kit.harness import ROOT

TELL = """
import sys
from counter.system.streams import write_result
try:
    write_result("5\\n")
except OSError as error:
    sys.exit(7)
"""


def tell(code: str, stdout: int | IO[Any]) -> tuple[int, str]:
    """Exit code and standard error of a program."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


def test_a_result_is_in_the_pipe_before_the_program_ends() -> None:
    code = f"{TELL}\nimport os\nos._exit(0)"  # nothing is flushed on this way out
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"5\n")


def test_a_full_disk_is_one_error_and_the_end_of_the_program_adds_none() -> None:
    with open("/dev/full", "w") as full:
        assert tell(TELL, full) == (7, "")


def test_a_pipe_without_a_reader_is_one_error_and_the_end_of_the_program_adds_none() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        assert tell(TELL, write_end) == (7, "")
    finally:
        os.close(write_end)


def test_without_a_standard_output_nothing_is_written() -> None:
    code = f"import os\nsys = __import__('sys')\nsys.stdout = None\n{TELL}"
    assert tell(code, subprocess.DEVNULL) == (0, "")
