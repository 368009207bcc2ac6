"""Judges from outside whether a server keeps to docs/protocol.md: plain connections and sessions.

    python clients/conformance.py 127.0.0.1:8080
    python clients/conformance.py 127.0.0.1:8080 --sessions no

It is an independent reading of the protocol: nothing of the project is imported. A check is a
function that does something to the server and says what it saw; what it adds is told to the Judge,
and after each check the total must have risen by that and nothing else. So it can judge only while
nobody else adds.

Harmless: amounts are small (some ten thousand in all), and sessions are ended. It ends with 0 if
all that was looked at is right, with 1 if anything is wrong, and with 2 if it cannot tell.
"""

from __future__ import annotations

import argparse
import secrets
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

from xxhash import xxh64_digest

MASK: Final = 2**64 - 1
UNREAD_FRAMES: Final = 4096  # may be sent without reading a reply
LARGEST_WINDOW: Final = 4096

REFUSALS: Final = {
    2**64 - 1: "no such session",
    2**64 - 2: "no room for another session",
    2**64 - 3: "held elsewhere",
}
UNKNOWN: Final = 2**64 - 1

PATIENCE_S: Final = 10.0  # for a reply; --patience
SETTLE_S: Final = 0.2  # in which a wrong server would show by itself what it must not do
BETWEEN_PARTS_S: Final = 0.002  # so that two parts are two segments, most times
LINGER_S: Final = 0.7  # a server reads on for 1 s after a refusal; later than this is no judgement
PRESENT: Final = 3  # orderly ends of a first hello, until there are said to be no sessions


class Wrong(Exception):
    """The server did what the protocol forbids; the text says what was seen."""


class Skip(Exception):
    """This cannot be judged here; the text says why."""


class CannotTell(Exception):
    """Nothing can be judged at all."""


def word(value: int) -> bytes:
    """A number of 64 bits on the wire."""
    return struct.pack(">Q", value)


def frame(amount: int) -> bytes:
    """The frame that adds `amount`."""
    return word(amount) + xxh64_digest(b"%d" % amount)


def control(kind: str, value: int) -> bytes:
    """A control frame."""
    return word(value) + xxh64_digest(b"%s:%d" % (kind.encode(), value))


def hello(session: int, kind: str, value: int) -> bytes:
    """The 48 bytes with which a connection of a session begins."""
    high, low = session >> 64, session & MASK
    return control("id-high", high) + control("id-low", low) + control(kind, value)


def frames(amounts: Sequence[int]) -> bytes:
    """The frames of these amounts, joined."""
    return b"".join(map(frame, amounts))


def after(before: int, amounts: Sequence[int]) -> list[int]:
    """The total after each of these amounts."""
    return [total & MASK for total in accumulate(amounts, initial=before)][1:]


def expect(seen: object, wanted: object, what: str) -> None:
    """Wrong, with both, unless they are equal."""
    if seen != wanted:
        raise Wrong(f"{what}: {shown(seen)} instead of {shown(wanted)}")


def shown(value: object) -> str:
    """A value, short enough for a line."""
    text = str(value)
    return text if len(text) < 80 else f"{text[:76]} ..."


class Connection:
    """A TCP connection to the server."""

    def __init__(self, address: tuple[str, int], patience_s: float) -> None:
        self.sock = socket.create_connection(address, patience_s)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.patience_s = patience_s

    def send(self, data: bytes, cut: int = 0) -> None:
        """Sends all; where `cut` is given, in two parts. A connection that has ended takes it."""
        with suppress(OSError):  # what comes then says why
            if cut:
                self.sock.sendall(data[:cut])
                time.sleep(BETWEEN_PARTS_S)
            self.sock.sendall(data[cut:])

    def read(self, size: int) -> bytes:
        """So many bytes, or fewer and then the end; Wrong where they do not come, or RST does."""
        data = b""
        while len(data) < size:
            try:
                more = self.sock.recv(size - len(data))
            except TimeoutError:
                raise Wrong(f"{len(data)} of {size} bytes in {self.patience_s:g} s") from None
            except ConnectionError:
                raise Wrong(f"RST behind {len(data)} of {size} bytes") from None
            if not more:
                break
            data += more
        return data

    def words(self, count: int) -> list[int]:
        """So many numbers; Wrong where they do not come."""
        data = self.read(8 * count)
        if len(data) < 8 * count:
            raise Wrong(f"FIN behind {len(data)} of {8 * count} bytes")
        return list(struct.unpack(f">{count}Q", data))

    def ask(self, amounts: Sequence[int]) -> list[int]:
        """The totals that answer these amounts, sent at once."""
        self.send(frames(amounts))
        return self.words(len(amounts))

    def rest(self) -> bytes:
        """What comes until FIN; Wrong where that does not come, or RST does."""
        return self.read(1 << 30)

    def expect_fin(self, what: str) -> None:
        """Wrong if anything but FIN comes."""
        data = self.rest()
        if data:
            raise Wrong(f"{what}: {len(data)} bytes ({data[:24].hex(' ', 8)}) instead of FIN")

    def is_ended(self) -> bool:
        """Whether FIN or RST comes before anything else; Wrong where neither does."""
        try:
            return self.sock.recv(1) == b""
        except TimeoutError:
            raise Wrong(f"it is still open after {self.patience_s:g} s") from None
        except ConnectionError:
            return True

    def is_reset_within(self, seconds: float) -> bool:
        """Whether RST comes in that time, or has come; half-open connections have none."""
        poll = select.poll()
        poll.register(self.sock, 0)
        return bool(poll.poll(seconds * 1000))

    def finish(self) -> None:
        """Sends FIN."""
        with suppress(OSError):  # it has ended
            self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Ends it with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


@dataclass
class Answer:
    """What answered a hello: `applied` is one of REFUSALS where it was refused."""

    applied: int
    limit: int = 0
    pairs: list[tuple[int, int]] = field(default_factory=list)

    def __str__(self) -> str:
        if self.applied in REFUSALS:
            return f"refused ({REFUSALS[self.applied]})"
        return f"applied {self.applied}, pairs {self.pairs}"


class Session(Connection):
    """A connection of a session, once its hello was answered; `cut` parts the hello there."""

    def __init__(self, judge: Judge, session: int, kind: str, value: int, cut: int = 0) -> None:
        super().__init__(judge.address, judge.patience_s)
        self.id = session
        self.send(hello(session, kind, value), cut)
        self.answer = self.read_answer(value if kind == "resume" else 0)

    def read_answer(self, have: int) -> Answer:
        """Reads it to its last byte and not further."""
        (applied,) = self.words(1)
        if applied in REFUSALS:
            return Answer(applied)
        (limit,) = self.words(1)
        answer = Answer(applied, limit)
        last = have
        while last < applied:
            number, total = self.words(2)
            if not last < number <= applied:
                raise Wrong(f"a pair of frame {number}, behind {last}, where {applied} are applied")
            answer.pairs.append((number, total))
            last = number
        return answer

    def accepted(self, applied: int) -> Session:
        """Itself; Wrong unless the answer says so."""
        if self.answer.applied != applied:
            raise Wrong(f"the hello was answered: {self.answer}; {applied} were applied")
        return self

    def refused(self, reason: int) -> None:
        """Wrong unless it was refused for this reason, with FIN behind it."""
        if self.answer.applied != reason:
            raise Wrong(f"the hello was answered: {self.answer}; not: {REFUSALS[reason]}")
        self.expect_fin("behind the refusal")

    def totals(self, have: int, amounts: Sequence[int]) -> list[int]:
        """The totals of the frames since `have`, as the answer's pairs give them."""
        result: list[int] = []
        for last, total in self.answer.pairs:
            part = amounts[len(result) : last - have]
            result += after(total - sum(part), part)
        return result


class Judge:
    """Makes the connections of checks, and knows what they should have added."""

    def __init__(self, host: str, port: int, patience_s: float, large: bool = False) -> None:
        self.address = (host, port)
        self.patience_s = patience_s
        self.large = large
        self.added = 0  # by the check that runs
        self._open: list[Connection] = []

    def connect(self) -> Connection:
        """A plain connection; its check need not close it."""
        connection = Connection(self.address, self.patience_s)
        self._open.append(connection)
        return connection

    def session(self, kind: str, value: int, session: int | None = None, cut: int = 0) -> Session:
        """A connection of a session, of a new id if none is given, with the answer to its hello."""
        if session is None:
            session = secrets.randbits(128)
        connection = Session(self, session, kind, value, cut)
        self._open.append(connection)
        return connection

    def open(self, window: int = 64, cut: int = 0) -> Session:
        """A new session."""
        return self.session("open", window, cut=cut).accepted(0)

    def add(self, connection: Connection, *amounts: int) -> list[int]:
        """Adds; Wrong unless each total is the one before and its amount."""
        before = self.total()
        self.added += sum(amounts)
        totals = connection.ask(amounts)
        expect(totals, after(before, amounts), "totals")
        return totals

    def total(self) -> int:
        """What a plain connection of its own reads."""
        connection = Connection(self.address, self.patience_s)
        with connection.sock:
            return connection.ask([0])[0]

    def end(self, session: Session, have: int) -> None:
        """Ends a session, of whose `have` frames the replies are there."""
        session.send(control("end", have))
        expect(session.words(1), [have], "the answer to `end`")
        session.expect_fin("behind the answer to `end`")

    def close(self) -> None:
        """Closes what a check has left open."""
        for connection in self._open:
            connection.sock.close()
        self._open.clear()


Check = Callable[[Judge], str]
PLAIN: list[tuple[str, Check, str]] = []
SESSIONS: list[tuple[str, Check, str]] = []


def rule(checks: list[tuple[str, Check, str]], name: str, says: str) -> Callable[[Check], Check]:
    """Makes a function a check; `says` is the protocol's rule."""

    def note(check: Check) -> Check:
        checks.append((name, check, says))
        return check

    return note


@rule(PLAIN, "vectors", "the checksum is XXH64 of the amount's decimal text, big-endian")
def vectors(judge: Judge) -> str:
    known = {
        0: "0000000000000000633457081244afec",
        1: "0000000000000001b7b41276360564d4",
        10: "000000000000000a4b48550ea3b07f17",
        123: "000000000000007b3c697d223fa7e885",
    }
    connection = judge.connect()
    for amount, text in known.items():
        before = judge.total()
        judge.added += amount
        connection.send(bytes.fromhex(text))
        expect(connection.words(1), [before + amount & MASK], f"the reply to {amount}")
    return f"{len(known)} frames taken, of amounts up to 123"


@rule(PLAIN, "arithmetic", "the total is added to modulo 2^64")
def arithmetic(judge: Judge) -> str:
    if not judge.large:
        raise Skip("only with --large: it adds 2^64 - 1 and then 1, as others may see")
    judge.add(judge.connect(), 2**64 - 1, 1, 2**63, 2**63)
    return "two sums of 2^64 leave the total as it was"


@rule(PLAIN, "split", "a frame may arrive split at any byte")
def split(judge: Judge) -> str:
    connection = judge.connect()
    for cut in range(1, 32):
        before = judge.total()
        judge.added += 3
        connection.send(frames([1, 2]), cut)
        expect(connection.words(2), after(before, [1, 2]), f"two frames cut at byte {cut}")
    return "two frames, cut at each of 31 bytes: each answered once"


@rule(PLAIN, "byte by byte", "a frame may arrive split at any byte")
def byte_by_byte(judge: Judge) -> str:
    connection, before = judge.connect(), judge.total()
    judge.added += 3
    for byte in frames([1, 2]):
        connection.send(bytes([byte]))
        time.sleep(BETWEEN_PARTS_S)
    expect(connection.words(2), after(before, [1, 2]), "two frames, byte by byte")
    return "two frames of 32 writes: each answered once"


@rule(PLAIN, "order", "replies come in the order of the frames, each with the total right after it")
def order(judge: Judge) -> str:
    amounts = [5, 0, 3, 9, 1, 0, 0, 7, 2]
    judge.add(judge.connect(), *amounts)
    return (
        f"{len(amounts)} different frames in one write: each total is the one before and its amount"
    )


@rule(PLAIN, "pipelined", "4,096 frames may be sent before any reply is read")
def pipelined(judge: Judge) -> str:
    judge.add(judge.connect(), *[(0, 1, 0, 2, 0, 3)[n % 6] for n in range(UNREAD_FRAMES)])
    return "4,096 frames in one write, then 4,096 replies in their order"


@rule(PLAIN, "reading", "adding 0 reads the total")
def reading(judge: Judge) -> str:
    totals = judge.connect().ask([0, 0, 0])
    expect(totals, [judge.total()] * 3, "three reads")
    return f"three reads: {totals[0]} each"


def refusal(judge: Judge, bad: bytes) -> None:
    """Sends 3 good frames, a bad one, 2 good ones: 3 are counted and answered, then FIN."""
    connection, before = judge.connect(), judge.total()
    judge.added += 6
    connection.send(frames([1, 2, 3]) + bad + frames([4, 5]))
    expect(connection.words(3), after(before, [1, 2, 3]), "replies to what was in front of it")
    connection.expect_fin("behind the refused frame")


@rule(
    PLAIN, "refusal", "in front of a wrong checksum all is counted and answered, then FIN; no more"
)
def refusals(judge: Judge) -> str:
    wrong = [
        word(1) + xxh64_digest(word(1)),
        word(1) + xxh64_digest(b"01"),
        word(1) + xxh64_digest(b"1")[::-1],
        word(1) + bytes(8),
        word(2) + xxh64_digest(b"1"),
        b"GET / HTTP/1.1\r\n",
    ]
    for bad in wrong:
        refusal(judge, bad)
    connection = judge.connect()
    connection.send(wrong[0] + frame(7))
    connection.expect_fin("the first frame of a connection was wrong")
    return f"{len(wrong)} wrong frames: 3 in front answered, FIN, the 2 behind not counted"


@rule(PLAIN, "FIN, not RST", "after a refusal the server reads on for 1 s, so that no RST is seen")
def no_reset(judge: Judge) -> str:
    connection = judge.connect()
    began = time.monotonic()
    connection.send(word(1) + bytes(8))
    connection.expect_fin("a wrong frame")
    connection.send(frames([1] * 64))
    is_reset = connection.is_reset_within(SETTLE_S)
    if time.monotonic() - began > LINGER_S:
        raise Skip("this machine is too slow to tell")
    if is_reset:
        raise Wrong("RST, when 64 frames came behind the refusal")
    return "64 frames behind FIN: no RST"


@rule(PLAIN, "incomplete", "EOF inside a frame counts nothing for it; those in front are answered")
def incomplete(judge: Judge) -> str:
    for size in range(16):
        connection, before = judge.connect(), judge.total()
        judge.added += 3
        connection.send(frames([1, 2]) + frame(4)[:size])
        connection.finish()
        expect(connection.words(2), after(before, [1, 2]), f"two frames and {size} bytes")
        connection.expect_fin(f"{size} bytes of a frame, and EOF")
    return "two frames and 0 to 15 bytes, then EOF: two replies and FIN"


@rule(PLAIN, "two connections", "a total contains every addition that was answered before")
def two_connections(judge: Judge) -> str:
    one, other = judge.connect(), judge.connect()
    for _ in range(20):
        judge.add(one, 1)
        judge.add(other, 2)
    return "40 additions in turn: each reply contains all before"


@rule(PLAIN, "at the same time", "the replies to N additions of 1 are a permutation of N totals")
def same_time(judge: Judge) -> str:
    many = [judge.connect() for _ in range(4)]
    before = judge.total()
    judge.added += 400
    for part in range(10):
        for connection in many[part % 4 :] + many[: part % 4]:
            connection.send(frames([1] * 10))
    totals = [connection.words(100) for connection in many]
    for own in totals:
        expect(own, sorted(own, key=lambda total: (total - before) & MASK), "replies, as they rise")
    steps = sorted((total - before) & MASK for own in totals for total in own)
    expect(steps, list(range(1, 401)), "the totals of 400 additions of 1 on 4 connections")
    return "400 additions of 1 on 4 connections: each total once"


@rule(PLAIN, "reset", "a peer that resets its connection inside a frame counts nothing for it")
def reset(judge: Judge) -> str:
    for size in range(1, 16):
        connection = judge.connect()
        connection.send(frame(1)[:size])
        connection.reset()
    judge.add(judge.connect(), 1)
    return "15 resets inside a frame: nothing counted, others are served"


@rule(PLAIN, "reset behind a frame", "frames that were not read when RST came are not counted")
def reset_whole(judge: Judge) -> str:
    raise Skip("what a server had read before the RST cannot be seen from outside")


@rule(
    PLAIN, "control frames are no additions", "no control frame adds anything on a plain connection"
)
def control_frames(judge: Judge) -> str:
    kinds = ("id-high", "id-low", "open", "resume", "end")
    for kind in kinds:
        refusal(judge, control(kind, 1))
    for kind in kinds[1:]:
        connection = judge.connect()
        connection.send(control(kind, 1))
        connection.finish()
        connection.expect_fin(f"`{kind}` as the first frame")
    return "each of 5 kinds is refused as a wrong checksum is; so is `end` of no session"


@rule(SESSIONS, "open", "`open` of a new id is answered with 0 and the limit, 16 bytes")
def opened(judge: Judge) -> str:
    session = judge.open()
    if select.select([session.sock], [], [], SETTLE_S)[0]:
        raise Wrong("more than 16 bytes, or the end")
    judge.end(session, 0)
    return f"applied 0, limit {session.answer.limit}"


@rule(SESSIONS, "frames", "frames of a session are answered as all others, from the same total")
def session_frames(judge: Judge) -> str:
    session, plain = judge.open(), judge.connect()
    judge.add(session, 1, 0, 2)
    judge.add(plain, 3)
    judge.add(session, *[1] * 64)
    judge.end(session, 67)
    return "68 frames of a session and a plain one, in turn"


@rule(SESSIONS, "resume", "`resume` with all replies is answered with their number and no pairs")
def resumed(judge: Judge) -> str:
    session = judge.open()
    judge.add(session, 1, 0, 2)
    session.sock.close()
    session = judge.session("resume", 3, session.id).accepted(3)
    judge.add(session, 4)
    judge.end(session, 4)
    return "3 frames (a read among them), a new connection: applied 3; it goes on"


@rule(
    SESSIONS, "pairs", "each pair is a frame's number and the total right after it, up to `applied`"
)
def pairs(judge: Judge) -> str:
    session, amounts = judge.open(), [1, 2, 3, 0, 5, 6, 7, 8]
    totals: list[int] = []
    for start, stop in ((0, 3), (3, 4), (4, 8)):
        totals += judge.add(session, *amounts[start:stop])
        judge.add(judge.connect(), 1)
    for have in (0, 2, 3, 5, 7, 8, 0):
        session = judge.session("resume", have, session.id).accepted(8)
        expect(
            session.totals(have, amounts[have:]), totals[have:], f"totals behind `resume:{have}`"
        )
    judge.end(session, 8)
    return "8 frames in 3 parts: `resume` with 0 to 8 gives back the totals first given"


@rule(SESSIONS, "a whole window", "a window of frames may be unanswered, and its totals are kept")
def whole_window(judge: Judge) -> str:
    session, amounts = judge.open(LARGEST_WINDOW), [n % 3 for n in range(LARGEST_WINDOW)]
    totals = judge.add(session, *amounts)
    session = judge.session("resume", 0, session.id).accepted(LARGEST_WINDOW)
    expect(session.totals(0, amounts), totals, "totals of the whole window")
    judge.add(session, 1)
    judge.end(session, LARGEST_WINDOW + 1)
    return f"4,096 frames unanswered: all totals again, in {len(session.answer.pairs)} pairs"


@rule(
    SESSIONS,
    "broken at any byte",
    "`applied` is what is in the total; the rest is not, nor will be",
)
def broken(judge: Judge) -> str:
    amounts = [1, 2, 3]
    for cut in range(1, 49):
        session, before = judge.open(), judge.total()
        session.send(frames(amounts)[:cut])
        session.sock.close()
        session = judge.session("resume", 0, session.id)
        applied = session.answer.applied
        if applied > cut // 16:
            raise Wrong(f"{session.answer}, where {cut} bytes of frames were sent")
        judge.added += 6
        totals = session.totals(0, amounts) + session.ask(amounts[applied:])
        expect(totals, after(before, amounts), f"totals of 3 frames cut at byte {cut}")
        judge.end(session, 3)
    return "3 frames broken off at each of 48 bytes and gone on with: each counted once"


@rule(SESSIONS, "taken over", "what comes on the connection before is not counted any more")
def taken_over(judge: Judge) -> str:
    old = judge.open()
    judge.add(old, 1)
    session = judge.session("resume", 1, old.id).accepted(1)
    old.send(frames([7, 7]))
    if not old.is_ended():
        raise Wrong("two frames on the old connection were answered")
    judge.add(session, 2)
    judge.session("resume", 2, session.id).accepted(2)
    judge.end(judge.session("resume", 2, session.id).accepted(2), 2)
    return "two frames on the old connection: not counted, and it was ended"


@rule(SESSIONS, "taken over in the middle", "what `applied` leaves out is not counted, nor will be")
def taken_over_in_the_middle(judge: Judge) -> str:
    amounts = [1, 2, 3, 4]
    found = set()
    for _ in range(20):
        old, before = judge.open(), judge.total()
        judge.added += 10
        old.send(frames(amounts[:3]))
        session = judge.session("resume", 0, old.id)
        applied = session.answer.applied
        if applied > 3:
            raise Wrong(f"{session.answer}, where 3 frames were sent")
        found.add(applied)
        old.send(frames([7]))
        totals = session.totals(0, amounts) + session.ask(amounts[applied:])
        expect(
            totals, after(before, amounts), "totals of 4 frames, 3 of them on the old connection"
        )
        judge.end(session, 4)
    seen = ", ".join(map(str, sorted(found)))
    return f"3 frames, and at once `resume` elsewhere, 20 times: applied {seen}; each counted once"


@rule(
    SESSIONS,
    "resume above applied",
    "`applied` and limit, no pairs, FIN, and the session is no more",
)
def above(judge: Judge) -> str:
    session = judge.open()
    judge.add(session, 1, 2)
    late = judge.session("resume", 3, session.id).accepted(2)
    late.send(frame(9))
    late.expect_fin("behind the answer")
    judge.session("resume", 2, session.id).refused(UNKNOWN)
    return "`resume:3` of 2: applied 2, FIN; then no such session"


@rule(
    SESSIONS,
    "resume below the window",
    "below `applied` - window it is refused and takes nothing over",
)
def below(judge: Judge) -> str:
    session = judge.open(2)
    for _ in range(5):
        judge.add(session, 1)
    for have in (0, 1, 2):
        judge.session("resume", have, session.id).refused(UNKNOWN)
    judge.add(session, 1)
    session = judge.session("resume", 4, session.id).accepted(6)
    judge.end(session, 6)
    return "a window of 2, 5 applied: `resume` with 0, 1, 2 refused, and the session goes on"


@rule(SESSIONS, "unknown id", "`resume` of an unknown id is answered with 2^64 - 1 and FIN")
def unknown(judge: Judge) -> str:
    for have in (0, 1, 2**63):
        judge.session("resume", have).refused(UNKNOWN)
    return "three unknown ids refused"


@rule(
    SESSIONS,
    "open again, unused",
    "`open` of a known id is answered with 0, while nothing is applied",
)
def open_unused(judge: Judge) -> str:
    old = judge.open(8)
    session = judge.session("open", 8, old.id).accepted(0)
    old.send(frame(7))
    if not old.is_ended():
        raise Wrong("a frame on the connection before was answered")
    judge.add(session, 1)
    judge.end(session, 1)
    return "`open` twice: the second took over, the first was ended"


@rule(
    SESSIONS,
    "open again, used",
    "`open` of a known id with frames is refused; it takes nothing over",
)
def open_used(judge: Judge) -> str:
    session = judge.open()
    judge.add(session, 1)
    judge.session("open", 64, session.id).refused(UNKNOWN)
    judge.add(session, 1)
    judge.end(session, 2)
    return "`open` of a session with a frame refused, and the session goes on"


@rule(SESSIONS, "window", "a window is 1 to 4,096; any other ends the connection without an answer")
def window(judge: Judge) -> str:
    for size in (0, LARGEST_WINDOW + 1, 2**64 - 1):
        connection, session = judge.connect(), secrets.randbits(128)
        connection.send(hello(session, "open", size))
        connection.expect_fin(f"`open:{size}`")
        judge.session("resume", 0, session).refused(UNKNOWN)
    for size in (1, LARGEST_WINDOW):
        judge.end(judge.open(size), 0)
    return "1 and 4,096 taken; 0, 4,097 and 2^64 - 1: FIN, nothing opened"


@rule(SESSIONS, "hello, split", "a hello may arrive split at any byte")
def hello_split(judge: Judge) -> str:
    for cut in range(1, 48):
        judge.end(judge.open(4, cut), 0)
    return "cut at each of 47 bytes: answered"


@rule(SESSIONS, "hello, cut off", "EOF inside a hello opens nothing and is not answered")
def hello_cut(judge: Judge) -> str:
    session = secrets.randbits(128)
    for cut in range(1, 48):
        connection = judge.connect()
        connection.send(hello(session, "open", 4)[:cut])
        connection.finish()
        connection.expect_fin(f"{cut} bytes of a hello, and EOF")
    judge.session("resume", 0, session).refused(UNKNOWN)
    return "EOF behind each of 47 bytes: FIN, nothing opened"


@rule(SESSIONS, "hello, wrong", "other kinds, another order or a wrong checksum: FIN, no answer")
def hello_wrong(judge: Judge) -> str:
    session = secrets.randbits(128)
    high, low, last = (hello(session, "open", 4)[at : at + 16] for at in (0, 16, 32))
    broken = last[:15] + bytes([last[15] ^ 1])
    wrong = (
        low + high + last,
        high + high + last,
        high + last + low,
        high + low + control("end", 0),
        high + low + frame(1),
        high + frame(1) + last,
        high + low + broken,
    )
    for data in wrong:
        connection = judge.connect()
        connection.send(data)
        connection.expect_fin(f"a wrong hello ({data[:48].hex(' ', 8)})")
    judge.session("resume", 0, session).refused(UNKNOWN)
    return f"{len(wrong)} wrong hellos: FIN, nothing opened, nothing counted"


@rule(
    SESSIONS,
    "behind an unanswered hello",
    "what comes behind a hello before its answer ends it: FIN",
)
def hello_behind(judge: Judge) -> str:
    for behind in (frame(7), frame(7)[:1], hello(1, "open", 4)):
        connection, session = judge.connect(), secrets.randbits(128)
        connection.send(hello(session, "open", 4) + behind)
        connection.expect_fin(f"a hello and {len(behind)} bytes more in one write")
        judge.session("resume", 0, session).refused(UNKNOWN)
    return "a frame, a byte, a hello behind it: FIN, nothing opened, nothing counted"


@rule(SESSIONS, "hello twice", "a second hello is a refused frame: FIN, and the session is no more")
def hello_twice(judge: Judge) -> str:
    for kind, value in (("open", 64), ("resume", 1)):
        session = judge.open()
        judge.add(session, 1)
        session.send(hello(session.id, kind, value))
        session.expect_fin(f"a second hello, `{kind}:{value}`")
        judge.session("resume", 1, session.id).refused(UNKNOWN)
    return "`open` and `resume` inside a session: FIN, then no such session"


@rule(
    SESSIONS,
    "refusal in a session",
    "what is in front is answered, then FIN; the session is no more",
)
def session_refusal(judge: Judge) -> str:
    for bad in (word(1) + bytes(8), control("id-low", 1)):
        session, before = judge.open(), judge.total()
        judge.added += 3
        session.send(frames([1, 2]) + bad + frame(4))
        expect(session.words(2), after(before, [1, 2]), "replies to what was in front of it")
        session.expect_fin("behind the refused frame")
        judge.session("resume", 2, session.id).refused(UNKNOWN)
    return "2 frames in front answered, FIN, the one behind not counted; no such session"


@rule(SESSIONS, "limit", "an amount above the limit of the answer is refused")
def limit(judge: Judge) -> str:
    session = judge.open()
    judge.end(session, 0)
    if session.answer.limit == MASK:
        raise Skip("this server takes every amount")
    refusal(judge, frame(session.answer.limit + 1))
    return f"{session.answer.limit + 1} is refused"


@rule(SESSIONS, "end", "`end` is answered with `applied` and FIN; then the id is unknown")
def ended(judge: Judge) -> str:
    session = judge.open()
    judge.add(session, 1, 2)
    judge.end(session, 2)
    judge.session("resume", 2, session.id).refused(UNKNOWN)
    session, before = judge.open(), judge.total()
    judge.added += 3
    session.send(frames([1, 2]) + control("end", 0) + frame(4))
    expect(session.words(3), [*after(before, [1, 2]), 2], "two replies and the answer to `end`")
    session.expect_fin("behind the answer to `end`")
    return "applied 2, FIN, then unknown; in one write with 2 frames as well; no frame behind it"


@rule(
    SESSIONS,
    "end of a stranger",
    "`end` of a plain connection is a refused frame and ends no session",
)
def end_of_stranger(judge: Judge) -> str:
    session, stranger = judge.open(), judge.connect()
    judge.add(session, 1)
    judge.add(stranger, 1)
    stranger.send(control("end", 1))
    stranger.expect_fin("`end` on a plain connection")
    judge.add(session, 1)
    judge.end(judge.session("resume", 2, session.id).accepted(2), 2)
    return "FIN without an answer, and a session goes on"


def without_sessions(judge: Judge) -> str:
    """Why sessions cannot be judged; empty if they can. A server that drains ends a hello too."""
    for _ in range(PRESENT):
        connection = judge.connect()
        connection.send(hello(secrets.randbits(128), "open", 1))
        try:
            data = connection.read(16)
        except Wrong as why:
            return f"an `open` of a new id is not answered: {why}"
        if data[:8] == word(0):
            connection.send(control("end", 0))
            return ""
        if data:
            return no_answer(int.from_bytes(data[:8], "big"))
    return f"it ends a hello without an answer ({PRESENT} times): a server without sessions"


def no_answer(applied: int) -> str:
    """Why an `open` that is answered so opens nothing."""
    return f"an `open` of a new id is answered with {REFUSALS.get(applied, applied)}"


def look(judge: Judge, sessions: str) -> tuple[int, str]:
    """The total, and why sessions cannot be judged, before anything was added."""
    try:
        total = judge.total()
        missing = "--sessions no" if sessions == "no" else without_sessions(judge)
        time.sleep(SETTLE_S)
        if judge.total() != total:
            raise CannotTell("the total changes by itself: somebody else adds, or reading does")
    finally:
        judge.close()
    return total, missing


def run(judge: Judge, check: Check) -> tuple[str, str]:
    """PASS, FAIL or SKIP, and what was seen."""
    judge.added = 0
    try:
        before = judge.total()
        seen = check(judge)
        risen = (judge.total() - before) & MASK
        if risen != judge.added & MASK:
            raise Wrong(f"the total rose by {risen}, and {judge.added} was to be added")
    except Skip as why:
        return "SKIP", str(why)
    except (Wrong, OSError) as why:
        return "FAIL", str(why)
    finally:
        judge.close()
    return "PASS", seen


def judge_all(judge: Judge, sessions: str) -> int:
    """Runs all checks and prints what they saw; gives back the exit code."""
    try:
        before, missing = look(judge, sessions)
    except Wrong as why:
        print(f"FAIL at the start: saw {why}; protocol: a frame of 0 reads the total")
        return 1
    print(f"Adds small amounts, some ten thousand in all, to the total, which is {before}.")
    print("This tells right from wrong only while nobody else adds.")
    print(f"Sessions: {f'left out, {missing}' if missing else 'judged'}.")
    done = {"PASS": 0, "FAIL": 0, "SKIP": 0}
    expected = before
    for place, checks in (("plain", PLAIN), ("session", SESSIONS)):
        for name, check, says in checks:
            if place == "session" and missing:
                verdict, seen = ("FAIL" if sessions == "yes" else "SKIP"), missing
            else:
                verdict, seen = run(judge, check)
            done[verdict] += 1
            expected += judge.added
            judge.added = 0
            saw = seen if verdict == "SKIP" else f"saw {seen}"
            print(f"{verdict} {place}, {name}: {saw}; protocol: {says}", flush=True)
    total = judge.total()
    if not done["FAIL"] and total != expected & MASK:
        done["FAIL"] += 1
        print(f"FAIL at the end: saw {total}; protocol: {expected & MASK}, all that was counted")
    print(f"{done['PASS']} passed, {done['FAIL']} failed, {done['SKIP']} skipped; total {total}")
    return 1 if done["FAIL"] else 0


def address(text: str) -> tuple[str, int]:
    """The host and port of HOST:PORT or [IPv6]:PORT."""
    host, colon, port = text.rpartition(":")
    if not (colon and port.isascii() and port.isdecimal() and int(port) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description="Judges whether a counter server keeps to docs/protocol.md. It adds small "
        "amounts, and can judge only while nobody else adds.",
        epilog="It ends with 0 if all is right, 1 if anything is not, 2 if it cannot tell.",
    )
    parser.add_argument("address", type=address, metavar="HOST:PORT")
    parser.add_argument(
        "--sessions",
        choices=("auto", "yes", "no"),
        default="auto",
        help="auto judges them where the server has them, yes fails without them (%(default)s)",
    )
    parser.add_argument(
        "--large",
        action="store_true",
        help="also add amounts that come to 2^64: others see totals that jump",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE_S,
        metavar="SECONDS",
        help="for what has to come (%(default)s)",
    )
    options = parser.parse_args()
    host, port = options.address
    try:
        return judge_all(Judge(host, port, options.patience, options.large), options.sessions)
    except (CannotTell, OSError) as error:
        print(f"conformance.py cannot tell of {host}:{port}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
