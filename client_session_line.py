"""A session and the calls that share it, over one connection after another.

The law: whatever goes wrong on a connection ends that connection and nothing else. Numbers, amounts
and what a server's words mean are client_session.py's; here are waiting, connecting and what each
call is told.
"""

from __future__ import annotations

import random
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, Final

from client_line import (
    IS_IT_ONE,
    Call,
    ConnectError,
    Line,
    OutcomeUnknown,
    WrongType,
    explain,
    has_ended,
    is_late,
    is_refusal,
    reset,
    shown,
    tls_reason,
)
from client_session import (
    AnswersLost,
    HelloRefused,
    PendingAboveLimit,
    Phase,
    Session,
    SessionState,
    Settled,
)
from protocol import (
    MAX_AMOUNT,
    MAX_UNREAD_FRAMES,
    REPLY_SIZE,
    AmountError,
    BadFrame,
    CounterError,
    Refused,
    encode_frame,
    format_address,
)

if TYPE_CHECKING:
    import ssl

# Frames that a session may leave unanswered. Its server keeps up to 16 bytes for each, so that a
# window is small: of 256 add_many() is as fast as of 1,024, of 64 it takes a third longer.
SESSION_WINDOW_FRAMES: Final = 256

# The longest pause before the first attempt to go on after a break; each next one is twice as long,
# up to the last. A random part of it is waited: those that a restart cut off come back spread out.
FIRST_PAUSE_S: Final = 0.02
LAST_PAUSE_S: Final = 1.0

# A connection that is silent for so long is given up for another, as that of a machine that is no
# more: a resume is always safe. Twice as long with each attempt in vain, for a server with a queue.
SILENCE_S: Final = 5.0

# So many opens in a row that end in good order and without an answer are no server that drains.
UNANSWERED_OPENS: Final = 5

_AMOUNTS: Final = struct.Struct(">Q8x")  # of frames
_LARGEST_READ: Final = REPLY_SIZE * MAX_UNREAD_FRAMES

END_PATIENCE_S: Final = 1.0  # for a server to say that a session is over


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
        """What is said of those without a total, one after another."""
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


class SessionCall(Call):
    """A call in a session; `sent` of its frames have a number.

    One that was given up is over, and stays until all that have a number have a total.
    """

    __slots__ = ("amounts", "is_lost", "name", "patience_s")

    def __init__(self, frames: list[bytes], timeout: float | None, name: str = "") -> None:
        super().__init__(frames, timeout)
        self.name = name
        self.amounts = [amount for (amount,) in _AMOUNTS.iter_unpack(b"".join(frames))]
        self.is_lost = False  # with its session
        self.patience_s: float | None = None  # of a leader with a connection, None of who waits

    def time_left(self) -> float | None:
        """Seconds for what is done next, None without end; TimeoutError when the call has none."""
        left = super().time_left()
        if left is None or self.patience_s is None:
            return self.patience_s if left is None else left
        return min(left, self.patience_s)

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
    that they belong to apart: which total is whose, or why it is lost, is not known any more."""


# What ends a connection of a session, and not the session, or not before its calls learn it.
_BREAKS: Final = (OSError, EOFError, BadFrame, HelloRefused, AnswersLost, PendingAboveLimit)


class SessionLine(Line):
    """A session and the calls that share it, with at most one connection at a time.

    The oldest call that somebody waits for leads. Whatever goes wrong on a connection ends that
    connection: the leader makes the next one, is told what was applied, and sends the rest again.
    So a call that is given up leaves its frames to whoever leads next.
    """

    _ENDS = (OSError, EOFError, CounterError)
    _calls: deque[SessionCall]  # type: ignore[assignment]

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
            call = SessionCall([encode_frame(amount)], None, name)
            call.sent, call.over = 1, True
            self._calls.append(call)
        self._left = list(self._calls)  # were given up, and settle() has not told of them
        self._sent_calls = len(self._calls)

    @property
    def state(self) -> SessionState:
        """The session's."""
        with self._mutex:
            return self._session.state

    def call(self, frames: list[bytes], timeout: float | None, name: str) -> Call:
        if not isinstance(name, str):
            raise WrongType(f"name {shown(name)}: give text")
        return SessionCall(frames, timeout, name)

    def settle(self, timeout: float | None) -> list[Settled]:
        """What calls that were given up, all of them before this one, were counted as."""
        self.carry(SessionCall([], timeout))
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
            self._leader = SessionCall([], None)
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
            self._leader = SessionCall([], None)
        self._finish()

    def _finish(self) -> None:
        """Closes the connection, and ends the session where nothing is pending; leads meanwhile."""
        try:
            if self.sock is not None and not self._session.pending:
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
            reset(sock)
        elif sock is not None:
            sock.close()
        self._session.broke()
        self._patience_s = None

    def _lead(self, call: Call) -> None:
        """Connects, sends and reads for all until a call is over."""
        assert isinstance(call, SessionCall)
        pauses = unanswered_opens = 0
        if self._is_torn or self._session.phase is Phase.LOST:
            self._lose(_Torn())
        with self._mutex:
            self._complete()
        while not call.over:
            answered = self._session.answered
            call.patience_s = SILENCE_S * 2 ** min(pauses, 20)
            try:
                self._exchange(call)
            except _BREAKS as error:
                self._hang_up()
                is_new = self._session.phase is Phase.NEW
                unanswered_opens += 1
                if not (is_new and isinstance(error, EOFError)):
                    unanswered_opens = 0
                if isinstance(error, OSError) and is_late(error):
                    call.time_left()  # TimeoutError: it was the call's, and no sign of a break
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

    def _pause(self, call: Call, pauses: int) -> None:
        """Waits before the next attempt, at random; TimeoutError when there is no time for one."""
        longest_s = min(FIRST_PAUSE_S * 2 ** min(pauses, 20), LAST_PAUSE_S)
        left = call.time_left()
        pause_s = random.uniform(longest_s / 4, longest_s)
        time.sleep(pause_s if left is None else min(pause_s, left))
        call.time_left()

    def _judge(self, error: Exception, unanswered_opens: int) -> None:
        """What a break means: goes on if trying again may help, raises what it means otherwise."""
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
                why = "an old one, one with --sessions 0, or one whose store keeps none does"
                remedy = f"{why}; leave session=True out, or use another; {IS_IT_ONE}"
                raise SessionsUnsupported(f"{where}: {ends}; {remedy}") from error
            if isinstance(error, OSError) and _is_hopeless(error):
                raise error

    def _lose(self, error: Exception) -> None:
        """The session is over; what has no number goes on with the next one.

        Where answers were lost everybody learns it, and nobody goes on.
        """
        with self._mutex:
            kept: deque[SessionCall] = deque()
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

    def _loss(self, call: SessionCall, error: Exception) -> CounterError:
        """What became of a call whose session is over."""
        uncounted = call.pending + call.unsent
        if isinstance(error, AnswersLost):
            why = f"the server lost {error.count} of this client's additions that it had answered"
            lost = AcknowledgedLost(why, call.totals, (), uncounted)
            lost.lost = error.count
            return lost
        if isinstance(error, PendingAboveLimit):
            above = f"amount {error.amount} is above the server's limit of {error.limit} now"
            return SessionEnded(f"{above} (--maxIncrement)", call.totals, (), uncounted)
        if isinstance(error, _Torn):
            why = "a call was interrupted in the moment when numbers were given or totals taken"
            return OutcomeUnknown(why, call.totals, call.pending, call.unsent)
        why = "the server does not know the session any more"
        hint = "it expired, was evicted, or was in the memory of a server that is no more"
        return SessionExpired(why, call.totals, call.pending, call.unsent, hint)

    def _exchange(self, call: Call) -> None:
        """Goes on with the session until a call is over, or the connection is."""
        if self.sock is not None and not self._session.pending and has_ended(self.sock):
            self._hang_up()
        if self.sock is None:
            self.sock = self._connect(call)
            self._greet(self.sock, call)
        self._send(self.sock, call)
        while not call.over:
            self._receive(self.sock, call)
            if len(self._calls) > self._sent_calls:
                self._send(self.sock, call)  # when it is over, for the next leader

    def _greet(self, sock: socket.socket, leader: Call) -> None:
        """Learns from the server what was applied, and sends again what was not."""
        self._bound(sock, leader.time_left())
        sock.sendall(self._session.hello())
        while self._session.phase is not Phase.OPEN:
            self._receive(sock, leader)
        again = self._session.frames()
        if again:
            sock.sendall(again)
        self._trouble = None

    def _send(self, sock: socket.socket, leader: Call) -> None:
        """Gives numbers to what waits, as far as the window has room, and sends it."""
        left = leader.time_left()
        frames: list[bytes] = []
        numbered: list[tuple[SessionCall, int]] = []
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

    def _take_back(self, numbered: list[tuple[SessionCall, int]]) -> None:
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

    def _receive(self, sock: socket.socket, leader: Call) -> None:
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

    def _give_up(self, call: Call, error: BaseException) -> None:
        """Nobody waits for a call any more; what of it has a number stays."""
        assert isinstance(call, SessionCall)
        call.fail(self._failure(call, error, self._why(call, error)))
        if call.pending:
            call.cut()
            self._left.append(call)
        else:
            call.is_lost = call in self._left
            at = self._calls.index(call)
            del self._calls[at]
            self._sent_calls -= at < self._sent_calls

    def _why(self, own: Call | None, error: BaseException) -> str:
        """Why a call is given up."""
        if isinstance(error, CounterError):
            return str(error).partition(";")[0]
        if not is_late(error):
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

    def _failure(self, call: Call, error: BaseException, why: str) -> CounterError:
        """What becomes of a call that is given up."""
        assert isinstance(call, SessionCall)
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
    """One error for the calls that settle() finds lost."""
    told = [each for each in failures if isinstance(each, OutcomeUnknown | SessionEnded)]
    if not told:
        return next(each for each in failures if each is not None)
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
    if "eof" in tls_reason(error):  # a server that ends says so
        return False
    is_tls = getattr(error, "library", None) == "SSL" or hasattr(error, "verify_message")
    return is_tls or is_refusal(error) or isinstance(error, socket.gaierror)
