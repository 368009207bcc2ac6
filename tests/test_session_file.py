"""client.py --add N --sessionFile FILE: the file is one addition, counted once whatever fails."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path

import pytest

from client import CounterClient, SessionFile
from kit.cutting_proxy import Cut, CuttingProxy
from kit.faults import LONG
from kit.harness import Command, ServerCommand, children, wait_until
from kit.session_server import session_server
from protocol import REPLY_SIZE, REQUEST_SIZE, parse_address

HELLO_SIZE = 3 * REQUEST_SIZE
THERE = HELLO_SIZE + 2 * REQUEST_SIZE  # the hello, the addition, the end of the session
BACK = 2 * REPLY_SIZE + 2 * REPLY_SIZE  # their answers

# client.py, killed at one of the steps by which states come onto the disk, before it or behind it.
STEPWISE = """
import os, runpy, signal, sys
step, is_behind, left = sys.argv[1], sys.argv[2] == "behind", int(sys.argv[3])
sys.argv[:4] = ["client.py"]
sys.path.insert(0, "")
real = getattr(os, step)
def watched(*arguments):
    global left
    left -= 1
    if not left and not is_behind:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*arguments)
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
setattr(os, step, watched)
runpy.run_path("client.py", run_name="__main__")
"""

# client.py on a disk on which a file has no room for a byte.
FULL = """
import resource, runpy, sys
sys.path.insert(0, "")
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
sys.argv[:1] = ["client.py"]
runpy.run_path("client.py", run_name="__main__")
"""


def arguments(address: str, file: Path, amount: int, *more: str) -> list[str]:
    named = ["--serverAddress", address, "--add", str(amount), "--sessionFile", str(file)]
    return [*named, *more]


def run(*command: str) -> tuple[int, str, str]:
    """Runs a command to its end; its exit code, standard output and standard error."""
    with Command(*command) as process:
        code = process.finish()
        return code, process.output(), process.errors()


def add(address: str, file: Path, amount: int = 5, *more: str) -> tuple[int, str, str]:
    return run("client.py", *arguments(address, file, amount, *more))


def total(address: str) -> int:
    with CounterClient(address) as counter:
        return counter.total()


def test_the_same_command_counts_once_and_tells_the_same_total(tmp_path: Path) -> None:
    with ServerCommand() as server:
        assert add(server.address, tmp_path / "first") == (0, "5\n", "")
        assert add(server.address, tmp_path / "second", 2) == (0, "7\n", "")
        assert add(server.address, tmp_path / "first") == (0, "5\n", "")
        assert server.stop() == (7, 2)
        assert add(server.address, tmp_path / "first") == (0, "5\n", "")


def test_zero_is_an_addition_as_any_other(tmp_path: Path) -> None:
    with ServerCommand() as server:
        for _ in range(2):
            assert add(server.address, tmp_path / "read", 0) == (0, "0\n", "")
        assert server.stop() == (0, 1)


@pytest.mark.parametrize("way", ["there", "back"])
def test_a_connection_that_is_cut_at_any_byte_costs_nothing(tmp_path: Path, way: str) -> None:
    size = {"there": THERE, "back": BACK}[way]
    with ServerCommand() as server, CuttingProxy(parse_address(server.address)[1], []) as proxy:
        places = range(0, size, 1 if LONG else 3)
        for count, at in enumerate(places, 1):
            proxy._cuts.append(Cut(**{way: at}))
            told = add(proxy.address, tmp_path / f"{at}", 3)
            assert told == (0, f"{3 * count}\n", ""), at
        assert proxy.made == len(places)
        assert server.stop()[0] == 3 * len(places)


@pytest.mark.parametrize("way", ["there", "back"])
def test_a_client_killed_at_any_byte_counts_once(tmp_path: Path, way: str) -> None:
    """Nothing passes from then on until it is dead, and its connection ends with it."""
    size = {"there": THERE, "back": BACK}[way]
    victims: list[Command] = []
    killed = 0

    def kill() -> None:
        wait_until(lambda: bool(victims), "the client is known")
        victims[0].process.kill()
        victims[0].process.wait()

    with ServerCommand() as server:
        port = parse_address(server.address)[1]
        with CuttingProxy(port, [], kill) as proxy:
            for count, at in enumerate(range(0, size, 1 if LONG else 7), 1):
                proxy._cuts.append(Cut(**{way: at}))
                with Command("client.py", *arguments(proxy.address, tmp_path / f"{at}", 3)) as one:
                    victims[:] = [one]
                    one.finish()
                    killed += one.process.returncode == -9
                assert add(proxy.address, tmp_path / f"{at}", 3) == (0, f"{3 * count}\n", ""), at
        assert killed == count
        assert server.stop()[0] == 3 * count


@pytest.mark.parametrize("moment", ["before", "behind"])
@pytest.mark.parametrize(("step", "times"), [("fsync", 6), ("replace", 3)])
def test_a_client_killed_while_it_writes_counts_once(
    tmp_path: Path, step: str, times: int, moment: str
) -> None:
    with ServerCommand() as server:
        for at in range(1, times + 1):
            file = tmp_path / f"{at}"
            code, *_ = run(
                "-c", STEPWISE, step, moment, str(at), *arguments(server.address, file, 3)
            )
            assert code == -9, "it has no such step"
            assert add(server.address, file, 3) == (0, f"{3 * at}\n", "")
        assert server.stop()[0] == 3 * times


def test_a_file_has_one_command_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with session_server() as server:
        with server._lock, Command("client.py", *arguments(server.address, file, 5)) as first:
            wait_until(lambda: bool(server._peers), "the first says hello")
            code, said, why = add(server.address, file)
            assert (code, said) == (2, "")
            assert f"{file}: another process has this session; wait for it" in why
            first.process.kill()
        assert add(server.address, file) == (0, "5\n", "")


def test_the_file_of_another_addition_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with ServerCommand() as server, ServerCommand() as other:
        add(server.address, file)
        kept = file.read_text()
        for address, amount in ((server.address, 6), (other.address, 5)):
            code, said, why = add(address, file, amount)
            assert (code, said) == (2, "")
            of = f"is the addition of 5 at {server.address}, not of {amount} at {address}"
            assert f"client.py: {file}: {of}; a new addition is a new file\n" == why
        assert file.read_text() == kept
        assert server.stop()[0] == 5
        assert other.stop()[0] == 0


def test_a_file_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    letter, others = tmp_path / "letter", tmp_path / "others"
    letter.write_text("Dear all\n")
    with ServerCommand() as server:
        with SessionFile(others) as file:
            with CounterClient(server.address, session=True, on_state=file.save) as counter:
                counter.add(1, name="of an application")
        for path in (letter, others):
            before = path.read_bytes()
            code, said, why = add(server.address, path)
            assert (code, said) == (2, "")
            assert why.startswith(f"client.py: {path}: ")
            assert path.read_bytes() == before
        assert server.stop()[0] == 1


def test_what_can_be_no_file_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    nowhere = tmp_path / "no" / "file"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        for path, words in (
            (tmp_path, "Is a directory"),
            (nowhere, "No such file or directory"),
            (Path("/dev/null"), "a device or a pipe"),
        ):
            code, said, why = add(address, path)
            assert (code, said) == (2, "")
            assert why.startswith(f"client.py: {path}: {words}")
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_nothing_is_counted_that_a_full_disk_does_not_keep(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with ServerCommand() as server:
        code, said, why = run("-c", FULL, *arguments(server.address, file, 5))
        assert (code, said) == (2, "")
        assert "was not saved" in why
        assert "File too large" in why
        assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
        assert total(server.address) == 0
        assert add(server.address, file) == (0, "5\n", "")


def test_a_server_that_forgot_leaves_it_unknown_for_good(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with session_server("forgets") as server:
        with CuttingProxy(server.port, [Cut(back=2 * REPLY_SIZE + 3)]) as proxy:
            for _ in range(2):
                code, said, why = add(proxy.address, file)
                assert (code, said) == (5, "")
                assert "the server does not know the session any more" in why
                assert "the addition of 5 may or may not have been counted" in why
                assert f"{file} never adds it again; a new addition is a new file" in why
        assert server.total == 5


def test_a_memory_server_that_was_started_again_leaves_it_unknown(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with ServerCommand() as server:
        port = parse_address(server.address)[1]
        steps = ("-c", STEPWISE, "fsync", "behind", "2")
        assert run(*steps, *arguments(server.address, file, 5))[0] == -9
        server.stop()
    with ServerCommand(port=str(port)) as server:
        code, said, why = add(server.address, file)
        assert (code, said) == (5, "")
        assert "may or may not have been counted" in why
        assert server.stop()[0] == 0


def test_a_serving_process_killed_with_the_answer_on_its_way_counts_once(tmp_path: Path) -> None:
    with ServerCommand("--processes", "1") as server:

        def kill() -> None:
            for pid in children(server.process.pid):
                os.kill(pid, signal.SIGKILL)

        cuts = [Cut(back=2 * REPLY_SIZE + 3)]
        with CuttingProxy(parse_address(server.address)[1], cuts, kill) as proxy:
            assert add(proxy.address, tmp_path / "file") == (0, "5\n", "")
            assert proxy.made == 1
        assert total(server.address) == 5


def test_where_no_server_is_nothing_is_begun(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with ServerCommand() as server:
        port = parse_address(server.address)[1]
        server.stop()
    code, said, why = add(server.address, file, 5, "--timeout", "500ms")
    assert (code, said) == (1, "")
    assert "connection refused" in why.lower()
    assert not file.read_bytes()
    with ServerCommand(port=str(port)) as server:
        assert add(server.address, file) == (0, "5\n", "")


def test_a_command_whose_time_is_over_is_finished_by_the_next(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with ServerCommand() as server:
        steps = ("-c", STEPWISE, "fsync", "behind", "2")
        assert run(*steps, *arguments(server.address, file, 5))[0] == -9
        before = file.read_bytes()
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            file.write_bytes(before.replace(server.address.encode(), address.encode()))
            code, said, why = add(address, file, 5, "--timeout", "500ms")
        assert (code, said) == (5, "")
        assert re.search(
            r"not answered within 0\.5 s .*; the same command finds out whether 5 ", why
        ), why
        file.write_bytes(before)
        assert add(server.address, file) == (0, "5\n", "")


def test_an_amount_above_the_limit_is_not_counted_and_begins_nothing(tmp_path: Path) -> None:
    with ServerCommand("--maxIncrement", "4") as server:
        for _ in range(2):
            code, said, why = add(server.address, tmp_path / "file")
            assert (code, said) == (5, "")
            assert "amount 5 is above the server's limit of 4" in why
            assert not (tmp_path / "file").read_bytes()
        assert server.stop()[0] == 0


def test_a_server_without_sessions_says_what_to_leave_out(tmp_path: Path) -> None:
    with session_server("old") as server:
        code, said, why = add(server.address, tmp_path / "file")
        assert (code, said) == (1, "")
        assert "leave --sessionFile out" in why


def test_a_session_file_needs_an_addition() -> None:
    for more in ([], ["--read"]):
        code, said, why = run("client.py", "--sessionFile", "file", *more)
        assert (code, said) == (2, "")
        assert "--sessionFile needs --add" in why
