"""Results on standard output: whole, at once, and with one word where they cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import IO, Any

import pytest

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


@pytest.mark.parametrize(
    ("flags", "code"), [(["--frobnicate"], 2), (["--store", "sqlite:/nowhere/counter.db"], 1)]
)
def test_an_error_that_cannot_be_told_keeps_its_exit_code(flags: list[str], code: int) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "server.py", "--port", "0", *flags],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=full,
            check=False,
        )
    assert done.returncode == code


CLOSED = """
import os, sys, tempfile
from counter.system.streams import prepare_streams
before = [stream is None for stream in (sys.stdin, sys.stdout, sys.stderr)]
prepare_streams()
with tempfile.TemporaryFile() as file:
    print("a word", flush=True)
    print("a word", file=sys.stderr, flush=True)
    os.write(1, b"a word")
    os.write(2, b"a word")
    assert sys.stdin.read() == ""
    os._exit(sum(before) if file.fileno() > 2 and not file.seek(0, 2) else 99)
"""


@pytest.mark.parametrize(
    ("how", "closed"),
    [("", 0), ("<&-", 1), (">&-", 1), ("2>&-", 1), ("<&- 2>&-", 2), ("<&- >&- 2>&-", 3)],
)
def test_what_is_said_where_a_stream_was_closed_goes_nowhere(how: str, closed: int) -> None:
    """Least of all into the file that would get its descriptor."""
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" "$@" {how}', sys.executable, "-c", CLOSED],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, b"Traceback" in done.stderr) == (closed, False)


@pytest.mark.parametrize("encoding", ["ascii", "iso8859-1", "utf-8", "ascii:surrogateescape"])
def test_what_an_encoding_lacks_is_written_as_python_writes_it(encoding: str) -> None:
    code = (
        "import sys; from counter.system.streams import prepare_streams, write_result;"
        "prepare_streams(); write_result('1 \\u20ac \\udce9\\n'); sys.stderr.write('\\u20ac\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    euro = "\u20ac".encode("utf-8" if encoding == "utf-8" else "ascii", "backslashreplace")
    wanted = (0, b"1 %b \\udce9\n" % euro, b"%b\n" % euro)
    assert (done.returncode, done.stdout, done.stderr) == wanted


# Standard error

SAY = """
import os, sys
from counter.system.streams import write_error
write_error("a word\\n")
os._exit(7) if "at once" in sys.argv else sys.exit(7)
"""


def test_what_is_said_beside_a_result_is_there_at_once() -> None:
    command = [sys.executable, "-c", SAY, "at once"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, b"", b"a word\n")


@pytest.mark.parametrize("place", ["a full disk", "a pipe without a reader"])
def test_where_standard_error_cannot_be_written_the_exit_code_stays(place: str) -> None:
    read_end, nobody = os.pipe()
    os.close(read_end)
    with open("/dev/full", "w") as full, os.fdopen(nobody, "w") as pipe:
        stderr = full if place == "a full disk" else pipe
        command = [sys.executable, "-c", SAY]
        assert subprocess.run(command, cwd=ROOT, stderr=stderr, check=False).returncode == 7
