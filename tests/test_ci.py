"""What .ci/run tests, and on which Pythons; make is one that only says how it was called."""

from __future__ import annotations

import re
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
        for real in ("bash", "dirname", "grep", "mktemp", "rm", "tee", "timeout"):
            found = shutil.which(real)
            assert found
            (self.bin / real).symlink_to(found)
        for stub in ("gcc", "redis-server", "ip", "openssl"):
            program(self.bin / stub, "exit 0")
        self.installs("plain: there was no C compiler (/nonexistent)")

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

    def installs(self, engine: str) -> None:
        """What make says of the engine that it has installed without a compiler."""
        says = f'[ "$CC" != /nonexistent ] || echo "Engine: {engine}"'
        program(self.bin / "make", f'echo "make $*"\n{says}')

    def start(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.bin / "bash", SCRIPT],
            env={"PATH": str(self.bin), "PYENV_ROOT": str(self.pyenv)},
            capture_output=True,
            text=True,
        )

    def run(self) -> list[str]:
        """What .ci/run says, line by line; its make says `make` and its arguments."""
        done = self.start()
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
    first, *_, second, left_out = machine.run()
    assert first == "make test"
    assert second == "make quick PYTHON=python3.13"
    assert left_out.startswith("Skipped on Python 3.13: ")


def test_a_name_with_no_python_behind_it_is_none(machine: Machine) -> None:
    machine.has_shim("3.13")
    machine.has("3.12")
    assert "make quick PYTHON=python3.12" in machine.run()


def test_a_python_that_only_pyenv_knows_is_found(machine: Machine) -> None:
    machine.has_shim("3.13")
    there = machine.pyenv_has("3.13")
    assert f"make quick PYTHON={there}" in machine.run()


def test_the_second_python_is_another_than_python3(machine: Machine) -> None:
    machine.has("3.13", "python3")
    machine.has("3.13")
    machine.has("3.11")
    assert "make quick PYTHON=python3.11" in machine.run()


def test_without_a_second_python_it_is_said_that_its_tests_are_skipped(machine: Machine) -> None:
    machine.has("3.11")
    machine.has_shim("3.12")
    first, *_, skipped = machine.run()
    assert first == "make test"
    assert skipped.startswith("Skipped: the tests on a second Python")
    assert skipped.endswith("but python3, 3.11")


def test_an_installation_without_a_compiler_is_tried_in_an_environment_of_its_own(
    machine: Machine,
) -> None:
    _, demo, engine, _ = machine.run()
    made = re.fullmatch(r"make demo DURATION=1s VENV=(/\S+)/venv", demo)
    assert made
    assert not Path(made[1]).exists()
    assert engine == "Engine: plain: there was no C compiler (/nonexistent)"


def test_an_engine_that_is_there_without_a_compiler_is_a_failure(machine: Machine) -> None:
    machine.installs("compiled: /usr/lib/counter_turn.so")
    assert machine.start().returncode == 1


def test_a_system_without_what_a_compiler_needs_gets_it(machine: Machine) -> None:
    program(machine.bin / "gcc", "exit 1")
    program(machine.bin / "sudo", 'exec "$@"')
    program(machine.bin / "apt-get", 'echo "apt-get $*"')
    assert machine.run()[1] == "apt-get install -qy --no-install-recommends gcc libc6-dev"
