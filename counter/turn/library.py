"""The compiled turn, found and opened; or the reason why it is not used, in words.

pip puts the library that setup.py builds beside all other packages, under a name of Python's
extensions. It is found by that name and opened by cffi, and never imported: it has no Python in it.
Nothing is compiled here. What was built from other sources than those that stand beside this module
is not used, so a library and the sources that are read are always the same.

Command: python -m counter.turn.library says in one line which engine there is, and why. Exit code 1
where it is not the compiled one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from counter.system.streams import write_result
from counter.turn.source_hash import source_hash

NAME: Final = "counter_turn"
SOURCES: Final = Path(__file__).parent

# What the library offers: declarations without a line for the preprocessor, as cffi reads them.
INTERFACE: Final = ("source.h", "frames.h", "turn.h", "cell.h", "load.h")

REMEDY: Final = "pip install -r requirements.txt builds it"


class EngineMissing(Exception):
    """There is no compiled turn to use; the text says why, and what to do about it, in one line."""


@dataclass(frozen=True)
class Library:
    """The compiled turn: its functions, and what makes and reads their arguments."""

    path: Path
    ffi: Any
    lib: Any


@cache
def load() -> Library:
    """The compiled turn, opened once in a process; EngineMissing where there is none to use."""
    path = _find()
    try:
        expected = source_hash(SOURCES)
        declarations = [(SOURCES / name).read_text() for name in INTERFACE]
    except OSError as error:
        raise EngineMissing(f"its sources cannot be read: {error}") from None
    ffi = _declare(declarations)
    try:
        lib = ffi.dlopen(str(path))
    except OSError as error:
        why = str(error).partition("  Additionally,")[0]  # cffi goes on about where else it looked
        raise EngineMissing(f"{why}; {REMEDY} anew") from None
    try:
        built_from = ffi.string(lib.turn_source()).decode()
    except AttributeError:
        raise EngineMissing(f"{path} is not what is built here; remove it") from None
    if built_from != expected:
        raise EngineMissing(f"{path} was built from other sources; {REMEDY} anew")
    return Library(path, ffi, lib)


def choose(wanted: str) -> tuple[str, str]:
    """The engine that `compiled`, `plain` or `auto` means here, and why it is not the compiled one
    where it could have been; EngineMissing where that was named and is not there."""
    if wanted == "plain":
        return "plain", ""
    try:
        load()
    except EngineMissing as missing:
        if wanted == "compiled":
            raise
        return "plain", str(missing)
    return "compiled", ""


def _find() -> Path:
    """Where the library is."""
    found = find_spec(NAME)
    if found is None:
        raise EngineMissing(_why_not())
    if not found.has_location or found.origin is None:
        raise EngineMissing(f"there is a folder called {NAME} in its place; {REMEDY}")
    return Path(found.origin)


def _why_not() -> str:
    """Why there is none, as the installation left it."""
    from importlib.metadata import PackageNotFoundError, distribution  # 15 ms, which few need

    try:
        installed = distribution(NAME)
        reason = Path(str(installed.locate_file(f"{NAME}.txt"))).read_text().strip()
    except PackageNotFoundError:
        return f"it is not installed; {REMEDY}"
    except OSError:
        return f"it is installed without a library; {REMEDY} anew"
    if "no C compiler" in reason:
        return f"{reason} when it was installed; with one, {REMEDY}"
    return f"{reason}; once that is mended, {REMEDY}"


def _declare(declarations: list[str]) -> Any:
    """cffi's, with what the library offers."""
    try:
        from cffi import FFI
    except ImportError:
        raise EngineMissing("cffi is not installed; pip install -r requirements.txt") from None
    ffi = FFI()
    for declaration in declarations:
        ffi.cdef(declaration)
    return ffi


def main() -> int:
    """The command; gives back its exit code."""
    try:
        line, code = f"compiled: {load().path}", 0
    except EngineMissing as missing:
        line, code = f"plain: {missing}", 1
    write_result(f"Engine: {line}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
