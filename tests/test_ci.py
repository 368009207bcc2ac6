"""Which Pythons .ci/run tests on; make is one that only says how it was called."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci/run"


class Machine:
    """A machine that has the programs of these folders and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.pyenv = folder / "bin", folder / "pyenv"
        self.bin.mkdir()
        for real in ("bash", "dirname"):
            found = shutil.which(real)
            assert found
            (self.bin / real).symlink_to(found)
        for stub in ("redis-server", "ip", "openssl"):
            program(self.bin / stub, "exit 0")
        program(self.bin / "make", 'echo "make $*"')

    def has(self, version: str, name: str = "") -> None:
        """A Python on PATH."""
        program(self.bin / (name or f"python{version}"), f"echo {version}")

    def has_shim(self, version: str) -> None:
        """A name on PATH with no Python behind it."""
        program(self.bin / f"python{version}", "exit 127")

    def pyenv_has(self, version: str) -> Path:
        """A Python of pyenv's that is not on PATH."""
        path = self.pyenv / f"versions/{version}.4/bin/python3"
        path.parent.mkdir(parents=True)
        program(path, f"echo {version}")
        return path

    def run(self) -> list[str]:
        """What .ci/run says, line by line; its make says `make` and its arguments."""
        done = subprocess.run(
            [self.bin / "bash", SCRIPT],
            env={"PATH": str(self.bin), "PYENV_ROOT": str(self.pyenv)},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()


def program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine whose python3 is 3.11."""
    made = Machine(tmp_path)
    made.has("3.11", "python3")
    return made


def test_the_newest_second_python_is_tested_too(machine: Machine) -> None:
    machine.has("3.12")
    machine.has("3.13")
    first, second, left_out = machine.run()
    assert first == "make test"
    assert second == "make quick PYTHON=python3.13"
    assert left_out.startswith("Skipped on Python 3.13: ")


def test_a_name_with_no_python_behind_it_is_none(machine: Machine) -> None:
    machine.has_shim("3.13")
    machine.has("3.12")
    assert machine.run()[1] == "make quick PYTHON=python3.12"


def test_a_python_that_only_pyenv_knows_is_found(machine: Machine) -> None:
    machine.has_shim("3.13")
    there = machine.pyenv_has("3.13")
    assert machine.run()[1] == f"make quick PYTHON={there}"


def test_the_second_python_is_another_than_python3(machine: Machine) -> None:
    machine.has("3.13", "python3")
    machine.has("3.13")
    machine.has("3.11")
    assert machine.run()[1] == "make quick PYTHON=python3.11"


def test_without_a_second_python_it_is_said_that_its_tests_are_skipped(machine: Machine) -> None:
    machine.has("3.11")
    machine.has_shim("3.12")
    first, skipped = machine.run()
    assert first == "make test"
    assert skipped.startswith("Skipped: the tests on a second Python")
    assert skipped.endswith("but python3, 3.11")
