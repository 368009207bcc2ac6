"""The judge of any server of the wire: it finds no fault in a right one, and each that is made."""

from __future__ import annotations

import ast
import re
import socket
import struct
import sys
import threading

import pytest

from kit.harness import ROOT, Command, ScriptedServer, ServerCommand
from kit.session_server import Kept, SessionServer, session_server
from protocol import (
    REPLY_SIZE,
    REQUEST_SIZE,
    TOTAL_MASK,
    Answer,
    BadFrame,
    Control,
    Decoder,
    Hello,
    Refused,
    encode_total,
)

JUDGE = "clients/conformance.py"
LINE = re.compile(r"(PASS|FAIL|SKIP) (plain|session), ([^:]+): (.*); protocol: (.+)")


class Judged:
    """What the judge says of a server."""

    def __init__(self, address: str, *options: str) -> None:
        with Command(JUDGE, address, *options) as judge:
            self.text = judge.output()
            self.code = judge.finish()
            self.errors = judge.errors()
        self.lines = [match.groups() for match in LINE.finditer(self.text)]

    def names(self, verdict: str, place: str = "") -> set[str]:
        """The checks with this verdict."""
        return {line[2] for line in self.lines if line[0] == verdict and place in ("", line[1])}

    def seen(self, name: str) -> str:
        """What was seen in a check."""
        (line,) = [line for line in self.lines if line[2] == name]
        return line[3]

    def expect_right(self) -> None:
        assert (self.code, self.names("FAIL"), self.errors) == (0, set(), ""), self.text

    def expect_failures(self, *names: str) -> None:
        assert self.code == 1, self.text
        assert self.names("FAIL") >= set(names), self.text


def test_the_judge_is_one_file_and_knows_nothing_of_the_project() -> None:
    imported = set()
    for node in ast.walk(ast.parse((ROOT / JUDGE).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    roots = {name.partition(".")[0] for name in imported}
    assert roots - sys.stdlib_module_names == {"xxhash"}


@pytest.mark.parametrize("processes", ["0", "2"])
def test_a_real_server_keeps_to_every_rule(each_engine: str, processes: str) -> None:
    with ServerCommand("--processes", processes) as server:
        judged = Judged(server.address, "--sessions", "yes", "--large")
        judged.expect_right()
        assert judged.names("SKIP", "plain") == {"reset behind a frame"}
        assert len(judged.names("PASS", "session")) > 20
        (total,) = re.findall(r"total (\d+)$", judged.text, re.M)
        assert server.stop()[0] == int(total)


def test_a_server_with_a_limit_keeps_to_it_and_passes() -> None:
    with ServerCommand("--processes", "0", "--maxIncrement", "1000") as server:
        Judged(server.address, "--sessions", "yes").expect_right()


def test_a_right_server_of_sessions_passes_and_keeps_none_of_them() -> None:
    with session_server() as server:
        judged = Judged(server.address, "--sessions", "yes")
        judged.expect_right()
        assert judged.names("SKIP", "session") == {"limit"}
        assert len(judged.names("PASS", "session")) > 20
        assert f"total {server.total}\n" in judged.text
        assert not server.sessions


def test_the_limit_of_a_session_is_judged_where_there_is_one() -> None:
    with session_server(limit=200) as server:
        judged = Judged(server.address)
        judged.expect_right()
        assert judged.seen("limit") == "saw 201 is refused"


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("applied", ("resume", "pairs", "resume above applied", "broken at any byte")),
        ("run", ("pairs", "a whole window")),
        ("unfenced", ("taken over", "taken over in the middle", "open again, unused")),
        ("forgets", ("resume",)),
        ("held", ("resume", "taken over")),
    ],
)
def test_a_server_of_sessions_that_is_wrong_is_told_so(fault: str, found: tuple[str, ...]) -> None:
    with session_server(fault) as server:
        judged = Judged(server.address)
        judged.expect_failures(*found)
        assert not judged.names("FAIL", "plain"), judged.text


class WrongSessions(SessionServer):
    """A server of sessions with one more fault."""

    def __init__(self, wrong: str) -> None:
        super().__init__()
        self.wrong = wrong

    def _greet(self, peer: socket.socket, hello: Hello) -> Answer | Refused:
        kept = self.sessions.get(hello.session_id)
        if self.wrong == "opens what is used" and hello.kind is Control.OPEN:
            self.sessions.pop(hello.session_id, None)
        if self.wrong == "resumes what is unknown" and kept is None:
            self.sessions[hello.session_id] = Kept(64)
        answer = super()._greet(peer, hello)
        if isinstance(answer, Refused):
            if self.wrong == "takes over and refuses" and kept and kept.holder:
                kept.holder.shutdown(socket.SHUT_RDWR)
        elif self.wrong == "refuses what is lost" and hello.session_id not in self.sessions:
            return Refused.UNKNOWN
        return answer

    def _refuse(self, peer: socket.socket, kept: Kept | None, frame: bytes) -> None:
        before = dict(self.sessions)
        super()._refuse(peer, kept, frame)
        if self.wrong == "ends no session":
            self.sessions = before
        if self.wrong == "answers the end of a stranger" and kept is None:
            peer.sendall(encode_total(0))
        if self.wrong == "ends any session for a stranger" and kept is None:
            self.sessions.clear()


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ("opens what is used", ("open again, used",)),
        ("resumes what is unknown", ("unknown id", "window", "hello, cut off", "hello, wrong")),
        ("takes over and refuses", ("resume below the window", "open again, used")),
        ("refuses what is lost", ("resume above applied",)),
        ("ends no session", ("hello twice", "refusal in a session", "end")),
        ("answers the end of a stranger", ("end of a stranger", "control frames are no additions")),
        ("ends any session for a stranger", ("end of a stranger",)),
    ],
)
def test_a_server_that_knows_its_sessions_badly_is_told_so(
    wrong: str, found: tuple[str, ...]
) -> None:
    server = WrongSessions(wrong)
    try:
        Judged(server.address, "--patience", "0.5").expect_failures(*found)
    finally:
        server.close()


@pytest.mark.parametrize(
    ("fault", "why"),
    [("old", "a server without sessions"), ("full", "no room for another session")],
)
def test_without_sessions_the_plain_rules_are_judged_and_it_says_so(fault: str, why: str) -> None:
    with session_server(fault) as server:
        judged = Judged(server.address)
        judged.expect_right()
        assert re.search(f"^Sessions: left out, .*{why}", judged.text, re.M)
        assert not judged.names("PASS", "session")
        judged = Judged(server.address, "--sessions", "yes")
        judged.expect_failures("open", "resume")


class WrongPlain:
    """A plain server with one fault, of each kind that a check is there for."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.total = 0
        self.reads = 0
        self.lock = threading.Lock()

    def live(self, peer: socket.socket) -> None:
        rest = b""
        decoder = Decoder()
        while data := peer.recv(65536):
            try:
                batch, rest = decoder.decode(rest + data)
            except BadFrame as bad:
                self.refuse(peer, bad, rest + data)
                return
            peer.sendall(self.replies(list(batch.amounts)))
            if self.fault == "drops what is begun":
                rest = b""
        if self.fault == "counts what is begun" and rest:
            self.replies([4])
        peer.shutdown(socket.SHUT_WR)

    def refuse(self, peer: socket.socket, bad: BadFrame, data: bytes) -> None:
        amounts = list(bad.batch.amounts)
        if self.fault == "counts what is behind":
            self.replies([*amounts, 5])
            self.total -= 5 if not amounts else 0
        elif self.fault != "forgets what was in front":
            peer.sendall(self.replies(amounts))
        if self.fault == "takes a wrong checksum":
            at = len(amounts) * REQUEST_SIZE
            peer.sendall(self.replies([int.from_bytes(data[at : at + 8]) % 100]))
        if self.fault == "resets":
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        peer.shutdown(socket.SHUT_WR)
        while self.fault != "does not linger" and peer.recv(65536):
            pass

    def replies(self, amounts: list[int]) -> bytes:
        """Adds, and gives back the replies."""
        totals = []
        with self.lock:
            for amount in amounts:
                self.total = self.total + self.added(amount) & TOTAL_MASK
                totals.append(self.total)
        data = b"".join(map(encode_total, totals))
        if self.fault == "mixes the order":
            data = b"".join(encode_total(total) for total in sorted(totals, reverse=True))
        if self.fault == "answers a read once" and len(totals) > 1:
            data = data[-REPLY_SIZE:]
        return data

    def added(self, amount: int) -> int:
        self.reads += 1
        if self.fault == "loses one of 997" and not self.reads % 997:
            return 0
        if self.fault == "doubles one of 997" and not self.reads % 997:
            return 2 * amount
        return amount or int(self.fault == "counts a read")


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("", ()),
        ("drops what is begun", ("split", "byte by byte")),
        ("counts what is begun", ("incomplete",)),
        ("counts what is behind", ("refusal",)),
        ("forgets what was in front", ("refusal",)),
        ("takes a wrong checksum", ("refusal",)),
        ("resets", ("FIN, not RST",)),
        ("does not linger", ("FIN, not RST",)),
        ("mixes the order", ("order", "pipelined")),
        ("answers a read once", ("order", "pipelined", "at the same time")),
        ("loses one of 997", ("pipelined",)),
        ("doubles one of 997", ("pipelined",)),
    ],
)
def test_a_plain_server_that_is_wrong_is_told_so(fault: str, found: tuple[str, ...]) -> None:
    with ScriptedServer(WrongPlain(fault).live) as server:
        judged = Judged(server.address, "--sessions", "no", "--patience", "0.5")
        if found:
            judged.expect_failures(*found)
        else:
            judged.expect_right()


@pytest.mark.parametrize("mode", ["lost", "twice", "stale", "early"])
def test_a_server_that_is_wrong_at_random_is_told_so(mode: str) -> None:
    with Command("tests/kit/wrong_server.py", mode) as server:
        judged = Judged(server.line().strip(), "--sessions", "no", "--patience", "0.5")
        assert judged.names("FAIL", "plain") & {"pipelined", "split", "vectors"}, judged.text


def test_where_somebody_else_adds_it_cannot_tell_and_adds_nothing() -> None:
    counter = WrongPlain("counts a read")  # so that the total rises while it looks
    with ScriptedServer(counter.live) as server:
        judged = Judged(server.address)
        assert judged.code == 2
        assert "somebody else adds" in judged.errors
        assert not judged.lines
        assert counter.total == counter.reads == 2


def test_where_nobody_listens_it_cannot_tell() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    judged = Judged(address)
    assert judged.code == 2
    assert "refused" in judged.errors


def test_what_gives_no_total_fails_at_the_start() -> None:
    with ScriptedServer(lambda peer: peer.sendall(b"no\r\n")) as server:
        judged = Judged(server.address)
        assert judged.code == 1
        assert "FAIL at the start: saw " in judged.text


def test_what_it_adds_is_small_and_said() -> None:
    with session_server() as server:
        judged = Judged(server.address)
        assert "Adds small amounts, some ten thousand in all, to the total, which is 0." in (
            judged.text
        )
        assert "only while nobody else adds" in judged.text
        assert 0 < server.total < 20_000
