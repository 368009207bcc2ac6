"""What pip installs: the library under one name of its own, and an application that uses it
and whose own modules have the other names of its source.
"""

from __future__ import annotations

import ast
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from importlib.metadata import distribution
from pathlib import Path

import pytest

from counter.system.version import VERSION
from kit.harness import ROOT, ScriptedServer, ServerCommand, receive_exactly

PIP = (sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check")
WHEEL = ("wheel", "--no-index", "--no-deps", "--no-build-isolation")

# Names that the source of the library has too, each of them the application's own here.
MODULES = (
    "client.py",
    "client_line.py",
    "protocol.py",
    "log.py",
    "settings.py",
    "counter/__init__.py",
)

APPLICATION = """
import sys
from typing import assert_type

import client
import client_line
import counter
import log
import protocol
import settings
from counter_client import AmountError, ConnectError, CounterClient, CounterError, OutcomeUnknown

address, silent = sys.argv[1:]
own = (client, client_line, counter, log, protocol, settings)
assert all(module.MINE for module in own)

with CounterClient(address, timeout=10) as shared:
    assert assert_type(shared.add(5), int) == 5
    assert assert_type(shared.add_many([1, 2, 3]), list[int]) == [6, 8, 11]
    assert assert_type(shared.total(), int) == 11
    try:
        shared.add(-1)
    except AmountError as error:
        print("refused:", error)
try:
    CounterClient("127.0.0.1:1").add(1)
except ConnectError as error:
    print("not connected:", error)
try:
    CounterClient(silent).add(7)
except CounterError as error:
    assert isinstance(error, OutcomeUnknown)
    print("unknown:", assert_type(error.amounts, tuple[int, ...]))
"""


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False
    )


def copy_source(folder: Path) -> Path:
    """The source as somebody has it who has just got it: what is built is built elsewhere."""
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    return shutil.copytree(ROOT, folder, ignore=left_out)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip builds of the source."""
    folder = tmp_path_factory.mktemp("wheel")
    done = run(*PIP, *WHEEL, "--wheel-dir", folder, copy_source(folder / "source"))
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel, xxhash and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    assert run(sys.executable, "-m", "venv", "--without-pip", folder).returncode == 0
    (packages,) = folder.glob("lib/python3*/site-packages")
    here = Path(str(distribution("xxhash").locate_file("")))
    for part in (here / "xxhash", *here.glob("xxhash-*.dist-info")):
        (packages / part.name).symlink_to(part)
    python = folder / "bin/python"
    # Without an index: whatever else the wheel needed could not be found.
    done = run(*PIP, "--python", python, "install", "--no-index", wheel)
    assert done.returncode == 0, done.stderr
    return python


@pytest.fixture
def application(tmp_path: Path) -> Path:
    """The folder of an application that uses the library."""
    for name in MODULES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("MINE = True\n")
    (tmp_path / "app.py").write_text(APPLICATION)
    return tmp_path


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as files:
        return message_from_bytes(files.read(f"counter_client-{VERSION}.dist-info/METADATA"))


def test_the_wheel_holds_the_library_and_nothing_else(wheel: Path) -> None:
    about = f"counter_client-{VERSION}.dist-info"
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        assert {name for name in names if not name.startswith(f"{about}/")} == {
            "counter_client/__init__.py",
            "counter_client/protocol.py",
            "counter_client/py.typed",
            "counter_client/client_line.py",
            "counter_client/client_session.py",
            "counter_client/client_session_line.py",
        }
        assert files.read("counter_client/protocol.py") == (ROOT / "protocol.py").read_bytes()
        assert files.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert files.read(f"{about}/top_level.txt") == b"counter_client\n"


def test_the_library_has_no_command_and_imports_what_is_beside_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        tree = ast.parse(files.read("counter_client/__init__.py"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert {name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names} == {
        ".client_line",
        ".client_session",
        ".client_session_line",
        ".protocol",
    }
    assert not [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"]


def test_the_wheel_is_described_as_the_project_is(wheel: Path) -> None:
    about = metadata(wheel)
    assert (about["Name"], about["Version"]) == ("counter-client", VERSION)
    assert (about["License-Expression"], about["License-File"]) == ("MIT", "LICENSE")
    assert about["Requires-Python"] == ">=3.11"
    assert about["Author"] == "the counter authors"


def test_the_library_needs_xxhash_alone_in_the_versions_that_the_server_takes(wheel: Path) -> None:
    (needed,) = metadata(wheel).get_all("Requires-Dist", [])
    (wanted,) = re.findall(r"^xxhash(.*)$", (ROOT / "requirements.txt").read_text(), re.M)
    assert needed.startswith("xxhash")
    assert set(needed.removeprefix("xxhash").split(",")) == set(wanted.split(","))


def test_an_application_with_modules_of_the_same_names_adds_and_catches_errors(
    python: Path, application: Path
) -> None:
    def read_and_hang_up(sock: socket.socket) -> None:
        receive_exactly(sock, 16)

    with ServerCommand() as server, ScriptedServer(read_and_hang_up) as silent:
        done = run(python, "-W", "error", "app.py", server.address, silent.address, cwd=application)
        assert (done.returncode, done.stderr) == (0, "")
        refused, unconnected, unknown = done.stdout.splitlines()
        assert refused.startswith("refused: ")
        assert unconnected.startswith("not connected: cannot connect to 127.0.0.1:1")
        assert unknown == "unknown: (7,)"
        assert server.stop()[0] == 11


def test_an_application_has_the_types_of_the_library(python: Path, application: Path) -> None:
    mypy = (sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir=cache")
    done = run(*mypy, "--python-executable", python, "app.py", cwd=application)
    assert done.returncode == 0, done.stdout


def test_the_example_of_the_readme_runs_where_the_library_is_installed(
    python: Path, application: Path
) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    with ServerCommand() as server:
        assert "127.0.0.1:8080" in example
        example = example.replace("127.0.0.1:8080", server.address)
        (application / "example.py").write_text(f"{example}print(total, totals, now)\n")
        done = run(python, "example.py", cwd=application)
        assert (done.stdout, done.stderr) == ("5 [6, 8, 11] 11\n", "")
        server.stop()


def test_an_editable_installation_is_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    build = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    done = run(sys.executable, "-c", build, cwd=copy_source(tmp_path / "source"))
    assert done.returncode == 1
    assert "cannot be installed editable; import client.py in the checkout" in done.stderr


@pytest.mark.parametrize(
    "line", ["from protocol import TOTAL_MASK\n", "\n\n\ndef main() -> None: ...\n"]
)
def test_a_source_that_is_not_what_it_is_taken_for_is_not_built(line: str, tmp_path: Path) -> None:
    source = copy_source(tmp_path / "source")
    with open(source / "client.py", "a") as client:
        client.write(line)
    done = run(*PIP, *WHEEL, "--wheel-dir", tmp_path, source)
    assert done.returncode == 1
    assert "2 times, not once" in done.stderr + done.stdout
    assert not [*tmp_path.glob("*.whl")]
