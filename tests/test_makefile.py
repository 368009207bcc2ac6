"""Which environment make takes, or would make, for which Python; nothing is installed here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project that has what the Makefile looks at, on a machine whose python3 is 3.11."""
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(PROJECT / name, tmp_path)
    shutil.copytree(PROJECT / "counter/turn", tmp_path / "counter/turn")
    (tmp_path / "bin").mkdir()
    python(tmp_path, "python3", "3.11")
    return tmp_path


def python(folder: Path, name: str, version: str) -> None:
    """A Python that only tells its version."""
    program = folder / "bin" / name
    program.write_text(f"#!/bin/sh\necho {version}\n")
    program.chmod(0o755)


def installed(folder: Path, environment: str, version: str) -> None:
    """Leaves an environment as make does."""
    (folder / environment).mkdir()
    for stamp in ("run", "dev"):
        (folder / environment / f"{stamp}-{version}.stamp").touch()


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """make, on its own whatever make has started this suite."""
    inherited = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "PYTHON"}
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    environment["PATH"] = f"{folder}/bin:{environment['PATH']}"
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_python3_has_the_environment_that_the_documents_name(folder: Path) -> None:
    done = make(folder, "-n", "test")
    assert done.returncode == 0, done.stderr
    assert ".venv/bin/python -m pytest" in done.stdout
    assert ".venv-" not in done.stdout


def test_another_python_has_an_environment_of_its_own_and_make_says_so(folder: Path) -> None:
    python(folder, "python3.13", "3.13")
    installed(folder, ".venv", "3.11")
    done = make(folder, "-n", "test", "PYTHON=python3.13")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Python 3.13 in .venv-3.13\n")
    assert "python3.13 -m venv --clear .venv-3.13\n" in done.stdout
    assert ".venv-3.13/bin/python -m pytest" in done.stdout
    assert ".venv/" not in done.stdout


def test_an_environment_that_is_there_is_taken_as_it_is(folder: Path) -> None:
    installed(folder, ".venv", "3.11")
    done = make(folder, "-n", "test")
    assert done.returncode == 0, done.stderr
    assert "venv --clear" not in done.stdout
    assert "pip install" not in done.stdout


def test_the_environment_of_a_python3_that_became_another_version_is_made_anew(
    folder: Path,
) -> None:
    installed(folder, ".venv", "3.11")
    python(folder, "python3", "3.13")
    done = make(folder, "-n", "test")
    assert done.returncode == 0, done.stderr
    assert "python3 -m venv --clear .venv\n" in done.stdout


def test_newer_requirements_are_installed_into_the_environment_that_is_there(folder: Path) -> None:
    installed(folder, ".venv", "3.11")
    later = (folder / ".venv/dev-3.11.stamp").stat().st_mtime + 1
    os.utime(folder / "requirements.txt", (later, later))
    done = make(folder, "-n", "test")
    assert done.returncode == 0, done.stderr
    assert "--clear" not in done.stdout
    assert "-r requirements.txt" in done.stdout
    assert "-r requirements-dev.txt" in done.stdout


@pytest.mark.parametrize("name", ["source.c", "source.h", "setup.py", "pyproject.toml"])
def test_another_source_of_the_engine_has_it_installed_anew_and_make_says_which_there_is(
    name: str, folder: Path
) -> None:
    installed(folder, ".venv", "3.11")
    later = (folder / ".venv/dev-3.11.stamp").stat().st_mtime + 1
    os.utime(folder / "counter/turn" / name, (later, later))
    done = make(folder, "-n", "demo")
    assert done.returncode == 0, done.stderr
    _, _, behind = done.stdout.partition("-r requirements.txt\n")
    assert behind.startswith(".venv/bin/python -m counter.turn.library")


def test_the_long_tests_are_run_with_sources_that_watch_themselves_too(folder: Path) -> None:
    installed(folder, ".venv", "3.11")
    done = make(folder, "-n", "chaos", "SANITIZE=tests/turn tests/serving")
    assert done.returncode == 0, done.stderr
    built, run, long = (
        done.stdout.index(text)
        for text in ("-fsanitize=address,undefined", "-m pytest tests/turn tests/serving", "LONG=1")
    )
    assert built < run < long


def test_a_python_that_cannot_be_run_is_refused_in_one_line_with_the_remedy(folder: Path) -> None:
    broken = folder / "bin/python3.12"
    broken.write_text("#!/bin/sh\necho python3.12: command not found >&2\nexit 127\n")
    broken.chmod(0o755)
    done = make(folder, "test", "PYTHON=python3.12")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "python3.12 cannot be run; name a Python that can, as in PYTHON=" in line


def test_clean_forgets_every_environment_and_nothing_else(folder: Path) -> None:
    for environment in (".venv", ".venv-3.12", ".venv-3.13", ".venv-mine"):
        installed(folder, environment, "3.12")
    done = make(folder, "clean", "PYTHON=missing")
    assert done.returncode == 0, done.stderr
    assert [found.name for found in folder.glob(".venv*")] == [".venv-mine"]


def test_clean_removes_what_building_the_package_left(folder: Path) -> None:
    (folder / "build/lib").mkdir(parents=True)
    (folder / "counter_client.egg-info").mkdir()
    before = {found.name for found in folder.iterdir()}
    assert make(folder, "clean").returncode == 0
    after = {found.name for found in folder.iterdir()}
    assert before - after == {"build", "counter_client.egg-info"}
