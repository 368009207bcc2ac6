"""TLS without sockets: bytes of the wire in, bytes of the application out, and the other way round.

A Session is one end of one connection; whoever has the socket moves its bytes. So a callback of the
loop can serve TLS as it serves plain connections, and nothing waits in a handshake.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from typing import Final

RECORD_HEADER: Final = 5


class TlsError(Exception):
    """A handshake or a record was refused; outgoing() holds the alert that tells the peer."""


class Session:
    """One end of a TLS connection. `handshaken` once application bytes may pass."""

    __slots__ = ("_head", "_incoming", "_left", "_outgoing", "_tls", "ended", "handshaken")

    def __init__(self, context: ssl.SSLContext, server_name: str | None = None) -> None:
        """A server's end, or a client's with the name of the server it means."""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_name is None,
            server_hostname=server_name,
        )
        self.handshaken = False
        self.ended = False  # the peer said that it sends no more
        self._head = b""  # of a record whose length is not known yet
        self._left = 0  # bytes that are missing of a record

    def start(self) -> None:
        """Begins the handshake; a client has something to send then."""
        self.receive(b"")

    def receive(self, data: bytes) -> bytes:
        """The application's bytes in what came from the peer; TlsError if it is refused.

        Nothing can be answered then, so what came before in the same bytes is not given back.
        """
        self._follow(data)
        self._incoming.write(data)
        parts = []
        try:
            if not self.handshaken:
                self._tls.do_handshake()
                self.handshaken = True
            while part := self._tls.read(65536):
                parts.append(part)
            self.ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.ended = True
        except ssl.SSLError as error:
            raise TlsError(reason(error)) from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def is_within_record(self) -> bool:
        """Whether the peer has begun a record that it has not sent to its end."""
        return bool(self._head or self._left)

    def _follow(self, data: bytes) -> None:
        """Notes where records end: a header of five bytes has the length of what follows it."""
        data, self._head, end = self._head + data, b"", self._left
        while len(data) - end >= RECORD_HEADER:
            end += RECORD_HEADER + int.from_bytes(data[end + 3 : end + RECORD_HEADER])
        if end <= len(data):
            self._head = data[end:]
        self._left = max(0, end - len(data))

    def encrypt(self, data: bytes) -> bytes:
        """What to send to the peer for these bytes of the application."""
        self._tls.write(data)
        return self._outgoing.read()

    def outgoing(self) -> bytes:
        """What the handshake, or an alert, has to send to the peer."""
        return self._outgoing.read()

    def farewell(self) -> bytes:
        """What tells the peer that nothing more is sent."""
        if self.handshaken:
            with suppress(ssl.SSLError):
                self._tls.unwrap()
        return self._outgoing.read()


def reason(error: ssl.SSLError) -> str:
    """An error of OpenSSL in words."""
    verify = getattr(error, "verify_message", "")
    text = (error.reason or str(error.args[-1])).replace("_", " ").lower()
    return f"{text}: {verify}" if verify else text
