"""One connection to a server and the calls that share it; how it is made, and why it failed.

What lives here knows no session: frames go out in the order of their calls, totals come back in the
same order, and what a break leaves in doubt is told to each call as OutcomeUnknown. Nothing is sent
twice.
"""

from __future__ import annotations

import errno
import os
import reprlib
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from protocol import (
    MAX_UNREAD_FRAMES,
    REPLY_SIZE,
    CounterError,
    decode_totals,
    format_address,
)

if TYPE_CHECKING:
    import ssl

# Frames that a connection keeps unanswered. A quarter of what the server allows: enough to hide the
# round trip, and a failure leaves so many outcomes unknown at most.
WINDOW_FRAMES: Final = MAX_UNREAD_FRAMES // 4

TCP_ESTABLISHED: Final = b"\1"  # the first byte of struct tcp_info

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


def amount_of(frame: bytes) -> int:
    return int.from_bytes(frame[:8])


def shown(value: object) -> str:
    """A value in an error, of whatever length and kind it is."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return f"of {type(value).__name__}"


class Call:
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


class Line:
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
        self._calls: deque[Call] = deque()
        self._leader: Call | None = None
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

    def call(self, frames: list[bytes], timeout: float | None, name: str) -> Call:
        """A call to be carried; ArgumentError if it has a name, which only a session keeps."""
        if name:
            raise ArgumentError(f"name {shown(name)} without a session, which alone keeps names")
        return Call(frames, timeout)

    def carry(self, call: Call) -> None:
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

    def _join(self, call: Call) -> None:
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

    def _give_up(self, call: Call, error: BaseException) -> None:
        """Takes out a call that waits for others; what it has sent it abandons."""
        call.fail(self._failure(call, error, self._why(call, error)))
        if not call.sent or self.sock is None:
            self._calls.remove(call)
            return
        self._abandoned = self._why(None, error)
        # Wakes the leader. A TLS socket's own shutdown() would have it read on without TLS.
        with suppress(OSError), socket.socket(fileno=os.dup(self.sock.fileno())) as same:
            same.shutdown(socket.SHUT_RD)

    def _lead(self, call: Call) -> None:
        """Sends and reads for all until a call is over."""
        try:
            if self.sock is not None and not self._in_flight and has_ended(self.sock):
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

    def _send(self, sock: socket.socket, leader: Call) -> None:
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

    def _receive(self, sock: socket.socket, leader: Call) -> None:
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

    def _break(self, leader: Call | None, error: BaseException) -> None:
        """Ends the connection. The leader is over, and all that have sent anything.

        Where no connection can be made, so are all.
        """
        nowhere = self.sock is None and isinstance(error, OSError) and not is_late(error)
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
            reset(sock)
        elif sock is not None:
            sock.close()
        self._is_new, self._sent_calls, self._in_flight, self._rest = True, 0, 0, b""
        self._abandoned, self._closing, self._patience_s = "", False, None

    def _why(self, own: Call | None, error: BaseException) -> str:
        """Why a connection broke, said to the call itself that met it or to others."""
        if isinstance(error, EOFError):
            return "the server closed the connection"
        if is_late(error):
            if own is None:
                return "another call on the connection waited for its reply in vain"
            return f"no reply within {own.timeout or 0:g} s (the server may have too much to do)"
        if isinstance(error, OSError):
            return f"the connection was lost ({(error.strerror or str(error)).lower()})"
        return "another call on the connection was interrupted"

    def _failure(self, call: Call, error: BaseException, why: str) -> CounterError:
        """What became of a call."""
        failure: CounterError
        refused = self._is_new and isinstance(error, OSError) and is_refusal(error)
        if isinstance(error, OSError) and (self.sock is None or refused):
            failure = ConnectError(explain(error, self._host, self._port))
        elif not call.sent:
            where = format_address(self._host, self._port)
            within = f"nothing was sent within {call.timeout or 0:g} s"
            failure = ConnectError(f"{where}: {within}, other calls of this client came first")
        else:
            answered = len(call.totals)
            amounts = list(map(amount_of, call.frames))
            unknown, unsent = amounts[answered : call.sent], amounts[call.sent :]
            closed = isinstance(error, OSError | EOFError) and not is_late(error)
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

    def _connect(self, call: Call) -> socket.socket:
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

    def _reach(self, call: Call) -> socket.socket:
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
                    reset(sock)
                if not (found and isinstance(error, OSError)):
                    raise


def reset(sock: socket.socket) -> None:
    """Closes a socket with RST: what has not left this machine is not sent any more, and what the
    server has not read is not counted."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def is_late(error: BaseException) -> bool:
    """Whether a timeout of ours is over; the kernel's, of a peer that vanished, has a number."""
    return isinstance(error, TimeoutError) and error.errno is None


def has_ended(sock: socket.socket) -> bool:
    """Whether the server closed the connection while it was idle: then nothing is in doubt.

    The kernel's word takes a third of the time of trying to read, and leaves TLS its bytes.
    """
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != TCP_ESTABLISHED


def is_refusal(error: OSError) -> bool:
    """Whether a server refuses this client's certificate, or that it has none.

    In TLS 1.3 the client learns it when its own handshake is over and its first frames are sent.
    The server is then still in its own and has read none of them.
    """
    reason = tls_reason(error)
    return "alert" in reason and ("certificate" in reason or reason.endswith("unknown ca"))


def tls_reason(error: OSError) -> str:
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
    reason = tls_reason(error)
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
    if is_refusal(error):
        remedy = "give --tlsCert and --tlsKey that its --tlsClientCA has signed"
        if "expired" in reason:
            remedy = "renew the one that --tlsCert names"
        return f"the server refuses this client's certificate ({reason}); {remedy}"
    if "wrong version number" in reason or "record layer failure" in reason:
        return f"it does not speak TLS ({reason}); leave --tls out"
    return f"no TLS ({reason}); check --tls, --tlsCA, --tlsCert and the server's --tlsClientCA"
