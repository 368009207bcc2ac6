"""Where it runs: what systemd, Docker and Kubernetes are told, and what SIGUSR1 writes."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from counter.options.parser import read_settings
from counter.options.server import ServerSettings
from counter.processes.master import KILL_GRACE_S
from kit.engine import needs_compiler
from kit.harness import PATIENCE_S, ROOT, Command, ServerCommand, wait_until

MANIFESTS = sorted((ROOT / "deploy").glob("kubernetes-*.yaml"))
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
    settings = read_settings(ServerSettings, [], environment)
    assert settings.store.path == "/var/lib/counter/counter.db"
    assert settings.admin_port == 8580


def test_the_unit_tries_again_for_ever_but_not_with_a_wrong_option() -> None:
    class Unit(configparser.RawConfigParser):
        def optionxform(self, optionstr: str) -> str:
            return optionstr

    unit = Unit(strict=False)
    unit.read(ROOT / "deploy/counter.service")
    # systemd gives up after five starts in ten seconds unless it is told not to, in this section.
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert unit["Service"]["Restart"] == "on-failure"
    assert float(unit["Service"]["RestartSec"]) >= 2
    with Command("server.py", environment={"COUNTER_SERVER_PORT": "many"}) as server:
        assert server.finish() == int(unit["Service"]["RestartPreventExitStatus"])
    settings = read_settings(ServerSettings, [], {})
    assert settings.drain_timeout_s + KILL_GRACE_S < float(unit["Service"]["TimeoutStopSec"])


Instructions = list[tuple[str, str]]


def stages() -> tuple[Instructions, Instructions]:
    """What the Dockerfile says of the stage that builds and of the image, line by line: the
    instruction and what it is given."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    found = re.findall(r"^([A-Z]+)\s+(.+)$", text, re.MULTILINE)
    said = [(name, given.strip()) for name, given in found]
    build, image = (place for place, (name, _) in enumerate(said) if name == "FROM")
    assert build == 0
    return said[:image], said[image:]


def instructions() -> Instructions:
    """What the Dockerfile says of the image."""
    return stages()[1]


def lay_out(stage: Instructions, directory: Path) -> dict[str, str]:
    """Lays a stage's files out in a directory; gives back the environment of its processes."""
    environment: dict[str, str] = {}
    for name, given in stage:
        if name == "COPY" and not given.startswith("--from="):
            *sources, target = given.split()
            for path in [path for source in sources for path in ROOT.glob(source)]:
                lay(path, directory / target)
        elif name == "ENV":
            environment |= dict(pair.split("=") for pair in given.split())
    return environment


def lay(path: Path, target: Path) -> None:
    """Copies what of the context an instruction names."""
    context = (ROOT / ".dockerignore").read_text().split()
    within = path.relative_to(ROOT)
    assert {f"!{part}" for part in (within, *within.parents)} & set(context), path
    if path.is_dir():
        shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def test_the_image_has_the_files_that_it_runs_and_its_health_check_knows_the_server(
    tmp_path: Path,
) -> None:
    environment = lay_out(instructions(), tmp_path)
    assert environment.pop("PATH").endswith(":$PATH")
    (_, check), (_, command) = [
        (name, json.loads(given[given.index("[") :]))
        for name, given in instructions()
        if "[" in given and name in ("HEALTHCHECK", "CMD")
    ]
    assert command == ["python", "server.py"]
    assert environment["COUNTER_SERVER_HOST"] == "0.0.0.0"
    port = "COUNTER_SERVER_ADMIN_PORT"
    assert f"EXPOSE 8080 {environment[port]}" in [" ".join(line) for line in instructions()]
    free = {"COUNTER_SERVER_PORT": "0", port: "0"}
    with Command(str(tmp_path / "server.py"), environment=environment | free) as server:
        at = re.search(r":(\d+)/", server.error_line_with("admin port"))
        listening = re.match(r"Listening on 0.0.0.0:(\d+) ", server.line())
        assert at
        assert listening
        with Command(*check[1:], environment={port: at[1]}) as healthy:
            assert healthy.finish() == 0, healthy.errors()
        address = f"127.0.0.1:{listening[1]}"
        with Command(
            str(tmp_path / "client.py"), "--serverAddress", address, "--add", "5"
        ) as client:
            assert client.line() == "5"
        server.signal(signal.SIGTERM)
        assert server.finish() == 0
    with Command(*check[1:], environment={port: at[1]}) as unhealthy:
        assert unhealthy.finish() != 0


def test_the_image_has_the_environment_of_a_stage_that_has_a_compiler_and_none_itself() -> None:
    build, image = stages()
    (made,) = re.findall(r"-m venv --without-pip (\S+)", " ".join(given for _, given in build))
    name = build[0][1].split()[-1]
    assert ("COPY", f"--from={name} {made} {made}") in image
    assert ("ENV", f"PATH={made}/bin:$PATH") in image
    assert image[0][1] == build[0][1].split()[0]  # the same Python at the same place
    assert " gcc libc6-dev " in str(build)
    assert "gcc" not in str(image)


@needs_compiler
def test_the_engine_that_the_image_takes_over_is_of_the_sources_that_stand_in_it(
    tmp_path: Path,
) -> None:
    built, packages, image = tmp_path / "built", tmp_path / "packages", tmp_path / "image"
    for stage, folder in zip(stages(), (built, image), strict=True):
        lay_out(stage, folder)
    assert "./counter/turn" in (built / "requirements.txt").read_text().splitlines()
    pip = ("-m", "pip", "--isolated", "install", "--quiet", "--no-index", "--no-deps")
    local = ("--no-build-isolation", "--target", str(packages), "./counter/turn")
    subprocess.run([sys.executable, *pip, *local], cwd=built, check=True)
    (check,) = [given for name, given in instructions() if name == "RUN" and "counter." in given]
    done = subprocess.run(
        [sys.executable, *check.split()[1:]],
        cwd=image,
        env={"PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Engine: compiled: {packages}/")


def test_the_image_runs_as_the_user_who_owns_the_directory_of_the_total() -> None:
    (user,) = [given for name, given in instructions() if name == "USER"]
    (made,) = [shlex.split(given) for name, given in instructions() if given.endswith("/data")]
    owner, group = made[made.index("-o") + 1], made[made.index("-g") + 1]
    assert made[0] == "install"
    assert f"{owner}:{group}" == user
    compose = (ROOT / "docker-compose.yml").read_text()
    assert "COUNTER_SERVER_STORE: sqlite:/data/" in compose
    assert 'volumes: ["counter:/data"]' in compose
    for manifest in MANIFESTS:
        assert f"runAsUser: {owner}\n" in manifest.read_text()


def test_every_server_of_the_compose_file_can_be_reached_and_at_a_port_of_its_own() -> None:
    compose = (ROOT / "docker-compose.yml").read_text()
    published = re.findall(r'"127\.0\.0\.1:(\d+):8080"', compose)
    assert sorted(published) == ["8080", "8081", "8082", "8083"]
    for port in published:
        assert f"127.0.0.1:{port}" in compose.partition("\nservices:")[0]  # its comment names it


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_starts_the_server_with_options_that_there_are(manifest: Path) -> None:
    text = manifest.read_text()
    (listed,) = re.findall(r"args: \[(.*?)\]", text, re.DOTALL)
    program, script, *arguments = re.findall(r'"([^"]*)"', listed)
    assert (program, script) == ("python", "server.py")
    secret = {} if "--store" in arguments else {"COUNTER_SERVER_STORE": "redis://redis"}
    settings = read_settings(ServerSettings, arguments, secret)
    assert (settings.host, settings.admin_host) == ("0.0.0.0", "0.0.0.0")
    assert f"{{name: counter, containerPort: {settings.port}}}" in text
    assert f"{{name: admin, containerPort: {settings.admin_port}}}" in text
    assert f'prometheus.io/port: "{settings.admin_port}"' in text
    (sleep,) = re.findall(r'"sleep", "(\d+)"', text) or ["0"]
    (grace,) = re.findall(r"terminationGracePeriodSeconds: (\d+)", text)
    assert int(sleep) + settings.drain_timeout_s + KILL_GRACE_S < int(grace)
    if settings.store.kind == "sqlite":
        (mount,) = re.findall(r"mountPath: (/\w+)", text)
        assert settings.store.path == f"{mount}/counter.db"


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_only_a_minute_of_silence_has_a_pod_killed(manifest: Path) -> None:
    probes = dict(re.findall(r"(startup|liveness)Probe:\n((?: {12}\S.*\n)+)", manifest.read_text()))
    assert sorted(probes) == ["liveness", "startup"]
    for probe in probes.values():
        assert "path: /livez, port: admin" in probe
        numbers = {name: int(number) for name, number in re.findall(r"(\w+): (\d+)", probe)}
        assert numbers["timeoutSeconds"] >= 10
        assert numbers["failureThreshold"] * numbers["periodSeconds"] >= 60


@PROCESSES
def test_sigusr1_writes_settings_counts_and_stacks_and_stops_nothing(processes: str) -> None:
    with ServerCommand("--processes", processes, "--maxIncrement", "77") as server:
        with server.connect() as peer:
            peer.add(5)
            server.signal(signal.SIGUSR1)
            server.error_line_with("SIGUSR1")
            server.error_line_with("--maxIncrement = 77")
            assert '"total": "5"' in server.error_line_with('"total"')
            for _ in range(max(1, int(processes))):
                server.error_line_with("* Greenlets")
            assert peer.add(1) == 6
        assert server.stop()[0] == 6


@PROCESSES
def test_sigusr1_stops_nothing_where_standard_error_is_full(processes: str) -> None:
    full = ("sh", "-c", 'exec "$0" "$@" 2>/dev/full')
    with ServerCommand("--processes", processes, inside=full) as server, server.connect() as peer:
        assert peer.add(5) == 5
        server.signal(signal.SIGUSR1)
        assert peer.add(1) == 6
        assert server.stop() == (6, 2)


def test_sigusr1_shows_no_password(tmp_path: Path) -> None:
    from kit.redis_server import RedisServer

    with RedisServer() as redis:
        assert redis.ask("CONFIG", "SET", "requirepass", "hushhush")
        url = redis.url().replace("redis://", "redis://:hushhush@")
        with ServerCommand("--store", url, "--processes", "0") as server:
            server.signal(signal.SIGUSR1)
            assert "***" in server.error_line_with("--store = ")
            server.stop()
            assert "hushhush" not in server.errors()


def test_a_reload_without_tls_is_said_and_ends_nothing() -> None:
    with ServerCommand("--processes", "2") as server:
        server.signal(signal.SIGHUP)
        server.error_line_with("there is nothing to load again")
        with server.connect() as peer:
            wait_until(lambda: peer.add(1) > 0, "it serves")
        server.stop()
