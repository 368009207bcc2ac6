"""A session as its client keeps it: which frames have which number, and what a server's words mean.

The law: a frame gets its number once, before it is sent, and keeps it on every connection; a total
is given back once, as it came first. So what a server says it has applied tells, for each frame,
whether it is in the total.

No socket, no clock, no lock: bytes in, totals out. SessionFile alone touches a disk.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import stat
import struct
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import islice, repeat
from typing import Any, Final, NamedTuple

from protocol import (
    MAX_AMOUNT,
    MAX_WINDOW,
    REPLY_SIZE,
    TOTAL_MASK,
    BadFrame,
    Control,
    CounterError,
    Hello,
    Refused,
    Run,
    decode_totals,
    encode_control,
    encode_frame,
)

_RUN: Final = struct.Struct(">QQ")
_REFUSALS: Final = {refused.value: refused for refused in Refused}


class Pending(NamedTuple):
    """An addition whose total has not come: the application's name for it, and its amount."""

    name: str
    amount: int


class Settled(NamedTuple):
    """An addition that was counted: the application's name for it, its amount, and the total right
    after it."""

    name: str
    amount: int
    total: int


class StateError(CounterError, ValueError):
    """What should be the state of a session is none, or somebody else has its file."""


@dataclass(frozen=True)
class SessionState:
    """All that it takes to go on with a session in another process, after a crash of this one.

    `session_id` has 128 bits and is a secret: who knows it can take the session over. `answered`
    frames have their total; `pending` are the additions behind them, in order, at most `window`.
    `settled` are those whose total came since the state before this one was handed out.
    """

    session_id: int
    window: int
    answered: int = 0
    pending: tuple[Pending, ...] = ()
    settled: tuple[Settled, ...] = ()

    def __post_init__(self) -> None:
        words = [self.answered, *(p.amount for p in self.pending)]
        words += [word for settled in self.settled for word in settled[1:]]
        names = [entry[0] for entry in (*self.pending, *self.settled)]
        if not (
            _is_int(self.session_id, 2**128 - 1)
            and _is_int(self.window, MAX_WINDOW)
            and self.window
            and len(self.pending) <= self.window
            and all(_is_int(word, MAX_AMOUNT) for word in words)
            and all(isinstance(name, str) for name in names)
        ):
            raise StateError("a state of a session with values that no session has")

    def to_text(self) -> str:
        """One line of JSON, without its end."""
        return json.dumps(asdict(self) | {"session_id": f"{self.session_id:032x}"})

    @classmethod
    def from_text(cls, text: str) -> SessionState:
        """The state that to_text() wrote; StateError for anything else."""
        try:
            fields: dict[str, Any] = json.loads(text)
            fields["session_id"] = int(fields["session_id"], 16)
            fields["pending"] = tuple(Pending(*each) for each in fields["pending"])
            fields["settled"] = tuple(Settled(*each) for each in fields["settled"])
            return cls(**fields)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise StateError(f"no state of a session: {error}") from error


def _is_int(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


class Phase(Enum):
    """Where a session is; `Session.phase` moves down this list, and between the middle two."""

    NEW = "new"  # no server has answered its open
    OPEN = "open"  # a connection carries it
    RESUMING = "resuming"  # it has none, and its server is to say what was applied
    LOST = "lost"  # its server knows it no more


class HelloRefused(CounterError):
    """A server answers a hello with a refusal. UNKNOWN means that the session is lost."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused)
        self.refused = refused


class AnswersLost(CounterError):
    """A server has applied `count` frames less than it has answered: the session is lost."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.count = count


class PendingAboveLimit(CounterError):
    """A server takes smaller amounts than before, and one that is pending is larger."""

    def __init__(self, amount: int, limit: int) -> None:
        super().__init__(amount, limit)
        self.amount, self.limit = amount, limit


class Session:
    """The numbers of one session, and the amounts that have no total yet.

    What comes from its server goes through receive(), what goes there is from hello(), frames() and
    the caller's own frames, right after number().
    """

    def __init__(self, window: int, state: SessionState | None = None) -> None:
        self.id = state.session_id if state else secrets.randbits(128)
        self.window = state.window if state else window
        self.phase = Phase.RESUMING if state else Phase.NEW
        self.answered = state.answered if state else 0
        self.limit = MAX_AMOUNT  # the server's, as it last said
        # Plain pairs: three times as fast to make as named ones, and there is one for each frame.
        self._pending: deque[tuple[str, int]] = deque(state.pending if state else ())
        self._settled: list[Settled] | None = None
        self._data = b""  # of an answer or a reply that is not whole
        self._applied: int | None = None  # that the answer being read tells

    def successor(self, window: int) -> Session:
        """A new session in the place of one that is over; what was settled is not forgotten."""
        successor = Session(window)
        successor._settled = self._settled
        return successor

    def keep_settled(self) -> None:
        """From here on states have what was settled, until forget_settled()."""
        self._settled = []

    def forget_settled(self, count: int) -> None:
        """Takes away the oldest, which a state has had that is safe."""
        if self._settled is not None:
            del self._settled[:count]

    @property
    def pending(self) -> int:
        """So many frames have a number and no total."""
        return len(self._pending)

    @property
    def room(self) -> int:
        """So many more may have a number now."""
        return self.window - len(self._pending)

    @property
    def state(self) -> SessionState:
        """What another process would need to go on from here."""
        pending = tuple(Pending(*each) for each in self._pending)
        settled = tuple(self._settled or ())
        return SessionState(self.id, self.window, self.answered, pending, settled)

    def number(self, name: str, amounts: Sequence[int]) -> None:
        """Gives the next numbers to amounts, of which there is room for."""
        assert self.phase is Phase.OPEN
        assert len(amounts) <= self.room
        self._pending += zip(repeat(name), amounts)

    def take_back(self, count: int) -> None:
        """Takes the last numbers away again, of frames that were handed to no connection."""
        for _ in range(count):
            self._pending.pop()

    def hello(self) -> bytes:
        """What a new connection begins with."""
        assert self.phase in (Phase.NEW, Phase.RESUMING)
        if self.phase is Phase.NEW:
            return Hello(self.id, Control.OPEN, self.window).encode()
        return Hello(self.id, Control.RESUME, self.answered).encode()

    def frames(self) -> bytes:
        """The frames of all that is pending: what is sent once a hello was answered.

        PendingAboveLimit where the server would refuse one, and end the session for it.
        """
        assert self.phase is Phase.OPEN
        largest = max((amount for _, amount in self._pending), default=0)
        if largest > self.limit:
            self.phase = Phase.LOST
            raise PendingAboveLimit(largest, self.limit)
        return b"".join(encode_frame(amount) for _, amount in self._pending)

    def end(self) -> bytes:
        """What ends it, where nothing is pending."""
        assert self.phase is Phase.OPEN
        assert not self._pending
        return encode_control(Control.END, self.answered)

    def broke(self) -> None:
        """Its connection is no more, and what was left of a word with it."""
        if self.phase is Phase.OPEN:
            self.phase = Phase.RESUMING
        self._data, self._applied = b"", None

    def receive(self, data: bytes) -> list[int]:
        """The totals that follow from what came, of the oldest that are pending.

        HelloRefused and AnswersLost; BadFrame where no server says so. None of them takes a total
        away: what came before them was given back before, or is told again.
        """
        data = self._data + data
        if self.phase is Phase.OPEN:
            replies, self._data = decode_totals(data)
            if len(replies) > len(self._pending):
                raise BadFrame("answer", f"{len(replies)} replies to {len(self._pending)} frames")
            return self._settle(replies)
        if self._applied is None:
            data = self._begin(data)
        runs, self._data = self._runs(data)
        totals = [total for run in runs for total in self._follow(run)]
        if self._applied == self.answered:
            if self._data:
                raise BadFrame("answer", "there is more behind the answer to a hello")
            self.phase, self._applied = Phase.OPEN, None
        return totals

    def _begin(self, data: bytes) -> bytes:
        """Reads how an answer begins, and gives back what is left; all of it, if not whole."""
        if len(data) >= REPLY_SIZE:
            refused = _REFUSALS.get(int.from_bytes(data[:REPLY_SIZE]))
            if refused is not None:
                if refused is Refused.UNKNOWN:
                    self.phase = Phase.LOST
                raise HelloRefused(refused)
        if len(data) < _RUN.size:
            return data
        applied, limit = _RUN.unpack_from(data)
        if applied < self.answered:
            self.phase = Phase.LOST
            raise AnswersLost(self.answered - applied)
        most = self.answered + len(self._pending)
        if applied > most:
            said = f"{applied} frames are said to be applied, {most} were sent"
            raise BadFrame("answer", f"{said}, as far as this state of the session tells")
        self._applied, self.limit = applied, limit
        return data[_RUN.size :]

    def _runs(self, data: bytes) -> tuple[list[Run], bytes]:
        """The whole runs of the answer being read, and the bytes left over. BadFrame."""
        runs: list[Run] = []
        if self._applied is None:
            return runs, data
        last, at = self.answered, 0
        while last < self._applied and len(data) - at >= _RUN.size:
            run = _RUN.unpack_from(data, at)
            if not last < run[0] <= self._applied:
                of = f"{last} of {self._applied}"
                raise BadFrame("answer", f"a run ends with frame {run[0]}, after {of}")
            runs.append(run)
            last, at = run[0], at + _RUN.size
        return runs, data[at:]

    def _follow(self, run: Run) -> list[int]:
        """The totals up to the end of a run: nobody else's addition stands inside it."""
        last, after = run
        amounts = [amount for _, amount in islice(self._pending, last - self.answered)]
        totals = []
        for amount in reversed(amounts):
            totals.append(after)
            after = (after - amount) & TOTAL_MASK
        return self._settle(totals[::-1])

    def _settle(self, totals: Sequence[int]) -> list[int]:
        for total in totals:
            name, amount = self._pending.popleft()
            if self._settled is not None:
                self._settled.append(Settled(name, amount, total))
        self.answered += len(totals)
        return list(totals)


class SessionFile:
    """A file that one process at a time has, and the state of a session in it.

    It is locked until close(), or the end of the process; a forked child does not have it.
    StateError if another has it, or if it is the state of no session; OSError. `state` is what it
    had, None of a new one. A link stays one: the file that it leads to is meant.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.path.realpath(path)
        self._fd = _locked(self._path)
        _files.add(self)
        try:
            text = os.pread(self._fd, os.fstat(self._fd).st_size, 0).decode(errors="replace")
            self.state = SessionState.from_text(text) if text else None
        except StateError as error:
            self.close()
            raise StateError(f"{self._path}: {error}; name another file") from error
        except BaseException:
            self.close()
            raise

    def save(self, state: SessionState) -> None:
        """Puts a state in the place of the one before, whole or not at all; it is on the disk when
        this returns. OSError."""
        beside = f"{self._path}.{os.getpid()}.new"
        folder = os.open(os.path.dirname(self._path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._replace(beside, state)
            os.fsync(folder)  # the new name is on the disk too
        finally:
            os.close(folder)

    def _replace(self, beside: str, state: SessionState) -> None:
        """Writes a state into a new file, and gives that the name."""
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # before others can find it under its name
            with open(fd, "w", closefd=False) as file:
                file.write(state.to_text() + "\n")
            os.fsync(fd)
            os.replace(beside, self._path)
        except BaseException:
            os.close(fd)
            with suppress(OSError):
                os.unlink(beside)
            raise
        os.close(self._fd)
        self._fd = fd
        self.state = state

    def close(self) -> None:
        """Lets others have the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> SessionFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_files: weakref.WeakSet[SessionFile] = weakref.WeakSet()


def _close_in_child() -> None:
    for file in list(_files):
        file.close()


# Or a child that lives on would keep the file locked when its holder was killed.
os.register_at_fork(after_in_child=_close_in_child)


def _locked(path: str) -> int:
    """A descriptor of the file that has this name, with its lock; StateError if that is taken."""
    while True:
        # Nothing that it may be is waited for: a pipe, a terminal.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        fd = os.open(path, flags, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise StateError(f"{path}: a device or a pipe keeps no session; name a file")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    return fd
            # Its holder has put another in its place meanwhile.
        except BlockingIOError:
            os.close(fd)
            raise StateError(f"{path}: another process has this session; wait for it") from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
