"""How a connection to the server begins: TCP, the TLS handshake, the read of the total.

This is the part of the load that waits, in greenlets. What it hands out never does: a plain socket
for the callbacks of the loop, and the TLS session on it if there is one.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import os
import socket
from typing import Any, Final

from counter.load.name import ServerName
from counter.load.patience import Patience
from counter.load.share import Share
from counter.results.result import Result
from counter.system.libev import READ, WRITE
from counter.system.sockets import VANISHED_S, close_with_reset, meets_itself, notice_vanished
from counter.tls.contexts import client_context
from counter.tls.session import Session, TlsError
from protocol import REPLY_SIZE, encode_frame

LARGE_READ: Final = 65536


class Dialler:
    """Makes the connections of one process."""

    def __init__(self, share: Share) -> None:
        settings = share.settings
        host, port = settings.server_address.host, settings.server_address.port
        self._name = ServerName(host, port, share.addresses)
        self._timeout_s = settings.timeout_s
        self._server_name = host
        self._context = client_context(settings) if settings.wants_tls() else None

    @property
    def encrypts(self) -> bool:
        """Whether its connections speak TLS."""
        return self._context is not None

    def connect(self) -> tuple[_socket.socket, Session | None]:
        """A connected, non-blocking socket, and the TLS session on it if there is one; waits.

        OSError of the last address if none can be connected to.
        """
        addresses, left_s = list(self._name.addresses()), self._timeout_s
        while True:
            family, address = addresses.pop(0)
            # An address that is silent leaves time for those behind it.
            patience = Patience(left_s / (len(addresses) + 1))
            before_s = patience.left_s
            try:
                return self._reach(family, address, patience)
            except OSError:
                if not addresses:
                    raise
            left_s -= before_s - patience.left_s

    def _reach(
        self, family: int, address: Any, patience: Patience
    ) -> tuple[_socket.socket, Session | None]:
        # A plain socket, which serves the callbacks: its recv and send never wait.
        sock = _socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            connect(sock, address, patience)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            notice_vanished(sock, max(VANISHED_S, self._timeout_s))
            session = None
            if self._context is not None:
                session = Session(self._context, self._server_name)
                shake_hands(sock, session, patience)
        except BaseException:
            sock.close()
            raise
        return sock, session

    def read_total(self, result: Result) -> int | None:
        """The server's total, read on a connection of its own; None if no answer comes in time.

        The read is counted in `result`. OSError if there is no connection, EOFError if it ends
        without a byte.
        """
        sock, session = self.connect()
        with contextlib.closing(sock):
            frame = encode_frame(0)
            sock.send(session.encrypt(frame) if session else frame)
            result.sent += 1
            reply = _receive_reply(sock, session, Patience(self._timeout_s))
        if reply is None:
            return None
        result.answered += 1
        return int.from_bytes(reply)


def _receive_reply(
    sock: _socket.socket, session: Session | None, patience: Patience
) -> bytes | None:
    """One reply, None if it does not come whole; EOFError if nothing comes of it."""
    data = b""
    while len(data) < REPLY_SIZE:
        try:
            more = receive(sock, patience)
        except ConnectionResetError:
            more = b""
        except TimeoutError:
            return None
        if not more and not data:
            raise EOFError
        if not more:
            return None
        try:
            data += session.receive(more) if session else more
        except TlsError as error:
            raise OSError(errno.EPROTO, str(error)) from None
    return data[:REPLY_SIZE]


def connect(sock: _socket.socket, address: Any, patience: Patience) -> None:
    """Connects a non-blocking socket; waits. OSError."""
    code = sock.connect_ex(address)
    if code == errno.EINPROGRESS:
        patience.wait(sock.fileno(), WRITE)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if not code and meets_itself(sock):
        code = errno.ECONNREFUSED
        close_with_reset(sock)
    if code:
        raise OSError(code, os.strerror(code))


def receive(sock: _socket.socket, patience: Patience) -> bytes:
    """What comes next, empty at the end of the stream; waits. OSError."""
    while True:
        patience.wait(sock.fileno(), READ)
        with contextlib.suppress(BlockingIOError):
            return sock.recv(LARGE_READ)


def send(sock: _socket.socket, data: bytes, patience: Patience) -> None:
    """Sends all of it; waits. OSError."""
    while data:
        patience.wait(sock.fileno(), WRITE)
        with contextlib.suppress(BlockingIOError):
            data = data[sock.send(data) :]


def shake_hands(sock: _socket.socket, session: Session, patience: Patience) -> None:
    """Makes a connected socket's TLS session ready; waits. OSError with its text if refused."""
    data = b""
    try:
        while True:
            session.receive(data)
            send(sock, session.outgoing(), patience)
            if session.handshaken:
                return
            data = receive(sock, patience)
            if not data:
                raise OSError(errno.EPROTO, "the server ended the TLS handshake")
    except TlsError as error:
        with contextlib.suppress(OSError):  # the reason is worth more
            send(sock, session.outgoing(), patience)
        raise OSError(errno.EPROTO, str(error)) from None
