"""python client.py: the load generator's command; from client import CounterClient: the library.

Importing this module patches nothing and needs only the standard library, xxhash and protocol.py;
the command is counter/load/command.py's and is imported when it runs.

The law of the library: no addition is ever sent twice. Once a frame may have reached the server,
a failure is OutcomeUnknown, and the caller decides; before that it is ConnectError, and trying
again is safe.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

if __name__ == "__main__" and sys.flags.safe_path:
    # python -P leaves out the folder of the program, whose own modules are no strangers'.
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))

try:
    from protocol import (
        MAX_UNREAD_FRAMES,
        REPLY_SIZE,
        AddressError,
        AmountError,
        CounterError,
        decode_totals,
        encode_frame,
        format_address,
        parse_address,
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
    "AddressError",
    "AmountError",
    "ConnectError",
    "CounterClient",
    "CounterError",
    "OutcomeUnknown",
]

# Frames that add_many keeps unanswered. A quarter of what the server allows: enough to hide the
# round trip, and a failure leaves so many outcomes unknown at most.
WINDOW_FRAMES: Final = MAX_UNREAD_FRAMES // 4

IS_IT_ONE: Final = "is it a counter server, and does it speak TLS (--tlsCA)?"


class ConnectError(CounterError):
    """No connection, so nothing was sent or counted: it is safe to try again."""


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
        return type(self), (self._why, self.totals, self.amounts, self.unsent, self._hint)


class CounterClient:
    """One connection to a counter server: made on first use, and again after it was lost.

    `address` is `HOST:PORT`, `:PORT` or `[IPv6]:PORT`; `timeout` in seconds bounds connecting and
    the wait for each reply. With a context of the ssl module as `tls` the connection is encrypted,
    and the server's certificate verified against the host of the address if the context says so.
    Threads and greenlets may share a client: they take turns. A forked child connects anew. Works
    with gevent where the application is patched.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:8080",
        timeout: float = 10,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.host, self.port = parse_address(address)
        self.timeout = timeout
        self.tls = tls
        self._is_new = True
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        _clients.add(self)

    def add(self, amount: int) -> int:
        """Adds an amount of 0..2^64-1; gives back the total right after that addition.

        AmountError for any other amount, ConnectError if there is no connection (nothing was
        counted), OutcomeUnknown if the reply did not come.
        """
        return self.add_many((amount,))[0]

    def add_many(self, amounts: Iterable[int]) -> list[int]:
        """Adds each amount, pipelined; gives back the total right after each, in order.

        Errors as with add(); OutcomeUnknown tells the answered, the unknown and the unsent apart.
        A bad amount is found before anything is sent.
        """
        wanted = list(amounts)
        frames = [encode_frame(amount) for amount in wanted]
        if not frames:
            return []
        with self._lock:
            sock = self._connected()
            try:
                return self._exchange(sock, wanted, frames)
            except BaseException:
                # Whatever the reason (a killed greenlet, Ctrl-C), replies that are still to come
                # would be taken for those of the next call.
                self._drop()
                raise

    def total(self) -> int:
        """The total now; counts nothing. Errors as with add()."""
        return self.add(0)

    def close(self) -> None:
        """Closes the connection; a later call makes a new one."""
        with self._lock:
            self._drop()

    def __enter__(self) -> CounterClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _connected(self) -> socket.socket:
        """A connection that was alive a moment ago."""
        if self._sock is not None and self._ended(self._sock):
            self._drop()
        if self._sock is None:
            try:
                self._sock = self._connect()
            except (OSError, UnicodeError) as error:
                raise ConnectError(explain(error, self.host, self.port)) from error
            self._is_new = True
        return self._sock

    def _connect(self) -> socket.socket:
        sock = socket.create_connection((self.host, self.port), self.timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.tls is None:
            return sock
        try:
            return self.tls.wrap_socket(sock, server_hostname=self.host)
        except BaseException:
            sock.close()
            raise

    def _ended(self, sock: socket.socket) -> bool:
        """Whether the server closed the connection while it was idle: then nothing is in doubt."""
        sock.settimeout(0)
        try:
            # TLS has words of its own to read, and no way to look at what follows without it.
            sock.recv(1, socket.MSG_PEEK if self.tls is None else 0)
        except OSError as error:
            return not (isinstance(error, BlockingIOError) or _wants_more(error))
        return True

    def _exchange(self, sock: socket.socket, amounts: list[int], frames: list[bytes]) -> list[int]:
        totals: list[int] = []
        rest = b""
        sent = 0
        why, closed = "the server closed the connection", True
        try:
            while len(totals) < len(frames):
                room = min(len(frames), len(totals) + WINDOW_FRAMES) - sent
                if room > 0:
                    sock.settimeout(self.timeout)
                    # From here on the outcome of these is unknown, whatever sendall says.
                    sent += room
                    sock.sendall(b"".join(frames[sent - room : sent]))
                data = self._receive(sock, sent - len(totals), rest)
                if not data:
                    break
                self._is_new = False
                more, rest = decode_totals(rest + data)
                totals += more
            else:
                return totals
        except TimeoutError:
            closed = False
            why = f"no reply within {self.timeout:g} s (every worker of the server may be taken)"
        except OSError as error:
            if self._is_new and _is_refusal(error):
                raise ConnectError(explain(error, self.host, self.port)) from error
            why = f"the connection was lost ({(error.strerror or str(error)).lower()})"
        unknown = amounts[len(totals) : sent]
        hint = self._why_closed(unknown) if closed else ""
        raise OutcomeUnknown(why, totals, unknown, amounts[sent:], hint)

    def _why_closed(self, unknown: list[int]) -> str:
        """What may have made a server close the connection before these were answered."""
        hints = []
        if any(unknown):
            hints.append("a server with --maxIncrement refuses larger amounts in this way")
        if self._is_new and self.tls is None:
            hints.append(IS_IT_ONE)
        return "; ".join(hints)

    def _receive(self, sock: socket.socket, expected: int, rest: bytes) -> bytes:
        """Some bytes, and at least the end of the next reply; empty at the end of the stream."""
        deadline = time.monotonic() + self.timeout
        data = b""
        while len(rest) + len(data) < REPLY_SIZE:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            more = sock.recv(expected * REPLY_SIZE - len(rest) - len(data))
            if not more:
                return b""
            data += more
        return data

    def _drop(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _after_fork(self) -> None:
        """Closes the child's own descriptor; the parent's connection does not notice."""
        self._lock = threading.Lock()
        self._drop()


_clients: weakref.WeakSet[CounterClient] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for client in list(_clients):
        client._after_fork()


# In the child before any of its threads runs: two threads cannot both find a connection to renew.
os.register_at_fork(after_in_child=_after_fork_in_child)


def _wants_more(error: OSError) -> bool:
    """Whether TLS only says that nothing has come yet."""
    return type(error).__name__ == "SSLWantReadError"


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
    }.get(error.errno or 0, "; check the address")
    return f"cannot connect to {where}: {reason}{remedy}"


def _explain_tls(error: OSError) -> str:
    reason = _tls_reason(error)
    verify = getattr(error, "verify_message", "") or reason.partition("verify failed: ")[2]
    if verify:
        remedy = "--tlsCA names the authority to trust"
        if "mismatch" in verify:
            remedy = "connect by a name that is in the certificate"
        return f"its certificate is refused ({verify.rstrip('.')}); {remedy}"
    if _is_refusal(error):
        return (
            f"the server refuses this client's certificate ({reason}); give --tlsCert and --tlsKey "
            "that its --tlsClientCA has signed"
        )
    if "wrong version number" in reason or "record layer failure" in reason:
        return f"it does not speak TLS ({reason}); leave --tls out"
    return f"no TLS ({reason}); check --tls, --tlsCA, --tlsCert and the server's --tlsClientCA"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives back its exit code."""
    from counter.load.command import Library, run

    return run(arguments, Library(_add, ConnectError, OutcomeUnknown, explain, IS_IT_ONE))


def _add(address: str, timeout_s: float, tls: ssl.SSLContext | None, amount: int) -> int:
    with CounterClient(address, timeout_s, tls) as counter:
        return counter.add(amount)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ModuleNotFoundError as error:
        hint = "is not installed; pip install -r requirements.txt"
        sys.stderr.write(f"client.py: {error.name} {hint}\n")
        sys.exit(2)
