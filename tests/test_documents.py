"""The documents' command lines, each of which is run here, or is known to be run elsewhere."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from client import CounterClient
from counter.options.client import ClientSettings
from counter.options.server import ServerSettings
from counter.system.version import VERSION
from kit.certificates import Pair, TlsPeer, kit, trusting
from kit.harness import ROOT, Command, ScriptedServer, ServerCommand, receive_exactly
from kit.redis_server import RedisServer
from protocol import REPLY_SIZE, REQUEST_SIZE

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "SECURITY.md", "clients/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]

# Commands that this suite does not run as they stand, and what does or why not.
ELSEWHERE = {
    "make": ".ci/run calls make test; the others are run by hand before a release",
    "docker": "needs a container engine; tests/test_deploy.py runs the image's files",
    "kubectl": "needs a cluster; tests/test_deploy.py checks the manifests",
    "pip install -r": "make installs the same files",
    "pip install .": "tests/test_install.py",
    "cp": "writes where units of the system are",
    "systemctl": "needs systemd; tests/test_deploy.py checks the unit",
    "python benchmarks/compare.py": "make bench",
    "python clients/": "tests/clients/test_conformance.py",
    "cd clients/go &&": "needs Go; tests/clients/test_go_client.py builds the same",
    ".venv/bin/python": "benchmarks, run by hand",
}

# A script that a command line hands to a program.
HERE_DOCUMENT = re.compile(r"<<'(\w+)'\n.*?^\1$", re.M | re.S)


def blocks() -> list[str]:
    """Every block of the documents that is marked as a shell's, its line ends resolved."""
    return [
        block.replace("\\\n", " ")
        for document in DOCUMENTS
        for block in re.findall(r"^```sh\n(.*?)^```", document.read_text(), re.M | re.S)
    ]


def lines(block: str) -> list[str]:
    """The command lines of a block, without the scripts that it hands to a program."""
    return [line for line in HERE_DOCUMENT.sub("", block).splitlines() if line.strip()]


def commands() -> list[str]:
    """Every command of the documents."""
    return sorted({line.strip() for block in blocks() for line in lines(block)})


def unquoted(line: str) -> str:
    """What of a line the shell reads itself."""
    return re.sub(r"""'[^']*'|"[^"]*"|\\.""", "", line)


def words(command: str) -> tuple[dict[str, str], list[str]]:
    """The variables that stand before a command, and its words."""
    variables = {}
    parts = shlex.split(command)
    while parts and re.match(r"[A-Z_]+=", parts[0]):
        name, _, value = parts.pop(0).partition("=")
        variables[name] = value
    return variables, parts


ALL = commands()
SERVERS = [c for c in ALL if words(c)[1][:2] == ["python", "server.py"]]
CLIENTS = [c for c in ALL if words(c)[1][:2] == ["python", "client.py"]]
SQLITE = [c for c in ALL if words(c)[1][:1] == ["sqlite3"]]
OPENSSL = [c for c in ALL if words(c)[1][:1] == ["openssl"]]
BASH = [c for c in ALL if words(c)[1][:1] == ["bash"]]


def test_every_command_of_the_documents_is_run_here_or_said_to_be_run_elsewhere() -> None:
    assert len(SERVERS) > 5
    assert len(CLIENTS) > 3
    for command in set(ALL) - {*SERVERS, *CLIENTS, *SQLITE, *OPENSSL, *BASH}:
        assert any(command.startswith(known) for known in ELSEWHERE), command


@pytest.mark.parametrize("line", [line for block in blocks() for line in lines(block)])
def test_a_command_line_of_the_documents_can_be_pasted_into_bash_and_zsh(line: str) -> None:
    """Interactively zsh knows no comments, and looks for files that match a word with ? * or [."""
    assert not re.search(r"(^|\s)#", unquoted(line)), "a comment"
    assert not re.search(r"[?*\[]|(^|\s)[=~]", unquoted(line)), "a word that zsh expands"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_every_block_of_the_documents_is_one_that_the_shell_can_read(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    for block in blocks():
        done = subprocess.run([shell, "-n"], input=block, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), block


@pytest.mark.parametrize("command", SERVERS)
def test_a_server_command_of_the_documents_serves(command: str, tmp_path: Path) -> None:
    variables, (_, _, *arguments) = words(command)
    files = {
        "server.pem": kit().server.cert,
        "server.key": kit().server.key,
        "ca.pem": kit().ca.cert,
    }
    arguments = [str(files.get(word, word)) for word in arguments]
    arguments = [word.replace("sqlite:", f"sqlite:{tmp_path}/") for word in arguments]
    with RedisServer() as redis:

        def here(text: str) -> str:
            """A URL of the documents, with the server of this test in the place of its host."""
            address = redis.url().removeprefix("redis://").partition("/")[0]
            text = text.replace("rediss://", "redis://").replace("?ssl_ca_certs=ca.pem", "")
            return re.sub(r"redis://[^/]*", f"redis://{address}", text)

        arguments = [here(word) if word.startswith("redis") else word for word in arguments]
        for name, value in variables.items():
            arguments += ["--store", here(value)] if name.endswith("STORE") else []
        if "--adminPort" in arguments:
            arguments += ["--adminPort", "0"]
        with ServerCommand(*arguments) as server:  # which adds --port 0
            server.stop()


@pytest.mark.parametrize("command", CLIENTS)
def test_a_client_command_of_the_documents_runs(command: str, tmp_path: Path) -> None:
    _, (_, _, *arguments) = words(command)
    files = {"ca.pem": kit().ca.cert, "me.pem": kit().client.cert, "me.key": kit().client.key}
    tls = ["--tlsClientCA", str(kit().ca.cert)] if "--tlsCA" in arguments else []
    flags = [*kit().server.server_flags(), *tls] if tls else []
    with ServerCommand(*flags) as server:
        address = server.address.replace("127.0.0.1", "localhost") if tls else server.address
        arguments = [str(files.get(word, word)) for word in arguments]
        arguments = [
            str(tmp_path / word) if re.search(r"\.(json|html|hgrm)$", word) else word
            for word in arguments
        ]
        # The last of an option counts: the documents' runs of a minute are short ones here.
        once = {"--add", "--read"} & set(arguments)
        short = [] if once else ["--duration", "200ms", "--warmup", "0", "--connections", "4"]
        with Command("client.py", *arguments, "--serverAddress", address, *short) as client:
            output = client.output()
            assert client.finish() in (0, 99), client.errors()  # 99: a threshold of the example
            assert output
        server.stop()


@pytest.mark.parametrize("command", SQLITE)
def test_an_sqlite_command_of_the_documents_reads_the_total(command: str, tmp_path: Path) -> None:
    if shutil.which("sqlite3") is None:
        pytest.skip("sqlite3 is not installed")
    with ServerCommand("--store", f"sqlite:{tmp_path}/counter.db") as server:
        with server.connect() as peer:
            peer.add(123)
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        if "SELECT" in command:
            assert done.stdout == "123\n"
        server.stop()


def test_the_certificates_of_the_documents_are_good_for_mutual_tls(tmp_path: Path) -> None:
    assert len(OPENSSL) == 3
    for command in OPENSSL:  # in alphabetical order the authority is the first, as it has to be
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    server_pair, client_pair = (
        Pair(tmp_path / f"{name}.pem", tmp_path / f"{name}.key") for name in ("server", "me")
    )
    ca = tmp_path / "ca.pem"
    with ServerCommand(*server_pair.server_flags(), "--tlsClientCA", str(ca)) as server:
        address = server.address.replace("127.0.0.1", "localhost")
        with TlsPeer(address, trusting(ca, client_pair)) as peer:
            assert peer.add(5) == 5
        server.stop()


def test_the_recipe_for_a_sole_writer_counts_each_addition_once(tmp_path: Path) -> None:
    document = (ROOT / "docs/operations.md").read_text()
    (recipe,) = [
        b for b in re.findall(r"^```python\n(.*?)^```", document, re.M | re.S) if "once" in b
    ]
    names: dict[str, Any] = {}
    exec(recipe.replace("counter_client", "client"), names)
    flags = ["--processes", "1", "--store", f"sqlite:{tmp_path}/counter.db"]
    with ServerCommand(*flags) as server:
        fates = itertools.cycle(["passes", "request is lost", "passes", "passes", "reply is lost"])
        seen = Counter[str]()

        def cut(near: socket.socket) -> None:
            """Passes frames and replies on, but for those whose fate is to be lost."""
            with server.connect() as far:
                while frame := near.recv(REQUEST_SIZE):
                    fate = next(fates)
                    seen[fate] += 1
                    if fate == "request is lost":
                        return
                    far.send(frame)
                    reply = receive_exactly(far.sock, REPLY_SIZE)
                    if fate == "reply is lost":
                        return
                    near.sendall(reply)

        total = 0
        with ScriptedServer(cut) as proxy, CounterClient(proxy.address) as counter:
            for amount in range(1, 31):
                total = names["add_once"](counter, total, amount)
                assert total == amount * (amount + 1) // 2
        assert all(seen.values())
        assert len(seen) == 3
        assert server.stop()[0] == total


def test_a_shell_without_any_client_can_add() -> None:
    """docs/protocol.md's lines, in their order."""
    (block,) = [block for block in blocks() if "/dev/tcp/" in block]
    with ServerCommand() as server:
        script = block.replace("127.0.0.1/8080", server.address.replace(":", "/"))
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, done.stderr
        assert "00 00 00 00 00 00 00 0a" in done.stdout
        server.signal(signal.SIGTERM)
        server.farewell()


@pytest.mark.parametrize("program", ["server.py", "client.py"])
def test_the_examples_in_the_help_are_ones_that_the_program_takes(program: str) -> None:
    shown = subprocess.run(
        [sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (examples,) = re.findall(r"examples:\n(.*?)(?:\n\n|\Z)", shown, re.S)
    shown_lines = [line for line in examples.splitlines() if f"python {program}" in line]
    assert len(shown_lines) >= 3
    for line in shown_lines:
        command = re.split(r"\s{2,}", line.strip())[0]
        variables, (_, _, *arguments) = words(command)
        done = subprocess.run(
            [sys.executable, program, *arguments, "--printConfig"],
            cwd=ROOT,
            env=os.environ | variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (command, done.stderr)


def test_the_newest_version_of_the_changelog_is_that_of_the_program() -> None:
    newest, *_ = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert re.fullmatch(re.escape(VERSION) + r" - \d{4}-\d\d-\d\d", newest)


def test_readme_names_every_option() -> None:
    readme = (ROOT / "README.md").read_text()
    for record in (ServerSettings, ClientSettings):
        for option in fields(record):
            assert f"`{option.metadata['flag']}`" in readme, option.metadata["flag"]
