"""What pip builds of this folder: one shared library, where a C compiler is.

Without one, or where the sources cannot be compiled, the installation goes on all the same and
leaves the reason where the library would be, for library.py to tell: pip is silent about an
extension that is optional. The library has no Python in it and needs no headers of Python's; it is
an extension by name only, so that it is installed, and found, as one.

Everything is built outside of this folder, which may be somebody else's, and from nothing: what
another build has left is never taken for this one's.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

NAME: Final = "counter_turn"
HASH: Final[str] = runpy.run_path("source_hash.py")["source_hash"](Path())

# They come behind Python's own, which may say -O3. Without -march=native, because images travel;
# without -Werror, because a newer compiler's warnings are no reason to have no library.
COMPILE: Final = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wconversion"]

# What the library calls of its own is its own, whatever a program has by the same name.
LINK: Final = ["-Wl,-Bsymbolic"]


class BuildTurn(build_ext):
    """Builds the library, or leaves the reason why there is none."""

    def build_extension(self, ext: Extension) -> None:
        command = self.compiler.compiler_so[0]
        if not shutil.which(command):
            self.leave(f"there was no C compiler ({command})")
            return
        with tempfile.TemporaryFile("w+", errors="replace") as said:
            try:
                with standard_error_into(said.fileno()):
                    super().build_extension(ext)
            except (BaseError, CCompilerError) as error:
                self.leave(f"it could not be compiled: {first_error(said.read(), str(error))}")
            said.seek(0)
            sys.stderr.write(said.read())  # shown by pip -v

    def leave(self, reason: str) -> None:
        """Has the reason installed in place of the library."""
        sys.stderr.write(f"{NAME}: {reason}\n")
        Path(self.build_lib).mkdir(parents=True, exist_ok=True)
        Path(self.build_lib, f"{NAME}.txt").write_text(f"{reason}\n")


@contextmanager
def standard_error_into(descriptor: int) -> Iterator[None]:
    """Has a file take what compilers say, and stand at its beginning afterwards."""
    before = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.lseek(descriptor, 0, os.SEEK_SET)


def first_error(said: str, otherwise: str) -> str:
    """The line of a compiler's or linker's that says what is wrong."""
    lines = (line.strip() for line in said.splitlines() if "error: " in line)
    return next(lines, " ".join(otherwise.split()))


def main() -> None:
    os.environ["LC_ALL"] = "C"  # compilers shall call an error by that word
    sources, headers = ([str(path) for path in sorted(Path().glob(end))] for end in ("*.c", "*.h"))
    turn = Extension(
        NAME,
        sources,
        depends=headers,
        define_macros=[("TURN_SOURCE", f'"{HASH}"')],
        extra_compile_args=COMPILE,
        extra_link_args=LINK,
        optional=True,
    )
    with tempfile.TemporaryDirectory() as elsewhere:
        setup(
            # Other sources are another version, so that nobody takes what is installed for them.
            version=f"0+{HASH[:12]}",
            packages=[],
            py_modules=[],
            ext_modules=[turn],
            cmdclass={"build_ext": BuildTurn},
            options={"build": {"build_base": elsewhere}, "egg_info": {"egg_base": elsewhere}},
        )


main()
