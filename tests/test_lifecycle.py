"""Before a server serves and after it has: signals, stores that hang, processes that fail."""

from __future__ import annotations

import fcntl
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit.admin_server import AdminServer
from kit.harness import ROOT, Command, Peer, ServerCommand, wait_until
from kit.redis_server import RedisServer

PROCESSES = pytest.mark.parametrize("processes", ["0", "2"])


@contextmanager
def queue_held(path: Path) -> Iterator[None]:
    """Keeps a store's queue, as a server would whose disk hangs."""
    lock = os.open(f"{path}-queue", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def waits_for(pid: int, path: Path) -> bool:
    """Whether a process or a child of it has the file of the queue open."""
    found = []
    for one in [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]:
        for fd in Path(f"/proc/{one}/fd").iterdir():
            try:
                found.append(os.readlink(fd))
            except FileNotFoundError:
                continue
    return f"{path}-queue" in found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_server_serves_ends_it_in_order(
    number: signal.Signals, tmp_path: Path
) -> None:
    path = tmp_path / "counter.db"
    with queue_held(path), Command("server.py", "--port", "0", "--store", f"sqlite:{path}") as it:
        wait_until(lambda: waits_for(it.process.pid, path), "it waits for its turn")
        it.signal(signal.SIGHUP)
        it.signal(signal.SIGUSR1)
        it.signal(number)
        assert it.finish() == 0
        assert (it.output(), it.errors()) == ("", "")


@PROCESSES
def test_a_server_ends_with_its_total_while_another_keeps_the_queue(
    processes: str, tmp_path: Path
) -> None:
    path = tmp_path / "counter.db"
    with ServerCommand("--store", f"sqlite:{path}", "--processes", processes) as server:
        with server.connect() as peer:
            peer.add(7)
        with queue_held(path):
            assert server.stop() == (7, 1)


def test_processes_that_cannot_boot_end_a_server_that_has_an_admin_port() -> None:
    script = (
        "import counter.serving.server, os, server, sys\n"
        "def fail(*_): os.kill(os.getpid(), 9)\n"
        "counter.serving.server.make_decoder = fail\n"
        "sys.exit(server.main(['--port', '0', '--adminPort', '0']))\n"
    )
    with Command("-c", script) as server:
        assert server.finish() == 3
        assert "serving process" in server.errors().splitlines()[-1]


def test_a_redis_that_refuses_writes_is_away_until_it_takes_them() -> None:
    with RedisServer() as redis, AdminServer("--store", redis.url()) as server:
        redis.ask("CONFIG", "SET", "maxmemory", "1")
        wait_until(lambda: server.get("readyz")[0] == 503, "it is found out")
        assert "has been away for" in server.get("readyz")[1]
        redis.ask("CONFIG", "SET", "maxmemory", "0")
        wait_until(lambda: server.get("readyz")[0] == 200, "it is back")
        with server.connect() as peer:
            assert peer.add(1) == 1
        server.stop()


def test_the_commands_that_the_documents_list_for_an_acl_are_enough() -> None:
    document = (ROOT / "docs/operations.md").read_text()
    (listed,) = re.findall(r"An ACL needs (.*?) on `~counter`", document, re.S)
    rules = [f"+{name.lower()}" for name in re.findall(r"`([A-Z]+)`", listed)]
    assert len(rules) > 8
    with RedisServer() as redis:
        keys = ["~counter", "~{counter}:*"]
        redis.ask("ACL", "SETUSER", "counting", "on", ">word", *keys, *rules)
        url = redis.url().replace("redis://", "redis://counting:word@")
        with ServerCommand("--store", url) as server:
            with server.connect() as peer:
                assert peer.add(4) == 4
            assert server.stop() == (4, 1)


def test_a_start_that_fails_leaves_a_new_store_without_the_total_it_was_to_have(
    tmp_path: Path,
) -> None:
    store = ["--store", f"sqlite:{tmp_path}/counter.db", "--setTotal", "5"]
    with Command("server.py", "--port", "0", *store, "--adminPort", "0", "--adminHost", "?") as it:
        assert it.finish() == 1
        assert "--adminHost" in it.errors()
    with ServerCommand(*store) as server:
        assert server.stop() == (5, 0)


def test_a_store_that_is_no_file_is_refused_and_nothing_is_put_beside_it(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with Command("server.py", "--port", "0", "--store", f"sqlite:{pipe}") as it:
        assert it.finish() == 1
        assert "not a regular file" in it.errors()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@PROCESSES
@pytest.mark.parametrize("variable", ["GEVENT_LOOP=libuv", "LIBEV_FLAGS=1", "LIBEV_FLAGS=2"])
def test_gevents_environment_changes_nothing(processes: str, variable: str) -> None:
    name, _, value = variable.partition("=")
    flags = ("--port", "0", "--processes", processes, "--adminPort", "0")
    with Command("server.py", *flags, environment={name: value}) as server:
        with Peer(server.line().split()[2]) as peer:
            assert peer.add(5) == 5
        server.signal(signal.SIGTERM)
        assert server.finish() == 0
        assert "Traceback" not in server.errors()


@PROCESSES
def test_a_thread_that_cannot_be_had_is_said_with_the_remedy(
    processes: str, tmp_path: Path
) -> None:
    script = (
        "import _thread, server, sys\n"
        'def refuse(*_): raise RuntimeError("can\'t start new thread")\n'
        "_thread.start_new_thread = refuse\n"
        "sys.exit(server.main(sys.argv[1:]))\n"
    )
    store = ("--store", f"sqlite:{tmp_path / 'counter.db'}")
    with Command("-c", script, "--port", "0", "--processes", processes, *store) as server:
        assert server.finish() == (1 if processes == "0" else 3)
        said = server.errors()
        assert "no thread for the store: can't start new thread; raise the limit" in said
        assert "Traceback" not in said
