"""Who may import whom, where import-linter does not look: the faces, and what is loaded when.

pyproject.toml has the contracts of the package.
"""

from __future__ import annotations

import ast
import signal
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

from kit.certificates import TlsPeer, kit
from kit.harness import ROOT, Command
from kit.redis_server import RedisServer

LIBRARY = {"client_line", "client_session", "client_session_line"}
OURS = {"client", "counter", "protocol", "server"} | LIBRARY

SERVER = {"protocol"} | {
    f"counter.{room}"
    for room in ("serving", "admin", "totals", "options", "processes", "tls", "turn", "system")
}
COMMAND = {"protocol"} | {
    f"counter.{room}" for room in ("load", "report", "results", "options", "tls", "system")
}

PACKAGES = sorted({str(path.parent.relative_to(ROOT)) for path in (ROOT / "counter").rglob("*.py")})

# What a master must not have: the processes that it forks would share its state, or it would have
# threads when it forks. Each serving process loads it for itself.
HEAVY = {"numpy", "redis", "ssl", "_ssl"}

# Notes each import of each process, and is server.py otherwise.
WATCHED = """
import os, runpy, sys
write, pid = os.write, os.getpid
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def note(event, arguments):
    if event == "import":
        write(log, f"{pid()} {arguments[0]}\\n".encode())
sys.addaudithook(note)
sys.argv[:2] = ["server.py"]
runpy.run_path("server.py", run_name="__main__")
"""


def body(module: str) -> list[ast.stmt]:
    return ast.parse((ROOT / module).read_text()).body


def rooms(statements: Iterable[ast.stmt]) -> set[str]:
    """What of ours is imported by statements, or anywhere inside them: modules, and packages below
    counter/."""
    names = set()
    for node in (inner for statement in statements for inner in ast.walk(statement)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "the modules beside it are in no package"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names]
    return {
        ".".join(name[:2]) if name[0] == "counter" else name[0] for name in parts if name[0] in OURS
    }


def test_the_wire_imports_nothing_of_ours() -> None:
    assert rooms(body("protocol.py")) == set()


def test_the_server_imports_what_it_puts_together() -> None:
    assert rooms(body("server.py")) <= SERVER


def test_what_is_beside_the_library_imports_the_wire_and_downwards() -> None:
    assert rooms(body("client_line.py")) == {"protocol"}
    assert rooms(body("client_session.py")) == {"protocol"}
    assert rooms(body("client_session_line.py")) == {"protocol", "client_line", "client_session"}


def test_the_library_imports_what_is_beside_it_and_the_command_what_it_runs() -> None:
    statements = body("client.py")
    names = [getattr(statement, "name", "") for statement in statements]
    command = names.index("main")
    assert rooms(statements[:command]) == {"protocol"} | LIBRARY
    assert rooms(statements[command:]) <= COMMAND


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_lives_in_it_and_imports_nothing(package: str) -> None:
    (statement,) = body(f"{package}/__init__.py")
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Constant)
    assert isinstance(statement.value.value, str)


def test_no_folder_hides_a_module_beside_it() -> None:
    assert not [name for name in OURS - {"counter"} if (ROOT / name).is_dir()]


def test_a_master_never_loads_what_its_serving_processes_need(tmp_path: Path) -> None:
    with RedisServer() as redis:
        log = tmp_path / "imports"
        flags = (*kit().server.server_flags(), "--store", redis.url(), "--adminPort", "0")
        options = ("--port", "0", "--processes", "2", *flags)
        with Command("-c", WATCHED, str(log), *options) as server:
            address = server.line().split()[2]
            with TlsPeer(address) as peer:
                assert peer.add(5) == 5
            server.signal(signal.SIGHUP)
            server.error_line_with("the certificates were loaded again")
            server.signal(signal.SIGUSR1)
            server.error_line_with("settings")
            server.signal(signal.SIGTERM)
            assert server.finish() == 0
            loaded = defaultdict(set)
            for line in log.read_text().splitlines():
                pid, name = line.split()
                loaded[int(pid)].add(name.partition(".")[0])
            master = loaded.pop(server.process.pid)
    assert "gevent" in master
    assert not master & HEAVY
    assert any(names >= HEAVY for names in loaded.values()), "what they need is not known here"
