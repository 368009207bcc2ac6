"""The Go client: built, and run over a proxy that cuts its connections at every byte."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import pytest

from kit.harness import ROOT, ScriptedServer, receive_exactly, wait_until
from kit.session_server import SessionServer, session_server
from protocol import (
    HELLO_SIZE,
    REPLY_SIZE,
    REQUEST_SIZE,
    TOTAL_MASK,
    Answer,
    Control,
    Hello,
    Refused,
    decode_answer,
    decode_hello,
    encode_total,
    parse_address,
)

AMOUNTS = (5, 0, 7, 11)
ANSWER_SIZE = 2 * REPLY_SIZE
RUN_SIZE = 2 * REPLY_SIZE
UP = HELLO_SIZE + (len(AMOUNTS) + 1) * REQUEST_SIZE  # the last frame is `end`
DOWN = ANSWER_SIZE + (len(AMOUNTS) + 1) * REPLY_SIZE
EVERYTHING = 10**6

GO = shutil.which("go")
SOURCES = ROOT / "clients/go"

pytestmark = pytest.mark.skipif(GO is None, reason="Go is not installed: its client is not tested")


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Runs Go, without a network and with a cache of its own."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {"GOFLAGS": "-buildvcs=false", "GOPROXY": "off", "GOCACHE": str(cache)}

    def run(*arguments: str | Path) -> None:
        command = [str(GO), *arguments]
        env = os.environ | environment
        done = subprocess.run(command, cwd=SOURCES, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture(scope="module")
def add(go: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that adds, built."""
    program = tmp_path_factory.mktemp("go") / "add"
    go("build", "-o", program, "./add")
    return program


@pytest.fixture
def server() -> Iterator[SessionServer]:
    with session_server() as server:
        yield server


def added(program: Path, address: str, *options: str) -> list[int]:
    """What the program prints for the AMOUNTS."""
    done = subprocess.run(
        [program, *options, address, *map(str, AMOUNTS)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def failure(program: Path, address: str, *options: str) -> str:
    """How the program fails."""
    done = subprocess.run(
        [program, *options, address, "1"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stdout
    return done.stderr


class Link:
    """What a connection of a CuttingProxy may still carry, in bytes each way."""

    def __init__(self, up: int = EVERYTHING, down: int = EVERYTHING) -> None:
        self.up, self.down = up, down

    @property
    def is_cut(self) -> bool:
        return self.up < 0 or self.down < 0

    def carry_up(self, data: bytes, far: socket.socket) -> None:
        far.sendall(data[: self.up])
        self.up -= len(data)

    def carry_down(self, data: bytes, near: socket.socket) -> None:
        near.sendall(data[: max(self.down, 0)])
        self.down -= len(data)


class CuttingProxy(ScriptedServer):
    """Carries each connection as its Link says, then breaks it: the first Link is that of the first
    connection, and after the last nothing is cut.

    A frame goes to the server when the reply to the one before it is there, so that each is a batch
    of its own. A client that sends `at_once` has what it sent delivered when a reply is cut.
    """

    def __init__(self, server: SessionServer, links: Sequence[Link], at_once: bool = True) -> None:
        super().__init__(self._live)
        self.server = server
        self.at_once = at_once
        self.cuts = 0
        self._links = list(links)

    def _live(self, near: socket.socket) -> None:
        link = self._links.pop(0) if self._links else Link()
        with socket.create_connection(parse_address(self.server.address)) as far:
            self._carry(near, far, link)
        self.cuts += link.is_cut

    def _carry(self, near: socket.socket, far: socket.socket, link: Link) -> None:
        data = receive_exactly(near, HELLO_SIZE)
        link.carry_up(data, far)
        if link.is_cut:
            return
        hello = decode_hello(data)
        assert hello is not None
        answer, data = receive_answer(far, hello)
        link.carry_down(data, near)
        if isinstance(answer, Refused):
            return
        owed = 0 if link.is_cut else len(AMOUNTS) - answer.applied
        while not link.is_cut or (self.at_once and owed > 0 and link.up >= 0):
            owed -= 1
            link.carry_up(receive_exactly(near, REQUEST_SIZE), far)
            if link.up >= 0:
                link.carry_down(receive_exactly(far, REPLY_SIZE), near)


def receive_answer(far: socket.socket, hello: Hello) -> tuple[Answer | Refused, bytes]:
    """The answer to a hello, and its bytes."""
    have = hello.value if hello.kind is Control.RESUME else 0
    data = receive_exactly(far, REPLY_SIZE)
    while (answer := decode_answer(data, have)[0]) is None:
        data += receive_exactly(far, REPLY_SIZE)
    return answer, data


def expect_exact(add: Path, server: SessionServer, links: Sequence[Link], *options: str) -> None:
    """Adds through a proxy that cuts: the totals are those of all amounts, each counted once."""
    before = server.total
    with CuttingProxy(server, links, at_once="-one" not in options) as proxy:
        totals = added(add, proxy.address, *options)
    assert totals == list(accumulate(AMOUNTS, initial=before))[1:]
    assert server.total == before + sum(AMOUNTS)
    assert proxy.cuts == len(links)


def test_go_itself_finds_nothing_in_the_sources(go: Callable[..., None]) -> None:
    go("vet", "./...")
    done = subprocess.run(["gofmt", "-l", SOURCES], capture_output=True, text=True, check=True)
    assert done.stdout == ""


@pytest.mark.parametrize("options", [(), ("-one",), ("-window", "1"), ("-window", "3")])
def test_amounts_are_added_in_their_order_and_the_session_is_ended(
    add: Path, server: SessionServer, options: tuple[str, ...]
) -> None:
    assert added(add, server.address, *options) == list(accumulate(AMOUNTS))
    assert server.total == sum(AMOUNTS)
    wait_until(lambda: not server.sessions, "the session is ended")


def test_every_amount_of_the_vectors_is_added(add: Path, server: SessionServer) -> None:
    vectors = json.loads((ROOT / "clients/vectors.json").read_text())
    amounts = [case["amount"] for case in vectors["frames"]]
    command = [str(add), server.address, *amounts]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    totals = [total & TOTAL_MASK for total in accumulate(map(int, amounts))]
    assert [int(line) for line in done.stdout.split()] == totals


def test_more_than_a_window_is_added_in_windows(add: Path, server: SessionServer) -> None:
    amounts = [str(number % 3) for number in range(10_000)]
    command = [str(add), "-window", "4096", server.address, *amounts]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert [int(line) for line in done.stdout.split()] == list(accumulate(map(int, amounts)))
    assert server.total == sum(map(int, amounts))


def test_cut_at_every_byte_on_the_way_to_the_server(add: Path, server: SessionServer) -> None:
    for up in range(UP):
        expect_exact(add, server, [Link(up=up)])


@pytest.mark.parametrize("options", [(), ("-one",)])
def test_cut_at_every_byte_on_the_way_back(
    add: Path, server: SessionServer, options: tuple[str, ...]
) -> None:
    for down in range(DOWN):
        expect_exact(add, server, [Link(down=down)], *options)


@pytest.mark.parametrize("replies", [0, 2])
def test_cut_again_at_every_byte_of_the_answer_to_a_resume(
    add: Path, server: SessionServer, replies: int
) -> None:
    """All frames were counted; each is a run, and the second answer breaks off among them."""
    first = ANSWER_SIZE + replies * REPLY_SIZE
    for down in range(ANSWER_SIZE + (len(AMOUNTS) - replies) * RUN_SIZE):
        expect_exact(add, server, [Link(down=first), Link(down=down)])


@pytest.mark.parametrize(
    ("fault", "options", "says"),
    [
        ("full", (), "no room for another session"),
        ("old", (), "this server has no sessions"),
    ],
)
def test_a_server_that_opens_no_session_is_named_for_it(
    add: Path, fault: str, options: tuple[str, ...], says: str
) -> None:
    with session_server(fault) as server:
        assert says in failure(add, server.address, *options)
        assert server.total == 0


@pytest.mark.parametrize(
    ("fault", "says"),
    [("forgets", "the outcome is unknown"), ("held", "still pending")],
)
def test_a_session_that_cannot_be_gone_on_with_is_not_begun_anew(
    add: Path, fault: str, says: str
) -> None:
    cut = Link(down=ANSWER_SIZE)  # the frame is counted, its reply is lost
    with session_server(fault) as server, CuttingProxy(server, [cut], at_once=False) as proxy:
        assert says in failure(add, proxy.address, "-timeout", "500ms")
        assert server.total == 1
        kinds = [hello.kind for hello in server.hellos]
        assert kinds[0] is Control.OPEN
        assert set(kinds[1:]) == {Control.RESUME}


def test_where_nobody_listens_no_session_is_opened_and_nothing_is_pending(add: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    assert "no session was opened in time" in failure(add, address, "-timeout", "50ms")


def test_an_amount_above_the_limit_is_not_sent(add: Path) -> None:
    with session_server(limit=6) as server:
        done = subprocess.run(
            [add, "-one", server.address, "5", "6", "7"], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout) == (1, "5\n11\n")
        assert "above the server's limit: 7, above 6" in done.stderr
        assert server.total == 11


class Played(ScriptedServer):
    """Answers each hello with the next of its answers, then takes frames until the client ends, or
    so many as `replies` has, answers them, and ends the connection."""

    def __init__(self, *parts: tuple[Answer, Sequence[int]]) -> None:
        super().__init__(self._live)
        self._parts = list(parts)
        self.hellos: list[Hello | None] = []

    def _live(self, near: socket.socket) -> None:
        answer, replies = self._parts.pop(0)
        self.hellos.append(decode_hello(receive_exactly(near, HELLO_SIZE)))
        near.sendall(answer.encode())
        for total in replies:
            receive_exactly(near, REQUEST_SIZE)
            near.sendall(encode_total(total))
        near.shutdown(socket.SHUT_WR)
        while near.recv(65536):
            pass


OPENED = Answer(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ([5], Answer(0, 100), "additions that were answered are lost: 1 of 1"),
        ([], Answer(5, 100, ((5, 9),)), "none of this protocol: 5 applied, 0 answered"),
        ([], Answer(2, 100, ((3, 9),)), "none of this protocol: a pair of frame 3, after 0 of 2"),
        ([5], Answer(2, 100, ((1, 9),)), "none of this protocol: a pair of frame 1, after 1 of 2"),
    ],
)
def test_an_answer_that_cannot_be_right_ends_the_session(
    add: Path, first: list[int], second: Answer, says: str
) -> None:
    with Played((OPENED, first), (second, [])) as server:
        done = subprocess.run(
            [add, server.address, *map(str, AMOUNTS)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1
        assert says in done.stderr
        assert len(server.hellos) == 2


@pytest.mark.parametrize(
    ("first", "runs", "totals"),
    [
        ([], ((4, 1023),), [1005, 1005, 1012, 1023]),
        ([], ((1, 15), (3, 32), (4, 43)), [15, 25, 32, 43]),
        ([7], ((3, 107), (4, 118)), [7, 100, 107, 118]),
        ([], ((2, 3), (4, 2)), [3, 3, 2**64 - 9, 2]),
    ],
)
def test_the_totals_between_the_ends_of_runs_follow_from_the_amounts(
    add: Path, first: list[int], runs: tuple[tuple[int, int], ...], totals: list[int]
) -> None:
    with Played((OPENED, first), (Answer(4, 100, runs), [])) as server:
        assert added(add, server.address) == totals
        assert [hello and hello.value for hello in server.hellos[:2]] == [64, len(first)]


def test_what_another_server_would_refuse_is_withdrawn_and_the_rest_is_counted(add: Path) -> None:
    smaller = Answer(1, 6, ((1, 105),))  # of 5, 0, 7 and 11 the first is counted
    with Played((OPENED, []), (smaller, [105])) as server:
        done = subprocess.run(
            [add, server.address, *map(str, AMOUNTS)], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout) == (1, "105\n105\n")
        assert "above the server's limit: 7, above 6" in done.stderr
