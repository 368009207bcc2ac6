"""How a connection to the server begins: TCP, the TLS handshake, the read of the total.

This is the part of the load that waits, in greenlets. What it hands out never does: a plain socket
for the callbacks of the loop, and the TLS session on it if there is one.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import socket

import gevent
from gevent.socket import socket as cooperative_socket
from gevent.socket import wait_read

from counter.load.share import Share
from counter.results.result import Result
from counter.tls.contexts import client_context
from counter.tls.session import Session, TlsError
from protocol import REPLY_SIZE, encode_frame

LARGE_READ = 65536


class Dialler:
    """Makes the connections of one process."""

    def __init__(self, share: Share) -> None:
        settings = share.settings
        self._addresses = share.addresses
        self._timeout_s = settings.timeout_s
        self._server_name = settings.server_address.host
        self._context = client_context(settings) if settings.wants_tls() else None

    @property
    def encrypts(self) -> bool:
        """Whether its connections speak TLS."""
        return self._context is not None

    def connect(self) -> tuple[_socket.socket, Session | None]:
        """A connected, non-blocking socket, and the TLS session on it if there is one; waits.

        OSError of the last address if none can be connected to.
        """
        for last, (family, address) in enumerate(self._addresses, 1 - len(self._addresses)):
            sock = cooperative_socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(self._timeout_s)
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                session = None
                if self._context is not None:
                    session = Session(self._context, self._server_name)
                    shake_hands(sock, session)
                # A plain socket serves the callbacks: its recv and send never wait.
                plain = _socket.socket(family, socket.SOCK_STREAM, 0, sock.detach())
                plain.setblocking(False)
                return plain, session
            except OSError:
                if last == 0:
                    raise
            finally:
                sock.close()
        raise AssertionError("a host without addresses")

    def read_total(self, result: Result) -> int | None:
        """The server's total, read on a connection of its own; None if no answer comes in time.

        The read is counted in `result`. OSError if there is no connection, EOFError if it ends
        without a byte.
        """
        data = b""
        sock, session = self.connect()
        with contextlib.closing(sock), gevent.Timeout(self._timeout_s, False):  # type: ignore[arg-type]  # False: no exception
            frame = encode_frame(0)
            sock.send(session.encrypt(frame) if session else frame)
            result.sent += 1
            while len(data) < REPLY_SIZE:
                wait_read(sock.fileno())
                try:
                    more = sock.recv(LARGE_READ)
                except ConnectionResetError:
                    more = b""
                if not more and not data:
                    raise EOFError
                if not more:
                    return None
                try:
                    data += session.receive(more) if session else more
                except TlsError as error:
                    raise OSError(errno.EPROTO, str(error)) from None
        if len(data) < REPLY_SIZE:
            return None
        result.answered += 1
        return int.from_bytes(data)


def shake_hands(sock: cooperative_socket, session: Session) -> None:
    """Makes a connected socket's TLS session ready; waits. OSError with its text if refused."""
    data = b""
    try:
        while True:
            session.receive(data)
            sock.sendall(session.outgoing())
            if session.handshaken:
                return
            data = sock.recv(LARGE_READ)
            if not data:
                raise OSError(errno.EPROTO, "the server ended the TLS handshake")
    except TlsError as error:
        with contextlib.suppress(OSError):  # the reason is worth more
            sock.sendall(session.outgoing())
        raise OSError(errno.EPROTO, str(error)) from None
