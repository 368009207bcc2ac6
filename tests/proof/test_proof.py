"""python client.py --verify: servers that are wrong on purpose are caught, the real one is proved.

LONG=1 (make chaos) makes twenty runs of each kind where two are made otherwise.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit.harness import (
    ROOT,
    Command,
    ScriptedServer,
    ServerCommand,
    children,
    cpu_seconds,
    receive_exactly,
    wait_until,
)
from kit.played import needs
from protocol import encode_total

RUNS = 20 if os.environ.get("LONG") == "1" else 2
MIXED = ("--processes", "4", "--connections", "24", "--amount", "0-5")
ALIKE = ("--processes", "4", "--connections", "24")
SHORT = ("--duration", "700ms", "--warmup", "100ms")


def verified(
    address: str, tmp_path: Path, *arguments: str, verify: str = "--verify"
) -> tuple[int, dict[str, Any], str]:
    """Runs a client; its exit code, its proof from JSON, and all that it printed."""
    file = tmp_path / "result.json"
    with Command(
        *("client.py", "--serverAddress", address, verify, "--json", str(file)), *arguments
    ) as command:
        code = command.finish(60)
        shown = command.output() + command.errors()
    report = json.loads(file.read_text())
    assert report["verify"], shown
    return code, report["verify"], shown


@pytest.mark.timeout(300)
@pytest.mark.parametrize("pipeline", ["1", "16"])
@pytest.mark.parametrize("mode", ["lost", "twice", "stale", "early"])
def test_a_server_that_is_wrong_on_purpose_is_always_caught(
    mode: str, pipeline: str, tmp_path: Path
) -> None:
    for _ in range(max(1, RUNS // 2)):
        with Command("tests/kit/wrong_server.py", mode) as server:
            code, proof, shown = verified(
                server.line(), tmp_path, *SHORT, *MIXED, "--pipeline", pipeline
            )
            assert proof["verdict"] == "impossible", shown
            assert len(proof["evidence"]) == 2, shown
            assert "verify    impossible: " in shown
            assert code == 4, shown


@pytest.mark.parametrize(
    ("engine", "pipeline"), [("plain", "1"), ("compiled", "1"), ("compiled", "16")]
)
@pytest.mark.parametrize("mode", ["lost", "twice", "early"])
def test_both_engines_catch_a_server_that_is_wrong_on_purpose(
    mode: str, engine: str, pipeline: str, tmp_path: Path
) -> None:
    """Amounts that are drawn, as above, never reach the engine in C."""
    needs(engine)
    with Command("tests/kit/wrong_server.py", mode) as server:
        arguments = (*SHORT, *ALIKE, "--engine", engine, "--pipeline", pipeline)
        code, proof, shown = verified(server.line(), tmp_path, *arguments)
        assert (code, proof["verdict"]) == (4, "impossible"), shown


def test_the_server_that_can_be_wrong_is_proved_when_it_is_right(tmp_path: Path) -> None:
    with Command("tests/kit/wrong_server.py", "right") as server:
        address = server.line()
        for kind in (MIXED, ALIKE):
            arguments = (*SHORT, *kind, "--pipeline", "16")
            code, proof, shown = verified(address, tmp_path, *arguments)
            assert (code, proof["verdict"]) == (0, "proved"), shown


@pytest.mark.timeout(300)
def test_the_real_server_is_proved_over_processes_pipelines_and_random_amounts(
    tmp_path: Path,
) -> None:
    for run in range(RUNS):
        first = str(2**64 - 1000 if run % 2 else 0)
        server_arguments = ("--multiplier", "50", "--processes", "4", "--setTotal", first)
        with ServerCommand(*server_arguments) as server:
            arguments = (*SHORT, *MIXED, "--pipeline", "16" if run % 4 < 2 else "1")
            code, proof, shown = verified(server.address, tmp_path, *arguments)
            assert (code, proof["verdict"]) == (0, "proved"), shown
            answered = re.search(r"([\d,]+) answered, warm-up", shown)
            assert answered
            recorded = int(answered[1].replace(",", "")) - 2
            assert f"proved exact: {recorded:,} additions form one chain" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--engine", "plain"],
        ["--pipeline", "700", "--requests", "300000"],
        ["--pipeline", "700", "--requests", "300000", "--engine", "plain"],
        ["--amount", "0"],
        ["--rate", "5000"],
        ["--requests", "2000"],
        ["--amount", "0-18446744073709551615", "--pipeline", "4"],
        ["--amount", "0-1000", "--pipeline", "300"],
    ],
)
def test_every_kind_of_load_is_proved(arguments: list[str], tmp_path: Path) -> None:
    with ServerCommand() as server:
        code, proof, shown = verified(server.address, tmp_path, *SHORT, *arguments)
        assert (code, proof["verdict"]) == (0, "proved"), shown


def test_another_client_is_impossible_alone_and_explained_shared(tmp_path: Path) -> None:
    with ServerCommand("--multiplier", "50") as server:
        for verify, verdict, expected in (
            ("--verify", "impossible", 4),
            ("--verify=shared", "explained", 0),
        ):
            with Command(
                *("client.py", "--serverAddress", server.address, "--connections", "4"),
                *("--duration", "1h", "--warmup", "0"),
            ) as other:
                wait_for_load(server)
                code, proof, shown = verified(
                    server.address, tmp_path, *SHORT, "--connections", "4", verify=verify
                )
                other.signal(signal.SIGINT)
                other.finish()
            assert (code, proof["verdict"]) == (expected, verdict), shown
    assert "which other clients explain" in shown


def test_an_interrupted_run_is_proved_as_far_as_it_came(tmp_path: Path) -> None:
    with ServerCommand() as server:
        with Command(
            *("client.py", "--serverAddress", server.address, "--duration", "1h", "--verify")
        ) as command:
            wait_for_load(server)
            command.signal(signal.SIGINT)
            assert command.finish() == 130
            shown = command.output()
            assert shown.startswith("Interrupted after")
            assert "verify    proved exact: " in shown


def test_lost_replies_are_explained_or_proved_without() -> None:
    """Ten additions are counted, and the connection closes on the tenth; the read comes after."""
    counted = [0]

    def script(sock: socket.socket) -> None:
        while True:
            amount = int.from_bytes(receive_exactly(sock, 16)[:8])
            counted[0] += amount
            if counted[0] == 10 and amount:
                return
            sock.sendall(encode_total(counted[0]))

    with ScriptedServer(script) as server:
        arguments = ("--connections", "1", "--requests", "20", "--warmup", "0", "--verify")
        with Command("client.py", "--serverAddress", server.address, *arguments) as command:
            assert command.finish() == 5
            shown = command.output()
    assert "verify    explained: 19 additions form a chain but for 1 gap, 1 in all," in shown
    assert "which unanswered additions fill" in shown


def test_a_load_process_that_is_killed_makes_the_proof_undecided() -> None:
    with ServerCommand() as server:
        arguments = ("--duration", "2s", "--processes", "2", "--verify")
        with Command("client.py", "--serverAddress", server.address, *arguments) as command:
            wait_for_load(server)
            os.kill(children(command.process.pid)[0], signal.SIGKILL)
            assert command.finish() == 5
            assert "verify    undecided: a load process died" in command.output()


def test_a_record_that_finds_no_room_makes_the_proof_undecided_and_leaves_the_run_alone() -> None:
    with ServerCommand() as server:
        # The shell's limit for files, in blocks of 1,024 bytes.
        command = (
            f"trap '' XFSZ; ulimit -f 64; exec {sys.executable} client.py "
            f"--serverAddress {server.address} --duration 700ms --warmup 0 --verify"
        )
        ran = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "check     ok" in ran.stdout
        assert re.search(
            r"verify    undecided: [\d,]+ answered additions could not be written", ran.stdout
        )


def test_a_run_without_a_proof_says_nothing_of_one(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    with ServerCommand() as server:
        with Command(
            *("client.py", "--serverAddress", server.address, "--json", str(file)), *SHORT
        ) as command:
            assert command.finish() == 0
            assert "verify" not in command.output()
    assert json.loads(file.read_text())["verify"] is None


def wait_for_load(server: ServerCommand) -> None:
    """Waits until the server has computed for 0.3 s from now on."""
    start_s = cpu_seconds(server.process.pid)
    wait_until(lambda: cpu_seconds(server.process.pid) > start_s + 0.3, "the server is under load")
