"""How the compiled engine comes to be there: built by pip or not, found or refused, in words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from counter.turn.library import INTERFACE, SOURCES
from counter.turn.source_hash import source_hash
from kit.engine import compiled, needs_compiler
from kit.harness import ROOT

PIP = (sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "install")
HERE = ("--no-index", "--no-deps", "--no-build-isolation", "--upgrade", "--target")


class Checkout:
    """A copy of the package, and a folder that its engine is installed into."""

    def __init__(self, folder: Path) -> None:
        left_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "counter", folder / "counter", ignore=left_out)
        self.folder, self.packages = folder, folder / "packages"
        self.sources = folder / "counter/turn"

    def install(self, **environment: str) -> str:
        """Installs the engine as requirements.txt does; gives back what pip says, unasked."""
        done = subprocess.run(
            [*PIP, "--quiet", *HERE, self.packages, "./counter/turn"],
            cwd=self.folder,
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def engine(self, *flags: str) -> tuple[str, int]:
        """What the command says, in one line, and its exit code."""
        done = subprocess.run(
            [sys.executable, *flags, "-m", "counter.turn.library"],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(self.packages)},
            capture_output=True,
            text=True,
        )
        assert done.stderr == ""
        (line,) = done.stdout.splitlines()
        return line, done.returncode

    def library(self) -> Path:
        """The library that was installed."""
        (built,) = self.packages.glob("counter_turn*.so")
        return built

    def put(self, name: str, content: bytes) -> Path:
        """A file of somebody else's where the library is looked for first."""
        self.packages.mkdir()
        (self.packages / name).write_bytes(content)
        return self.packages / name

    def files(self) -> set[Path]:
        """All there is of the sources."""
        return {path for path in self.sources.rglob("*") if path.suffix != ".pyc"}


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


# The engine of the environment that this suite runs in would be found behind a folder without one.
BY_ITSELF = "-S"


def test_where_a_compiler_is_the_engine_is_the_compiled_one() -> None:
    library = compiled()
    assert library.ffi.string(library.lib.turn_source()).decode() == source_hash(SOURCES)


def test_every_function_of_the_interface_is_in_the_library() -> None:
    lib = compiled().lib
    assert "turn_source" in dir(lib)
    for name in dir(lib):
        getattr(lib, name)


def test_the_interface_is_every_header_that_is_declarations_alone() -> None:
    headers = {path.name: path.read_text() for path in SOURCES.glob("*.h")}
    assert set(INTERFACE) == {name for name, text in headers.items() if "\n#" not in f"\n{text}"}


@needs_compiler
def test_an_installation_builds_it_without_a_warning_and_writes_nothing_beside_the_sources(
    checkout: Checkout,
) -> None:
    before = checkout.files()
    assert checkout.install(CFLAGS="-Werror") == ""
    assert checkout.engine() == (f"Engine: compiled: {checkout.library()}", 0)
    assert checkout.files() == before


def test_without_a_compiler_it_is_installed_all_the_same_and_the_engine_says_why(
    checkout: Checkout,
) -> None:
    assert checkout.install(CC="/nonexistent") == ""
    assert checkout.engine(BY_ITSELF) == (
        "Engine: plain: there was no C compiler (/nonexistent) when it was installed; with one, "
        "pip install -r requirements.txt builds it",
        1,
    )


@needs_compiler
def test_a_source_that_cannot_be_compiled_is_told_with_its_place(checkout: Checkout) -> None:
    with open(checkout.sources / "source.c", "a") as source:
        source.write("int nothing(void) { return }\n")
    where = len((checkout.sources / "source.c").read_text().splitlines())
    assert checkout.install(LC_ALL="de_DE.UTF-8") == ""
    line, code = checkout.engine(BY_ITSELF)
    assert line.startswith(f"Engine: plain: it could not be compiled: source.c:{where}:")
    assert code == 1


@needs_compiler
def test_what_another_build_left_beside_the_sources_is_not_installed(checkout: Checkout) -> None:
    assert checkout.install() == ""
    left = checkout.sources / "build" / f"lib.{checkout.library().name}"
    left.mkdir(parents=True)
    shutil.copy(checkout.library(), left)
    shutil.rmtree(checkout.packages)
    checkout.install(CC="/nonexistent")
    assert not [*checkout.packages.glob("*.so")]


@needs_compiler
def test_a_library_of_other_sources_is_refused_until_it_is_built_anew(checkout: Checkout) -> None:
    checkout.install()
    with open(checkout.sources / "source.h", "a") as source:
        source.write("/* another */\n")
    built = checkout.library()
    assert checkout.engine() == (
        f"Engine: plain: {built} was built from other sources; "
        "pip install -r requirements.txt builds it anew",
        1,
    )
    checkout.install()
    assert checkout.engine() == (f"Engine: compiled: {built}", 0)


@needs_compiler
def test_a_library_of_somebody_else_is_refused(checkout: Checkout) -> None:
    (checkout.sources / "source.c").write_text("int nothing(void) { return 0; }\n")
    checkout.install()
    line = f"Engine: plain: {checkout.library()} is not what is built here; remove it"
    assert checkout.engine() == (line, 1)


@needs_compiler
def test_a_library_whose_sources_are_not_here_is_not_used(checkout: Checkout) -> None:
    checkout.install()
    (checkout.sources / "source.h").unlink()
    line, code = checkout.engine()
    assert line.startswith("Engine: plain: its sources cannot be read: ")
    assert "source.h" in line
    assert code == 1


def test_a_file_of_its_name_is_opened_and_never_imported(checkout: Checkout) -> None:
    path = checkout.put("counter_turn.py", b"raise SystemExit('imported')\n")
    line, code = checkout.engine()
    assert line.startswith(f"Engine: plain: cannot load library '{path}'")
    assert line.endswith("; pip install -r requirements.txt builds it anew")
    assert code == 1


def test_a_folder_of_its_name_is_no_library(checkout: Checkout) -> None:
    (checkout.packages / "counter_turn").mkdir(parents=True)
    line, code = checkout.engine(BY_ITSELF)
    assert line.startswith("Engine: plain: there is a folder called counter_turn in its place")
    assert code == 1


def test_where_it_was_never_installed_the_engine_says_so(checkout: Checkout) -> None:
    assert checkout.engine(BY_ITSELF) == (
        "Engine: plain: it is not installed; pip install -r requirements.txt builds it",
        1,
    )


def test_without_cffi_the_engine_says_so(checkout: Checkout) -> None:
    checkout.put("counter_turn.so", b"")
    assert checkout.engine(BY_ITSELF) == (
        "Engine: plain: cffi is not installed; pip install -r requirements.txt",
        1,
    )
