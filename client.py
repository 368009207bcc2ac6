"""python client.py: the load generator's command; from client import CounterClient: the library.

Importing this module patches nothing and needs only the standard library, xxhash, protocol.py and
the modules of its own name; the command is counter/load/command.py's and is imported when it runs.

The law of the library: no addition is ever counted twice. Without a session none is sent twice:
once a frame may have reached the server, a failure is OutcomeUnknown, and the caller decides;
before that it is ConnectError, and trying again is safe. In a session a frame has a number, and is
sent again only when the server has said that it was not counted.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final

if __name__ == "__main__" and sys.flags.safe_path:
    # python -P leaves out the folder of the program, whose own modules are no strangers'.
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))

try:
    from client_line import (
        IS_IT_ONE,
        ArgumentError,
        ConnectError,
        Line,
        OutcomeUnknown,
        WrongType,
        amount_of,
        explain,
        shown,
    )
    from client_session import Pending, SessionFile, SessionState, Settled, StateError
    from client_session_line import (
        AcknowledgedLost,
        NoRoom,
        SessionEnded,
        SessionExpired,
        SessionHeld,
        SessionLine,
        SessionsUnsupported,
        StateNotSaved,
        StillPending,
    )
    from protocol import AddressError, AmountError, CounterError, encode_frame, parse_address
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    hint = "is not installed; pip install -r requirements.txt"
    sys.stderr.write(f"client.py: {error.name} {hint}\n")
    sys.exit(2)

if TYPE_CHECKING:
    import ssl
__all__ = [
    "AcknowledgedLost",
    "AddressError",
    "AmountError",
    "ArgumentError",
    "ConnectError",
    "CounterClient",
    "CounterError",
    "NoRoom",
    "NumbersEnded",
    "OutcomeUnknown",
    "SessionEnded",
    "SessionExpired",
    "SessionFile",
    "SessionHeld",
    "SessionState",
    "SessionsUnsupported",
    "Settled",
    "StateError",
    "StateNotSaved",
    "StillPending",
    "WrongType",
]

MAX_TIMEOUT_S: Final = 1_000_000  # 11 days; the system's own limit is 24


class NumbersEnded(CounterError):
    """take() crossed 2^64 - 1, behind which the total begins anew at 0.

    `amount` was counted, and `total` is the total right after it.
    """

    def __init__(self, amount: int, total: int) -> None:
        super().__init__(amount, total)
        self.amount, self.total = amount, total

    def __str__(self) -> str:
        now = f"{self.amount} was counted and the total passed 2^64 - 1, it is {self.total} now"
        return f"{now}; numbers from here on were given before, take them from another counter"


class ClientSession:
    """The session of a CounterClient, as its application sees it."""

    def __init__(self, line: SessionLine) -> None:
        self._line = line

    @property
    def state(self) -> SessionState:
        """What another process needs to go on with it, as it is now."""
        return self._line.state


class CounterClient:
    """One connection to a counter server: made on first use, and again after it was lost.

    `address` is `HOST:PORT`, `:PORT` or `[IPv6]:PORT`, and a name is looked up at each connect.
    `timeout` in seconds bounds a whole call: waiting for others, connecting, and every reply; None
    waits for ever. With a context of the ssl module as `tls` the connection is encrypted, and the
    server's certificate verified against the host of the address if the context says so.

    Threads and greenlets may share a client: calls that meet travel together. A forked child
    connects anew. Works with gevent where the application is patched, before or after this client
    is made. AddressError, ArgumentError or WrongType for what cannot be used.

    With `session` each addition is counted exactly once although connections and servers end: a
    call goes on until `timeout`, and its outcome is known while the server knows the session. Where
    that takes longer, StillPending says what is counted without it. A SessionState as `session`
    goes on with the session of a process that is no more. `on_state` is called with the state
    before frames are sent that it tells of, and when the session ends, by one caller at a time; to
    survive its own crash an application makes it last there, with what it tells of additions that
    were settled. A forked child has no part in the session: it opens its own, or has StateNotSaved
    where there is an `on_state`.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:8080",
        timeout: float | None = 10,
        tls: ssl.SSLContext | None = None,
        session: bool | SessionState = False,
        on_state: Callable[[SessionState], object] | None = None,
    ) -> None:
        if not isinstance(address, str):
            raise WrongType(f"address {shown(address)}: write text, as in '127.0.0.1:8080'")
        self.host, self.port = parse_address(address)
        if not self.port:
            raise AddressError(f"address {address!r}: port 0 cannot be connected to")
        if tls is not None and not hasattr(tls, "wrap_socket"):
            raise WrongType(f"tls {shown(tls)}: give an ssl.SSLContext, or None")
        self.timeout = None if timeout is None else _seconds(timeout)
        self.tls = tls
        if not isinstance(session, bool | SessionState):
            raise WrongType(f"session {shown(session)}: give True, False or a SessionState")
        if on_state is not None and not callable(on_state):
            raise WrongType(f"on_state {shown(on_state)}: give a function, or None")
        if on_state is not None and session is False:
            raise ArgumentError("on_state without a session, which alone has states")
        self._on_state = on_state
        self._line = Line(self.host, self.port, tls)
        if session is not False:
            state = None if session is True else session
            self._line = SessionLine(self.host, self.port, tls, state, on_state)
        _clients.add(self)

    @property
    def session(self) -> ClientSession | None:
        """The session, None without."""
        return ClientSession(self._line) if isinstance(self._line, SessionLine) else None

    def add(self, amount: int, *, name: str = "") -> int:
        """Adds an amount of 0..2^64-1; gives back the total right after that addition.

        AmountError for any other number and WrongType for anything else, ConnectError if there is
        no connection (nothing was counted), OutcomeUnknown if the reply did not come.

        In a session `name` is what states call the addition. StillPending if the reply did not
        come in time, SessionExpired (an OutcomeUnknown) if the server forgot the session,
        AcknowledgedLost if it lost what it had answered. A limit of the server's is known, and a
        larger amount an AmountError.
        """
        return self._ask([_frame(amount)], name)[0]

    def add_many(self, amounts: Iterable[int], *, name: str = "") -> list[int]:
        """Adds each amount, pipelined; gives back the total right after each, in order.

        Errors as with add(); OutcomeUnknown tells the answered, the unknown and the unsent apart.
        A bad amount is found before anything is sent.
        """
        try:
            each = iter(amounts)
        except TypeError:
            raise WrongType(f"amounts {shown(amounts)}: give a list of them") from None
        frames = [_frame(amount) for amount in each]
        return self._ask(frames, name) if frames else []

    def take(self, count: int, *, name: str = "") -> range:
        """So many numbers that nobody else has: one addition, and the numbers that it crossed.

        They are unique among all that take. Those of a take with OutcomeUnknown go to nobody.
        Errors as with add(), and NumbersEnded at 2^64 - 1. Taking 0 asks nobody. In a session those
        of a take with StillPending end with the total that settle() tells.
        """
        frame = _frame(count)
        amount = amount_of(frame)
        if not amount:
            return range(0)
        (total,) = self._ask([frame], name)
        if total < amount:
            raise NumbersEnded(amount, total)
        return range(total - amount + 1, total + 1)

    def total(self) -> int:
        """The total now; counts nothing. Errors as with add()."""
        return self.add(0)

    def settle(self, timeout: float | None = None) -> list[Settled]:
        """Waits, with None for ever, until nothing is pending of calls that were given up and of
        the state that this client was made of; gives back what they were counted as, each once.

        StillPending if that takes longer than `timeout` seconds: nothing is lost, call it again.
        SessionExpired or SessionEnded, once, for what was pending when the session went; what was
        settled before is given back by the next call. Without a session there is nothing to settle.
        """
        seconds = None if timeout is None else _seconds(timeout)
        return self._line.settle(seconds) if isinstance(self._line, SessionLine) else []

    def close(self) -> None:
        """Closes the connection after the calls under way; a later call makes a new one.

        A session with nothing pending ends, and its server is told so if it answers within a
        second; otherwise the server keeps it for a later call, until it expires.
        """
        self._line.close()

    def __enter__(self) -> CounterClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, frames: list[bytes], name: str = "") -> list[int]:
        call = self._line.call(frames, self.timeout, name)
        self._line.carry(call)
        return call.totals

    def _after_fork(self) -> None:
        """Closes the child's own descriptor; the parent's connection does not notice."""
        sock, is_session = self._line.sock, isinstance(self._line, SessionLine)
        self._line = Line(self.host, self.port, self.tls)
        if is_session:
            on_state = self._on_state and _saved_by_the_parent
            self._line = SessionLine(self.host, self.port, self.tls, None, on_state)
        if sock is not None:
            sock.close()


_clients: weakref.WeakSet[CounterClient] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for client in list(_clients):
        client._after_fork()


# In the child before any of its threads runs: two threads cannot both find a connection to renew.
os.register_at_fork(after_in_child=_after_fork_in_child)


def _saved_by_the_parent(_: SessionState) -> None:
    raise RuntimeError("states are kept by the process that made the client; make one here")


def _frame(amount: int) -> bytes:
    """The frame of an amount; AmountError or WrongType if there is none."""
    try:
        if isinstance(amount, bool):
            raise TypeError
        return encode_frame(amount)
    except TypeError:
        raise WrongType(f"amount {shown(amount)}: give an int of 0..2^64 - 1") from None
    except AmountError:
        raise
    except ValueError:  # Python does not write numbers of thousands of digits
        raise AmountError(f"amount {shown(amount)} is outside 0..2^64 - 1") from None


def _seconds(timeout: float) -> float:
    wanted = f"give seconds above 0 and up to {MAX_TIMEOUT_S}, or None to wait for ever"
    if isinstance(timeout, bool) or not hasattr(timeout, "__float__"):
        raise WrongType(f"timeout {shown(timeout)}: {wanted}")
    try:
        seconds = float(timeout)
    except (ArithmeticError, ValueError):
        seconds = 0.0
    if not 0 < seconds <= MAX_TIMEOUT_S:  # nor is NaN
        raise ArgumentError(f"timeout {shown(timeout)}: {wanted}")
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives back its exit code."""
    from counter.load.command import Library, run

    files = (StateError, StateNotSaved)
    errors = (ConnectError, files, CounterError)
    return run(arguments, Library(_add, _add_of_file, *errors, explain, IS_IT_ONE))


def _add(address: str, timeout_s: float, tls: ssl.SSLContext | None, amount: int) -> int:
    # The command takes a timeout of a year, which no socket does.
    with CounterClient(address, min(timeout_s, MAX_TIMEOUT_S), tls) as counter:
        return counter.add(amount)


_OF_FILE: Final = "client.py --add at "  # how a session file names its addition, before the address


def _add_of_file(
    address: str, timeout_s: float, tls: ssl.SSLContext | None, amount: int, path: str
) -> int:
    """The total right after the one addition that a file is, which is counted unless it was.

    The file is empty until a server has opened the session, tells of the addition as pending before
    its frame is sent, and as settled before the session is ended. StateError and StateNotSaved if
    the file is why nothing was sent; ConnectError; any other CounterError leaves the addition to
    the next command with this file.
    """
    try:
        file = SessionFile(path)
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}; name a file that can be written") from error
    with file:
        if file.state is not None:
            _check_it_is(file.state, address, amount, path)
            if file.state.settled:
                return file.state.settled[0].total
        try:
            return _count_once(file, address, min(timeout_s, MAX_TIMEOUT_S), tls, amount)
        except StillPending as error:
            why = str(error).partition(";")[0]
            remedy = f"the same command finds out whether {amount} was counted"
            raise CounterError(f"{why}; {remedy}, and counts it once") from error
        except OutcomeUnknown as error:
            remedy = f"{path} never adds it again; a new addition is a new file"
            raise CounterError(f"{error}; {remedy}") from error
        except SessionsUnsupported as error:
            words = str(error).replace("session=True", "--sessionFile")
            raise SessionsUnsupported(words) from error


def _check_it_is(state: SessionState, address: str, amount: int, path: str) -> None:
    """StateError unless a state tells of this addition and of nothing else."""
    told: list[Pending | Settled] = [*state.pending, *state.settled]
    if len(told) != 1 or not told[0].name.startswith(_OF_FILE):
        raise StateError(f"{path}: the session of another program; name another file")
    kept, where = told[0].amount, told[0].name.removeprefix(_OF_FILE)
    if (where, kept) != (address, amount):
        is_of = f"is the addition of {kept} at {where}"
        wanted = f"not of {amount} at {address}"
        raise StateError(f"{path}: {is_of}, {wanted}; a new addition is a new file")


def _count_once(
    file: SessionFile, address: str, timeout_s: float, tls: ssl.SSLContext | None, amount: int
) -> int:
    """Begins the addition of a new file, or goes on with it; gives back its total."""

    def keep(state: SessionState) -> None:
        # A state that tells of no addition takes no place: of none begun, or of one that is lost.
        if state.pending or state.settled:
            file.save(state)

    before = file.state
    with CounterClient(address, timeout_s, tls, before or True, keep) as counter:
        if before is None:
            total = counter.add(amount, name=_OF_FILE + address)
        else:
            total = counter.settle(timeout_s)[0].total
        assert counter.session is not None
        try:
            file.save(counter.session.state)
        except OSError as error:
            why = f"the total was not kept: {error.strerror}"
            remedy = "the same command tells it again"
            raise CounterError(f"{why}; it was: {total}; {remedy}") from error
        return total


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ModuleNotFoundError as error:
        hint = "is not installed; pip install -r requirements.txt"
        sys.stderr.write(f"client.py: {error.name} {hint}\n")
        sys.exit(2)
