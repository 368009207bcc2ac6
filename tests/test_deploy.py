"""Where it runs: what systemd and Kubernetes are told, and what SIGUSR1 writes."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from counter.options.parser import ServerSettings, read_settings
from kit.harness import PATIENCE_S, ROOT, Command, ServerCommand, wait_until

PROCESSES = pytest.mark.parametrize("processes", ["0", "2"])


def manager(path: str) -> socket.socket:
    """A service manager's end of the notification socket."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind("\0" + path[1:] if path.startswith("@") else path)
    sock.settimeout(PATIENCE_S)
    return sock


class NotifyingServer(Command):
    """python server.py with a service manager to tell."""

    def __init__(self, path: str, *arguments: str) -> None:
        super().__init__(
            "server.py", "--port", "0", *arguments, environment={"NOTIFY_SOCKET": path}
        )


@PROCESSES
@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told_of_start_reload_and_stop(
    processes: str, abstract: bool, tmp_path: Path
) -> None:
    path = f"@counter-{tmp_path.name}-{processes}" if abstract else str(tmp_path / "notify")
    with manager(path) as told, NotifyingServer(path, "--processes", processes) as server:
        assert told.recv(1000).startswith(b"READY=1")
        assert "Listening on" in server.line()
        server.signal(signal.SIGHUP)
        assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+", told.recv(1000))
        assert told.recv(1000) == b"READY=1"
        server.signal(signal.SIGTERM)
        assert told.recv(1000) == b"STOPPING=1"
        assert server.finish() == 0


def test_a_service_manager_that_is_gone_is_logged_and_no_more(tmp_path: Path) -> None:
    with NotifyingServer(str(tmp_path / "nobody"), "--processes", "1") as server:
        assert "Listening on" in server.line()
        server.error_line_with("cannot notify the service manager")
        server.signal(signal.SIGTERM)
        assert server.finish() == 0


def test_the_unit_is_one_that_systemd_accepts(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    unit = (ROOT / "deploy/counter.service").read_text()
    # It looks whether the program is there, which it is where the unit is installed.
    here = unit.replace("/opt/counter/.venv/bin/python", sys.executable)
    copy = tmp_path / "counter.service"
    copy.write_text(here.replace("/opt/counter", str(ROOT)))
    done = subprocess.run([analyze, "verify", str(copy)], capture_output=True, text=True)
    # Of units of the machine's own it may complain as well.
    assert "counter.service" not in done.stderr
    assert done.returncode == 0


def test_the_unit_sets_only_options_that_there_are() -> None:
    unit = (ROOT / "deploy/counter.service").read_text()
    environment = dict(re.findall(r"^Environment=(COUNTER_\w+)=(.*)$", unit, re.MULTILINE))
    settings = read_settings(ServerSettings, "server.py", "", [], environment)
    assert settings.store.path == "/var/lib/counter/counter.db"
    assert settings.admin_port == 8580


def test_the_manifest_starts_the_server_with_options_that_there_are() -> None:
    manifest = (ROOT / "deploy/kubernetes.yaml").read_text()
    (listed,) = re.findall(r"args: \[(.*?)\]", manifest, re.DOTALL)
    program, script, *arguments = re.findall(r'"([^"]*)"', listed)
    assert (program, script) == ("python", "server.py")
    settings = read_settings(
        ServerSettings, "server.py", "", arguments, {"COUNTER_SERVER_STORE": "redis://redis"}
    )
    assert (settings.host, settings.admin_host, settings.admin_port) == ("0.0.0.0", "0.0.0.0", 8580)
    assert settings.drain_timeout_s + 5 < 20  # preStop's sleep, and the grace period


@PROCESSES
def test_sigusr1_writes_settings_counts_and_stacks_and_stops_nothing(processes: str) -> None:
    with ServerCommand("--processes", processes, "--maxIncrement", "77") as server:
        with server.connect() as peer:
            peer.add(5)
            server.signal(signal.SIGUSR1)
            server.error_line_with("SIGUSR1")
            server.error_line_with("max_increment = 77")
            assert '"total": "5"' in server.error_line_with('"total"')
            for _ in range(max(1, int(processes))):
                server.error_line_with("* Greenlets")
            assert peer.add(1) == 6
        assert server.stop()[0] == 6


def test_sigusr1_shows_no_password(tmp_path: Path) -> None:
    from kit.redis_server import RedisServer

    with RedisServer() as redis:
        assert redis.ask("CONFIG", "SET", "requirepass", "hushhush")
        url = redis.url().replace("redis://", "redis://:hushhush@")
        with ServerCommand("--store", url, "--processes", "0") as server:
            server.signal(signal.SIGUSR1)
            assert "***" in server.error_line_with("store = ")
            server.stop()
            assert "hushhush" not in server.errors()


def test_a_reload_without_tls_is_said_and_ends_nothing() -> None:
    with ServerCommand("--processes", "2") as server:
        server.signal(signal.SIGHUP)
        server.error_line_with("there is nothing to load again")
        with server.connect() as peer:
            wait_until(lambda: peer.add(1) > 0, "it serves")
        server.stop()
