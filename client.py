"""python client.py: the load generator's command; from client import CounterClient: the library.

Importing this module patches nothing and needs only the standard library, xxhash, protocol.py and
session.py; the command is counter/load/command.py's and is imported when it runs.

The law of the library: no addition is ever counted twice. Without a session none is sent twice:
once a frame may have reached the server, a failure is OutcomeUnknown, and the caller decides;
before that it is ConnectError, and trying again is safe. In a session a frame has a number, and is
sent again only when the server has said that it was not counted.
"""

from __future__ import annotations

import errno
import os
import random
import reprlib
import socket
import struct
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import islice, takewhile
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

if __name__ == "__main__" and sys.flags.safe_path:
    # python -P leaves out the folder of the program, whose own modules are no strangers'.
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))

try:
    from protocol import (
        MAX_AMOUNT,
        MAX_UNREAD_FRAMES,
        REPLY_SIZE,
        AddressError,
        AmountError,
        BadFrame,
        CounterError,
        Refused,
        decode_totals,
        encode_frame,
        format_address,
        parse_address,
    )
    from session import (
        AnswersLost,
        HelloRefused,
        PendingAboveLimit,
        Phase,
        Session,
        SessionFile,
        SessionState,
        Settled,
        StateError,
    )
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

# Frames that a connection keeps unanswered. A quarter of what the server allows: enough to hide the
# round trip, and a failure leaves so many outcomes unknown at most.
WINDOW_FRAMES: Final = MAX_UNREAD_FRAMES // 4

# Frames that a session may leave unanswered. Its server keeps up to 16 bytes for each, so that a
# window is small: of 256 add_many() is as fast as of 1,024, of 64 it takes a third longer.
SESSION_WINDOW_FRAMES: Final = 256

# The longest pause before the first attempt to go on after a break; each next one is twice as long,
# up to the last. A random part of it is waited: those that a restart cut off come back spread out.
FIRST_PAUSE_S: Final = 0.02
LAST_PAUSE_S: Final = 1.0

# So many opens in a row that end in good order and without an answer are no server that drains.
UNANSWERED_OPENS: Final = 5

_AMOUNTS: Final = struct.Struct(">Q8x")  # of frames
_LARGEST_READ: Final = REPLY_SIZE * MAX_UNREAD_FRAMES

END_PATIENCE_S: Final = 1.0  # for a server to say that a session is over

TCP_ESTABLISHED: Final = b"\1"  # the first byte of struct tcp_info

MAX_TIMEOUT_S: Final = 1_000_000  # 11 days; the system's own limit is 24

# A server that vanished without a word is found to be gone after 45 s, whatever the timeout: with
# bytes on their way by the first, in silence by the questions of the others.
GONE_AFTER: Final = {
    socket.TCP_USER_TIMEOUT: 45_000,  # ms
    socket.TCP_KEEPIDLE: 30,  # s
    socket.TCP_KEEPINTVL: 5,  # s
    socket.TCP_KEEPCNT: 3,
}

IS_IT_ONE: Final = "is it a counter server, and does it speak TLS (--tlsCA)?"


class ConnectError(CounterError):
    """Nothing was sent, so nothing was counted: it is safe to try again."""


class ArgumentError(CounterError, ValueError):
    """A timeout that is none: the caller's mistake, nothing was sent."""


class WrongType(CounterError, TypeError):
    """An amount, address, timeout or context of another type: nothing was sent."""


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


class OutcomeUnknown(CounterError):
    """The connection ended before every reply came.

    `totals` are the replies that did come, in order. `amounts` were sent and not answered: each may
    or may not have been counted, though none behind one that was not. A server that refuses an
    amount as too large closes the connection in the same way. `unsent` were certainly not counted.
    """

    def __init__(
        self,
        why: str,
        totals: Sequence[int],
        amounts: Sequence[int],
        unsent: Sequence[int],
        hint: str = "",
    ) -> None:
        some = f"{len(amounts)} additions" if len(amounts) != 1 else f"the addition of {amounts[0]}"
        doubt = f"{some} may or may not have been counted"
        if not any(amounts):
            doubt = "the total was not read"
        self._why, self._hint = why, hint
        super().__init__("; ".join(filter(None, (why, doubt, hint))))
        self.totals = tuple(totals)
        self.amounts = tuple(amounts)
        self.unsent = tuple(unsent)

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self._why, self.totals, self.amounts, self.unsent, self._hint)
        return type(self), arguments, self.__dict__


class SessionsUnsupported(ConnectError):
    """The server ends connections that begin with a session. Nothing was sent."""


class NoRoom(ConnectError):
    """The server keeps as many sessions as it may. Nothing was sent."""


class SessionHeld(ConnectError):
    """Another connection has the session and does not give it up. Nothing of this call was sent."""


class StateNotSaved(CounterError):
    """`on_state` raised, which is the cause of this: nothing of this call was sent."""


class _Told(CounterError):
    """An error that says what became of each amount of a call."""

    def __init__(
        self, why: str, totals: Sequence[int], amounts: Sequence[int], unsent: Sequence[int]
    ) -> None:
        self._why = why
        super().__init__("; ".join(filter(None, (why, *self._fates(amounts, unsent)))))
        self.totals = tuple(totals)
        self.amounts = tuple(amounts)
        self.unsent = tuple(unsent)

    def _fates(self, amounts: Sequence[int], unsent: Sequence[int]) -> Iterable[str]:
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._why, self.totals, self.amounts, self.unsent), self.__dict__


class StillPending(_Told):
    """A call in a session was given up, and part of it goes on without it.

    `totals` are the replies that came, in order. `amounts` are in the session: they are counted
    once, now or when the next call goes on with it, and settle() waits for that; adding them again
    would count them twice. `unsent` were not counted and will not be.
    """

    def _fates(self, amounts: Sequence[int], unsent: Sequence[int]) -> Iterable[str]:
        if amounts:
            yield f"{_so_many(amounts)} will still be counted, once: settle() waits for it"
        if unsent:
            yield f"{_so_many(unsent)} will not be counted"


class SessionEnded(_Told):
    """A session is over before every reply came, and what became of each amount is known.

    `totals` are the replies that came, in order. `unsent` were not counted and will not be;
    `amounts` is empty. The next call opens a session of its own.
    """

    def _fates(self, amounts: Sequence[int], unsent: Sequence[int]) -> Iterable[str]:
        if unsent:
            yield f"{_so_many(unsent)} will not be counted"


class AcknowledgedLost(SessionEnded):
    """The server's total lacks additions that it had answered: it went back to an older state, as a
    store does by a failover that loses its last writes.

    `lost` of this client's additions, those answered last, are not in the total any more: totals
    that were given back for them are given to others. Otherwise as SessionEnded.
    """

    lost = 0


class SessionExpired(OutcomeUnknown):
    """The server does not know the session any more: it was not used for too long, or was kept in
    the memory of a server that is no more. The next call opens a new one."""


def _so_many(amounts: Sequence[int]) -> str:
    return f"{len(amounts)} additions" if len(amounts) != 1 else f"the addition of {amounts[0]}"


class ClientSession:
    """The session of a CounterClient, as its application sees it."""

    def __init__(self, line: _SessionLine) -> None:
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
    before frames are sent that it tells of, by one caller at a time; to survive its own crash an
    application makes it last there, with what it tells of additions that were settled. A forked
    child has no part in the session: it opens its own, or has StateNotSaved where there is an
    `on_state`.
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
            raise WrongType(f"address {_shown(address)}: write text, as in '127.0.0.1:8080'")
        self.host, self.port = parse_address(address)
        if not self.port:
            raise AddressError(f"address {address!r}: port 0 cannot be connected to")
        if tls is not None and not hasattr(tls, "wrap_socket"):
            raise WrongType(f"tls {_shown(tls)}: give an ssl.SSLContext, or None")
        self.timeout = None if timeout is None else _seconds(timeout)
        self.tls = tls
        if not isinstance(session, bool | SessionState):
            raise WrongType(f"session {_shown(session)}: give True, False or a SessionState")
        if on_state is not None and not callable(on_state):
            raise WrongType(f"on_state {_shown(on_state)}: give a function, or None")
        if on_state is not None and session is False:
            raise ArgumentError("on_state without a session, which alone has states")
        self._on_state = on_state
        self._line = _Line(self.host, self.port, tls)
        if session is not False:
            state = None if session is True else session
            self._line = _SessionLine(self.host, self.port, tls, state, on_state)
        _clients.add(self)

    @property
    def session(self) -> ClientSession | None:
        """The session, None without."""
        return ClientSession(self._line) if isinstance(self._line, _SessionLine) else None

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
            raise WrongType(f"amounts {_shown(amounts)}: give a list of them") from None
        frames = [_frame(amount) for amount in each]
        return self._ask(frames, name) if frames else []

    def take(self, count: int, *, name: str = "") -> range:
        """So many numbers that nobody else has: one addition, and the numbers that it crossed.

        They are unique among all that take. Those of a take with OutcomeUnknown go to nobody.
        Errors as with add(), and NumbersEnded at 2^64 - 1. Taking 0 asks nobody.
        """
        frame = _frame(count)
        amount = _amount(frame)
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
        return self._line.settle(seconds) if isinstance(self._line, _SessionLine) else []

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
        sock, is_session = self._line.sock, isinstance(self._line, _SessionLine)
        self._line = _Line(self.host, self.port, self.tls)
        if is_session:
            on_state = self._on_state and _saved_by_the_parent
            self._line = _SessionLine(self.host, self.port, self.tls, None, on_state)
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
        raise WrongType(f"amount {_shown(amount)}: give an int of 0..2^64 - 1") from None
    except AmountError:
        raise
    except ValueError:  # Python does not write numbers of thousands of digits
        raise AmountError(f"amount {_shown(amount)} is outside 0..2^64 - 1") from None


def _amount(frame: bytes) -> int:
    return int.from_bytes(frame[:8])


def _seconds(timeout: float) -> float:
    wanted = f"give seconds above 0 and up to {MAX_TIMEOUT_S}, or None to wait for ever"
    if isinstance(timeout, bool) or not hasattr(timeout, "__float__"):
        raise WrongType(f"timeout {_shown(timeout)}: {wanted}")
    try:
        seconds = float(timeout)
    except (ArithmeticError, ValueError):
        seconds = 0.0
    if not 0 < seconds <= MAX_TIMEOUT_S:  # nor is NaN
        raise ArgumentError(f"timeout {_shown(timeout)}: {wanted}")
    return seconds


def _shown(value: object) -> str:
    """A value in an error, of whatever length and kind it is."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return f"of {type(value).__name__}"


class _Call:
    """The frames of one call and what became of them; `sent` of them were handed to the socket."""

    __slots__ = ("deadline", "failure", "frames", "gate", "over", "sent", "timeout", "totals")

    def __init__(self, frames: list[bytes], timeout: float | None) -> None:
        self.frames = frames
        self.timeout = timeout
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self.sent = 0
        self.totals: list[int] = []
        self.over = False
        self.failure: CounterError | None = None
        self.gate: threading.Lock | None = None  # shut until the call is over or leads

    def time_left(self) -> float | None:
        """Seconds, None without end; TimeoutError when there are none."""
        if self.deadline is None:
            return None
        left = self.deadline - time.monotonic()
        if left > 0:
            return left
        if self.over:
            return 0.001  # what it still sends is the others'
        raise TimeoutError

    def fail(self, failure: CounterError) -> None:
        """No more replies will come."""
        self.over, self.failure = True, failure
        self.wake()

    def wake(self) -> None:
        """Has a call that waits find that it is over or leads."""
        if self.gate is not None and self.gate.locked():
            self.gate.release()


class _Line:
    """A connection and the calls that share it, oldest first.

    One call leads, the oldest: it alone uses the socket, sends for all and reads for all. When it
    has its own replies the next oldest leads. So frames leave in the order of the calls, those of
    one call together, TLS has one user at a time, and no thread is needed.

    A call that gives up on its replies abandons the connection, for they would be taken for those
    of the next: the leader resets it. Each call then learns what became of its own frames; those
    that have sent none go on with the next connection.

    The mutex is never held across a wait, so that it may be made before gevent patches the
    application. What is waited for is made by whoever waits.
    """

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        self._host, self._port, self._tls = host, port, tls
        self._mutex = threading.Lock()
        self._calls: deque[_Call] = deque()
        self._leader: _Call | None = None
        self.sock: socket.socket | None = None
        self._is_new = True  # no reply has come on it
        self._sent_calls = 0  # so many of the oldest have sent all of their frames
        self._in_flight = 0  # frames without a reply
        self._patience_s: float | None = None  # that the socket was given
        self._rest = b""  # of a reply that has not come to its end
        self._abandoned = ""  # why
        self._closing = False

    # What a call can run into, and fails by; anything else interrupts its caller.
    _ENDS: tuple[type[Exception], ...] = (OSError, EOFError)

    def call(self, frames: list[bytes], timeout: float | None, name: str) -> _Call:
        """A call to be carried; ArgumentError if it has a name, which only a session keeps."""
        if name:
            raise ArgumentError(f"name {_shown(name)} without a session, which alone keeps names")
        return _Call(frames, timeout)

    def carry(self, call: _Call) -> None:
        """Has a call's frames answered, or raises what became of them."""
        try:
            self._join(call)
            if self._leader is call:
                self._lead(call)
        except BaseException as error:
            with self._mutex:
                if not call.over and call in self._calls:
                    self._give_up(call, error)
            if not isinstance(error, self._ENDS):
                raise
        finally:
            if self._leader is call:
                self._pass_on()
        if call.failure is not None:
            raise call.failure

    def close(self) -> None:
        """Closes the connection, or has the last call under way do it."""
        with self._mutex:
            if self._leader is None:
                self._drop()
            else:
                self._closing = True

    def _join(self, call: _Call) -> None:
        """Waits until a call is over or leads; TimeoutError."""
        with self._mutex:
            self._calls.append(call)
            if self._leader is None:
                self._leader = call
                return
            gate = call.gate = threading.Lock()
            gate.acquire()
        left = call.time_left()
        if not gate.acquire(timeout=-1 if left is None else left):
            raise TimeoutError

    def _give_up(self, call: _Call, error: BaseException) -> None:
        """Takes out a call that waits for others; what it has sent it abandons."""
        call.fail(self._failure(call, error, self._why(call, error)))
        if not call.sent or self.sock is None:
            self._calls.remove(call)
            return
        self._abandoned = self._why(None, error)
        # Wakes the leader. A TLS socket's own shutdown() would have it read on without TLS.
        with suppress(OSError), socket.socket(fileno=os.dup(self.sock.fileno())) as same:
            same.shutdown(socket.SHUT_RD)

    def _lead(self, call: _Call) -> None:
        """Sends and reads for all until a call is over."""
        try:
            if self.sock is not None and not self._in_flight and _has_ended(self.sock):
                self._drop()
            if self.sock is None:
                self.sock = self._connect(call)
            self._send(self.sock, call)
            while not call.over:
                self._receive(self.sock, call)
                if len(self._calls) > self._sent_calls:
                    self._send(self.sock, call)  # when it is over, for the next leader
        except BaseException as error:
            with self._mutex:
                self._break(call, error)
            raise

    def _pass_on(self) -> None:
        """Has the next oldest call lead."""
        with self._mutex:
            if self._abandoned:
                self._break(None, EOFError())
            self._leader = self._calls[0] if self._calls else None
            if self._leader is not None:
                self._leader.wake()
            elif self._closing:
                self._drop()

    def _send(self, sock: socket.socket, leader: _Call) -> None:
        """Sends what waits, as much of it as the window has room for."""
        left = leader.time_left()
        frames: list[bytes] = []
        with self._mutex:
            if self._abandoned:
                raise EOFError
            room = WINDOW_FRAMES - self._in_flight
            for call in islice(self._calls, self._sent_calls, None):
                if not room:
                    break
                some = call.frames[call.sent : call.sent + room]
                frames += some
                # From here on the outcome of these is unknown, whatever sendall says.
                call.sent += len(some)
                room -= len(some)
                self._sent_calls += call.sent == len(call.frames)
            self._in_flight = WINDOW_FRAMES - room
        if frames:
            self._bound(sock, left)
            sock.sendall(b"".join(frames))

    def _receive(self, sock: socket.socket, leader: _Call) -> None:
        """Reads some replies and gives them to their calls; EOFError at the end of the stream."""
        self._bound(sock, leader.time_left())
        data = sock.recv(self._in_flight * REPLY_SIZE - len(self._rest))
        if not data:
            raise EOFError
        self._is_new = False
        totals, self._rest = decode_totals(self._rest + data)
        start = 0
        with self._mutex:
            self._in_flight -= len(totals)
            while start < len(totals):
                call = self._calls[0]
                end = start + call.sent - len(call.totals)
                call.totals += totals[start:end]
                start = end
                if len(call.totals) == len(call.frames):
                    self._calls.popleft()
                    self._sent_calls -= 1
                    call.over = True
                    call.wake()

    def _break(self, leader: _Call | None, error: BaseException) -> None:
        """Ends the connection. The leader is over, and all that have sent anything.

        Where no connection can be made, so are all.
        """
        nowhere = self.sock is None and isinstance(error, OSError) and not _is_late(error)
        for call in self._calls:
            if (call is leader or call.sent or nowhere) and not call.over:
                why = self._abandoned or self._why(call if call is leader else None, error)
                call.fail(self._failure(call, error, why))
        self._calls = deque(call for call in self._calls if not call.over)
        self._drop()

    def _drop(self) -> None:
        """Closes the connection; with replies outstanding the server counts no more of it."""
        sock, self.sock = self.sock, None
        if sock is not None and self._in_flight:
            _reset(sock)
        elif sock is not None:
            sock.close()
        self._is_new, self._sent_calls, self._in_flight, self._rest = True, 0, 0, b""
        self._abandoned, self._closing, self._patience_s = "", False, None

    def _why(self, own: _Call | None, error: BaseException) -> str:
        """Why a connection broke, said to the call itself that met it or to others."""
        if isinstance(error, EOFError):
            return "the server closed the connection"
        if _is_late(error):
            if own is None:
                return "another call on the connection waited for its reply in vain"
            return f"no reply within {own.timeout or 0:g} s (the server may have too much to do)"
        if isinstance(error, OSError):
            return f"the connection was lost ({(error.strerror or str(error)).lower()})"
        return "another call on the connection was interrupted"

    def _failure(self, call: _Call, error: BaseException, why: str) -> CounterError:
        """What became of a call."""
        failure: CounterError
        refused = self._is_new and isinstance(error, OSError) and _is_refusal(error)
        if isinstance(error, OSError) and (self.sock is None or refused):
            failure = ConnectError(explain(error, self._host, self._port))
        elif not call.sent:
            where = format_address(self._host, self._port)
            within = f"nothing was sent within {call.timeout or 0:g} s"
            failure = ConnectError(f"{where}: {within}, other calls of this client came first")
        else:
            answered = len(call.totals)
            amounts = list(map(_amount, call.frames))
            unknown, unsent = amounts[answered : call.sent], amounts[call.sent :]
            closed = isinstance(error, OSError | EOFError) and not _is_late(error)
            hint = self._why_closed(unknown) if closed and not self._abandoned else ""
            failure = OutcomeUnknown(why, call.totals, unknown, unsent, hint)
        if isinstance(error, OSError):
            failure.__cause__ = error
        return failure

    def _why_closed(self, unknown: list[int]) -> str:
        """What may have made a server close the connection before these were answered."""
        hints = []
        if any(unknown):
            hints.append("a server with --maxIncrement refuses larger amounts in this way")
        if self._is_new and self._tls is None:
            hints.append(IS_IT_ONE)
        return "; ".join(hints)

    def _bound(self, sock: socket.socket, patience_s: float | None) -> None:
        """Bounds what the socket does next: a system call, left out for less than a millisecond."""
        now = self._patience_s
        if now is None or patience_s is None or not 0 <= now - patience_s < 0.001:
            sock.settimeout(patience_s)
            self._patience_s = patience_s

    def _connect(self, call: _Call) -> socket.socket:
        """A new connection, encrypted if it is to be; OSError."""
        sock = self._reach(call)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in GONE_AFTER.items():
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
            if self._tls is None:
                return sock
            self._bound(sock, call.time_left())
            return self._tls.wrap_socket(sock, server_hostname=self._host)
        except BaseException:
            sock.close()
            raise

    def _reach(self, call: _Call) -> socket.socket:
        """Connected to the first address that lets it; the name is looked up each time."""
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except ValueError as error:
            raise socket.gaierror(socket.EAI_NONAME, "no name of a host") from error
        while True:
            family, kind, proto, _, address = found.pop(0)
            left, sock = call.time_left(), None
            try:
                sock = socket.socket(family, kind, proto)
                # One that is silent leaves time for those behind it.
                sock.settimeout(left and left / (len(found) + 1))
                sock.connect(address)
                # Where nobody listens, the kernel may have given the port to this very socket.
                if sock.getsockname() != sock.getpeername():
                    return sock
                raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
            except BaseException as error:
                if sock is not None:
                    _reset(sock)
                if not (found and isinstance(error, OSError)):
                    raise


class _SessionCall(_Call):
    """A call in a session; `sent` of its frames have a number.

    One that was given up is over, and stays until all that have a number have a total.
    """

    __slots__ = ("amounts", "is_lost", "name")

    def __init__(self, frames: list[bytes], timeout: float | None, name: str = "") -> None:
        super().__init__(frames, timeout)
        self.name = name
        self.amounts = [amount for (amount,) in _AMOUNTS.iter_unpack(b"".join(frames))]
        self.is_lost = False  # with its session

    @property
    def is_done(self) -> bool:
        return len(self.totals) == len(self.frames)

    @property
    def pending(self) -> list[int]:
        """The amounts that have a number and no total."""
        return self.amounts[len(self.totals) : self.sent]

    @property
    def unsent(self) -> list[int]:
        """The amounts without a number."""
        return self.amounts[self.sent :]

    def cut(self) -> None:
        """Leaves nothing of it but what is pending: of the rest its caller has learned."""
        self.amounts, answered = self.pending, len(self.totals)
        self.frames = self.frames[answered : self.sent]
        self.sent -= answered
        self.totals = []


class _Torn(Exception):
    """Ctrl-C, which comes between any two instructions, left the numbers of a session and the calls
    that they belong to apart: which total is whose is not known any more."""


# What ends a connection of a session, and not the session, or not before its calls learn it.
_BREAKS: Final = (OSError, EOFError, BadFrame, HelloRefused, AnswersLost, PendingAboveLimit)


class _SessionLine(_Line):
    """A session and the calls that share it, with at most one connection at a time.

    The oldest call that somebody waits for leads. Whatever goes wrong on a connection ends that
    connection: the leader makes the next one, is told what was applied, and sends the rest again.
    So a call that is given up leaves its frames to whoever leads next.
    """

    _ENDS = (OSError, EOFError, CounterError)
    _calls: deque[_SessionCall]  # type: ignore[assignment]

    def __init__(
        self,
        host: str,
        port: int,
        tls: ssl.SSLContext | None,
        state: SessionState | None,
        on_state: Callable[[SessionState], object] | None,
    ) -> None:
        super().__init__(host, port, tls)
        self._session = Session(SESSION_WINDOW_FRAMES, state)
        self._on_state = on_state
        if on_state is not None:
            self._session.keep_settled()
        self._trouble: Exception | None = None  # that keeps the session from going on
        self._is_torn = False  # an interrupt left numbers and calls apart
        for name, amount in state.pending if state else ():
            call = _SessionCall([encode_frame(amount)], None, name)
            call.sent, call.over = 1, True
            self._calls.append(call)
        self._left = list(self._calls)  # were given up, and settle() has not told of them
        self._sent_calls = len(self._calls)

    @property
    def state(self) -> SessionState:
        """The session's."""
        with self._mutex:
            return self._session.state

    def call(self, frames: list[bytes], timeout: float | None, name: str) -> _Call:
        if not isinstance(name, str):
            raise WrongType(f"name {_shown(name)}: give text")
        return _SessionCall(frames, timeout, name)

    def settle(self, timeout: float | None) -> list[Settled]:
        """What calls that were given up, all of them before this one, were counted as."""
        self.carry(_SessionCall([], timeout))
        with self._mutex:
            lost = [call for call in self._left if call.is_lost]
            over = lost or [call for call in self._left if call.is_done]
            self._left = [call for call in self._left if call not in over]
        if lost:
            raise _together([call.failure for call in lost])
        return [
            Settled(call.name, amount, total)
            for call in over
            for amount, total in zip(call.amounts, call.totals, strict=True)
        ]

    def close(self) -> None:
        """Closes the connection, or has the last call under way do it."""
        with self._mutex:
            self._closing = True
            if self._leader is not None:
                return
            self._leader = _SessionCall([], None)
        self._finish()

    def _pass_on(self) -> None:
        """Has the next oldest call that somebody waits for lead."""
        with self._mutex:
            self._leader = next((call for call in self._calls if not call.over), None)
            if self._leader is not None:
                self._leader.wake()
                return
            if not self._closing:
                return
            self._leader = _SessionCall([], None)
        self._finish()

    def _finish(self) -> None:
        """Closes the connection, and ends the session where nothing is pending; leads meanwhile."""
        try:
            if self.sock is not None and not self._calls:
                self._end(self.sock)
        except (OSError, StateNotSaved):
            pass  # it expires
        finally:
            with self._mutex:
                self._drop()
                self._closing = False
            self._pass_on()

    def _end(self, sock: socket.socket) -> None:
        """Tells the server that the session is over. OSError, StateNotSaved."""
        self._save()  # a state that still has something pending would find it expired
        with self._mutex:
            end = self._session.end()
            self._renew()
        sock.settimeout(END_PATIENCE_S)
        sock.sendall(end)
        sock.recv(REPLY_SIZE)

    def _renew(self) -> None:
        """A new session in the place of one that is over."""
        self._session = self._session.successor(SESSION_WINDOW_FRAMES)

    def _drop(self) -> None:
        """Closes the connection. The session goes on with the next."""
        sock, self.sock = self.sock, None
        if sock is not None and self._session.pending:
            _reset(sock)
        elif sock is not None:
            sock.close()
        self._session.broke()
        self._patience_s = None

    def _lead(self, call: _Call) -> None:
        """Connects, sends and reads for all until a call is over."""
        pauses = unanswered_opens = 0
        if self._is_torn:
            self._lose(_Torn())
        with self._mutex:
            self._complete()
        while not call.over:
            answered = self._session.answered
            try:
                self._exchange(call)
            except _BREAKS as error:
                self._hang_up()
                is_new = self._session.phase is Phase.NEW
                unanswered_opens += 1
                if not (is_new and isinstance(error, EOFError)):
                    unanswered_opens = 0
                self._judge(error, unanswered_opens)
                pauses = 0 if self._session.answered != answered else pauses + 1
                if not call.over:
                    self._pause(call, pauses)
            except BaseException:
                self._hang_up()
                raise

    def _hang_up(self) -> None:
        with self._mutex:
            self._drop()

    def _pause(self, call: _Call, pauses: int) -> None:
        """Waits before the next attempt, at random; TimeoutError when there is no time for one."""
        longest_s = min(FIRST_PAUSE_S * 2 ** min(pauses, 20), LAST_PAUSE_S)
        left = call.time_left()
        pause_s = random.uniform(longest_s / 4, longest_s)
        time.sleep(pause_s if left is None else min(pause_s, left))
        call.time_left()

    def _judge(self, error: Exception, unanswered_opens: int) -> None:
        """What a break means: goes on if trying again may help, raises what it means otherwise."""
        if isinstance(error, OSError) and _is_late(error):
            raise error
        self._trouble = error
        if self._session.phase is Phase.LOST:
            self._lose(error)
        elif self._session.phase is Phase.NEW:
            where = format_address(self._host, self._port)
            if isinstance(error, HelloRefused) and error.refused is Refused.NO_ROOM:
                full = "the server keeps as many sessions as it may"
                remedy = "raise its --sessions, or close clients that are not needed"
                raise NoRoom(f"{where}: {full}; {remedy}") from error
            if unanswered_opens >= UNANSWERED_OPENS:
                ends = "the server ends every connection that begins with a session"
                remedy = f"update it, or leave session=True out; {IS_IT_ONE}"
                raise SessionsUnsupported(f"{where}: {ends}; {remedy}") from error
            if isinstance(error, OSError) and _is_hopeless(error):
                raise error

    def _lose(self, error: Exception) -> None:
        """The session is over; what has no number goes on with the next one.

        Where answers were lost everybody learns it, and nobody goes on.
        """
        with self._mutex:
            kept: deque[_SessionCall] = deque()
            for call in self._calls:
                learns = isinstance(error, AnswersLost) and call.frames and not call.over
                if call.pending or learns:
                    call.is_lost = True
                    call.fail(self._loss(call, error))
                else:
                    kept.append(call)
            self._calls, self._sent_calls = kept, 0
            self._is_torn = False
            self._renew()
            self._complete()

    def _loss(self, call: _SessionCall, error: Exception) -> CounterError:
        """What became of a call whose session is over."""
        uncounted = call.pending + call.unsent
        if isinstance(error, AnswersLost):
            why = f"the server lost {error.count} additions of this client that it had answered"
            lost = AcknowledgedLost(why, call.totals, (), uncounted)
            lost.lost = error.count
            return lost
        if isinstance(error, PendingAboveLimit):
            above = f"amount {error.amount} is above the server's limit of {error.limit} now"
            return SessionEnded(f"{above} (--maxIncrement)", call.totals, (), uncounted)
        if isinstance(error, _Torn):
            why = (
                "a call was interrupted in the very moment when numbers were given or totals taken"
            )
            return OutcomeUnknown(why, call.totals, call.pending, call.unsent)
        why = "the server does not know the session any more"
        hint = "it expired, was evicted, or was in the memory of a server that is no more"
        return SessionExpired(why, call.totals, call.pending, call.unsent, hint)

    def _exchange(self, call: _Call) -> None:
        """Goes on with the session until a call is over, or the connection is."""
        if self.sock is not None and not self._session.pending and _has_ended(self.sock):
            self._hang_up()
        if self.sock is None:
            self.sock = self._connect(call)
            self._greet(self.sock, call)
        self._send(self.sock, call)
        while not call.over:
            self._receive(self.sock, call)
            if len(self._calls) > self._sent_calls:
                self._send(self.sock, call)  # when it is over, for the next leader

    def _greet(self, sock: socket.socket, leader: _Call) -> None:
        """Learns from the server what was applied, and sends again what was not."""
        self._bound(sock, leader.time_left())
        sock.sendall(self._session.hello())
        while self._session.phase is not Phase.OPEN:
            self._receive(sock, leader)
        again = self._session.frames()
        if again:
            sock.sendall(again)
        self._trouble = None

    def _send(self, sock: socket.socket, leader: _Call) -> None:
        """Gives numbers to what waits, as far as the window has room, and sends it."""
        left = leader.time_left()
        frames: list[bytes] = []
        numbered: list[tuple[_SessionCall, int]] = []
        with self._mutex:
            self._refuse_above_limit()
            self._is_torn = True
            for call in islice(self._calls, self._sent_calls, None):
                room = self._session.room
                if not room:
                    break
                end = min(call.sent + room, len(call.frames))
                frames += call.frames[call.sent : end]
                self._session.number(call.name, call.amounts[call.sent : end])
                numbered.append((call, end - call.sent))
                call.sent = end
                self._sent_calls += end == len(call.frames)
            self._is_torn = False
        if frames:
            try:
                self._save()
            except BaseException:
                with self._mutex:
                    self._take_back(numbered)
                raise
            self._bound(sock, left)
            sock.sendall(b"".join(frames))

    def _save(self) -> None:
        """Has the application keep the state; StateNotSaved."""
        if self._on_state is None:
            return
        with self._mutex:
            state = self._session.state
        try:
            self._on_state(state)
        except Exception as error:
            raise StateNotSaved(f"the state of the session was not saved: {error}") from error
        with self._mutex:
            self._session.forget_settled(len(state.settled))

    def _take_back(self, numbered: list[tuple[_SessionCall, int]]) -> None:
        """Takes the last numbers away again, of frames that were not handed to send."""
        self._is_torn = True
        for call, count in numbered:
            call.sent -= count
            self._session.take_back(count)
        whole = takewhile(lambda call: call.sent == len(call.frames), self._calls)
        self._sent_calls = sum(1 for _ in whole)
        self._is_torn = False

    def _refuse_above_limit(self) -> None:
        """Ends the calls that have an amount without a number that the server would refuse."""
        limit = self._session.limit
        if limit == MAX_AMOUNT:
            return
        for call in list(islice(self._calls, self._sent_calls, None)):
            largest = max(call.unsent, default=0)
            if largest > limit:
                above = f"amount {largest} is above the server's limit of {limit} (--maxIncrement)"
                self._give_up(call, AmountError(f"{above}; nothing of this call was counted"))
        self._complete()

    def _receive(self, sock: socket.socket, leader: _Call) -> None:
        """Reads what the server says, and gives the totals to their calls; EOFError at the end."""
        self._bound(sock, leader.time_left())
        data = sock.recv(_LARGEST_READ)
        if not data:
            raise EOFError
        with self._mutex:
            self._is_torn = True
            totals = self._tell(data)
            start = 0
            while start < len(totals):
                call = self._calls[0]
                end = start + call.sent - len(call.totals)
                call.totals += totals[start:end]
                start = end
                self._complete()
            self._is_torn = False

    def _tell(self, data: bytes) -> list[int]:
        """The totals that follow from what came; what else it may mean, no call has learned."""
        try:
            return self._session.receive(data)
        except _BREAKS:
            self._is_torn = False
            raise

    def _complete(self) -> None:
        """The oldest calls that have all of their totals are over."""
        while self._calls and self._calls[0].is_done:
            call = self._calls.popleft()
            self._sent_calls = max(0, self._sent_calls - 1)
            call.over = True
            call.wake()

    def _give_up(self, call: _Call, error: BaseException) -> None:
        """Nobody waits for a call any more; what of it has a number stays."""
        assert isinstance(call, _SessionCall)
        call.fail(self._failure(call, error, self._why(call, error)))
        at = self._calls.index(call)
        if call.pending:
            call.cut()
            self._left.append(call)
            self._sent_calls = max(self._sent_calls, at + 1)
        else:
            del self._calls[at]
            self._sent_calls -= at < self._sent_calls

    def _why(self, own: _Call | None, error: BaseException) -> str:
        """Why a call is given up."""
        if isinstance(error, CounterError):
            return str(error).partition(";")[0]
        if not _is_late(error):
            return "the call was interrupted"
        within = f"not answered within {own.timeout or 0:g} s" if own else "not answered in time"
        return f"{within} ({self._obstacle()})"

    def _obstacle(self) -> str:
        """What keeps the session from going on."""
        trouble = self._trouble
        if trouble is None:
            return "the server may have too much to do"
        if isinstance(trouble, HelloRefused):
            return "another connection has the session" if _is_held(trouble) else "no room for it"
        if isinstance(trouble, EOFError):
            return "the server closed the connection"
        if isinstance(trouble, OSError):
            return explain(trouble, self._host, self._port)
        return str(trouble)

    def _failure(self, call: _Call, error: BaseException, why: str) -> CounterError:
        """What becomes of a call that is given up."""
        assert isinstance(call, _SessionCall)
        if call.pending or call.totals:
            return StillPending(why, call.totals, call.pending, call.unsent)
        if not call.frames:
            pending = [amount for each in self._left for amount in each.pending]
            return StillPending(why, (), pending, ())
        if isinstance(error, CounterError):
            return error
        where = format_address(self._host, self._port)
        if isinstance(error, OSError) and self._trouble is error:
            failure = ConnectError(explain(error, self._host, self._port))
        elif isinstance(self._trouble, HelloRefused) and _is_held(self._trouble):
            remedy = "end what else uses its state"
            failure = SessionHeld(f"{where}: another connection has the session; {remedy}")
        elif isinstance(self._trouble, OSError):
            failure = ConnectError(self._obstacle())
        elif self._trouble is not None or call is self._leader:
            failure = ConnectError(f"{where}: {why}; {IS_IT_ONE}")
        else:
            within = f"nothing was sent within {call.timeout or 0:g} s"
            failure = ConnectError(f"{where}: {within}, other calls of this client came first")
        failure.__cause__ = self._trouble
        return failure


def _together(failures: Sequence[CounterError | None]) -> CounterError:
    """One error for the calls whose session is over."""
    told = [each for each in failures if isinstance(each, OutcomeUnknown | SessionEnded)]
    first = told[0]
    totals, amounts, unsent = (
        [amount for each in told for amount in getattr(each, name)]
        for name in ("totals", "amounts", "unsent")
    )
    together = type(first)(first._why, totals, amounts, unsent)
    if isinstance(first, AcknowledgedLost) and isinstance(together, AcknowledgedLost):
        together.lost = first.lost
    return together


def _is_held(refusal: HelloRefused) -> bool:
    return refusal.refused is Refused.HELD


def _is_hopeless(error: OSError) -> bool:
    """Whether connecting again would end alike: a host without an address, TLS that is refused."""
    is_tls = getattr(error, "library", None) == "SSL" or hasattr(error, "verify_message")
    return is_tls or _is_refusal(error) or isinstance(error, socket.gaierror)


def _reset(sock: socket.socket) -> None:
    """Closes a socket with RST: what has not left this machine is not sent any more, and what the
    server has not read is not counted."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def _is_late(error: BaseException) -> bool:
    """Whether a timeout of ours is over; the kernel's, of a peer that vanished, has a number."""
    return isinstance(error, TimeoutError) and error.errno is None


def _has_ended(sock: socket.socket) -> bool:
    """Whether the server closed the connection while it was idle: then nothing is in doubt.

    The kernel's word takes a third of the time of trying to read, and leaves TLS its bytes.
    """
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != TCP_ESTABLISHED


def _is_refusal(error: OSError) -> bool:
    """Whether a server refuses this client's certificate, or that it has none.

    In TLS 1.3 the client learns it when its own handshake is over and its first frames are sent.
    The server is then still in its own and has read none of them.
    """
    reason = _tls_reason(error)
    return "alert" in reason and ("certificate" in reason or reason.endswith("unknown ca"))


def _tls_reason(error: OSError) -> str:
    """What OpenSSL says, of an error of the ssl module or of one that has its words."""
    text = getattr(error, "reason", None) or str(error.strerror or error)
    return text.replace("_", " ").lower()


def explain(error: OSError | UnicodeError, host: str, port: int) -> str:
    """What a failure to connect means, with the address and what to do."""
    where = format_address(host, port)
    if isinstance(error, socket.gaierror | UnicodeError):
        return f"cannot connect to {where}: unknown host; check the address"
    if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
        return f"cannot connect to {where}: no answer in time; check the address and firewalls"
    is_tls = getattr(error, "library", None) == "SSL" or hasattr(error, "verify_message")
    if is_tls or error.errno == errno.EPROTO:
        return f"cannot connect to {where}: {_explain_tls(error)}"
    reason = (error.strerror or str(error)).lower()
    remedy = {
        errno.ECONNREFUSED: f"; start a server there: python server.py --port {port}",
        errno.EMFILE: "; raise the descriptor limit (ulimit -n)",
        errno.ENFILE: "; raise the machine's limit (sysctl fs.file-max)",
        errno.EADDRNOTAVAIL: "; every local port for it is taken (wait, close connections, or widen"
        " sysctl net.ipv4.ip_local_port_range), or this machine has no address of its kind",
    }.get(error.errno or 0, "; check the address")
    return f"cannot connect to {where}: {reason}{remedy}"


def _explain_tls(error: OSError) -> str:
    reason = _tls_reason(error)
    verify = getattr(error, "verify_message", "") or reason.partition("verify failed: ")[2]
    if verify:
        remedy = "--tlsCA names the authority to trust"
        if "local issuer" in verify:
            remedy += ", and the server's --tlsCert has to hold those between"
        if "mismatch" in verify:
            remedy = "connect by a name that is in the certificate"
        elif "expired" in verify:
            remedy = "the server needs a renewed one, if this machine's clock is right"
        elif "not yet valid" in verify:
            remedy = "look at this machine's clock, and at the day the certificate begins"
        return f"its certificate is refused ({verify.rstrip('.')}); {remedy}"
    if _is_refusal(error):
        remedy = "give --tlsCert and --tlsKey that its --tlsClientCA has signed"
        if "expired" in reason:
            remedy = "renew the one that --tlsCert names"
        return f"the server refuses this client's certificate ({reason}); {remedy}"
    if "wrong version number" in reason or "record layer failure" in reason:
        return f"it does not speak TLS ({reason}); leave --tls out"
    return f"no TLS ({reason}); check --tls, --tlsCA, --tlsCert and the server's --tlsClientCA"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives back its exit code."""
    from counter.load.command import Library, run

    return run(arguments, Library(_add, ConnectError, OutcomeUnknown, explain, IS_IT_ONE))


def _add(address: str, timeout_s: float, tls: ssl.SSLContext | None, amount: int) -> int:
    # The command takes a timeout of a year, which no socket does.
    with CounterClient(address, min(timeout_s, MAX_TIMEOUT_S), tls) as counter:
        return counter.add(amount)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ModuleNotFoundError as error:
        hint = "is not installed; pip install -r requirements.txt"
        sys.stderr.write(f"client.py: {error.name} {hint}\n")
        sys.exit(2)
