"""A connection under TLS: what connection.py does, with a Session between it and the socket.

The handshake is served by the same callback as frames, as its bytes arrive: it holds a worker but
neither the accept loop nor a greenlet, and is bounded by the frame deadline. Afterwards frames are
decrypted together and decoded together, and the replies of a turn are one record: pipelining and
batching stay. A refused handshake ends with an alert and FIN, so that the peer learns the reason.
"""

from __future__ import annotations

import _socket
import time
from typing import TYPE_CHECKING

from counter.serving.connection import LARGE_READ, Connection
from counter.tls.session import Session, TlsError

if TYPE_CHECKING:
    from counter.serving.server import CounterServer


class TlsConnection(Connection):
    """One peer under TLS. `unsent` holds bytes of the wire, as everywhere."""

    __slots__ = ("session",)

    def __init__(self, server: CounterServer, sock: _socket.socket) -> None:
        assert server.tls_context is not None
        self.session = Session(server.tls_context)
        super().__init__(server, sock)
        server.incomplete[self] = time.monotonic()

    def on_readable(self) -> None:
        """Takes what has arrived; runs in the loop and never waits."""
        try:
            data = self.sock.recv(LARGE_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        try:
            self.take(data)
        except Exception:
            self.fail()

    def take(self, data: bytes) -> None:
        """Takes bytes of the wire, or notes that the peer has ended."""
        if not data:
            super().take(b"")
            return
        session = self.session
        before = session.handshaken
        try:
            frames = session.receive(data)
        except TlsError as error:
            self.server.refused("tls", f"{self.peer()}: {error}")
            self.transmit(session.outgoing())
            self.end("tls", lingers=True)
            return
        if answer := session.outgoing():
            self.transmit(answer)
        if not session.handshaken:
            return
        incomplete = self.server.incomplete
        started_at = None
        if not self.rest and (frames or not before or not session.is_within_record()):
            # Of the handshake, or of a record that is whole now.
            started_at = incomplete.pop(self, None)
        if frames:
            self.decode(frames)
            if started_at is not None and before and len(self.rest) == len(frames):
                incomplete[self] = started_at
        if self.ending:
            return
        if session.ended:
            # What came before is answered while the socket is there.
            self.server.turn.commit()
            super().take(b"")
        elif session.is_within_record():
            # A frame begins with the record that holds it.
            incomplete.setdefault(self, time.monotonic())

    def send(self, replies: bytes) -> None:
        """Encrypts replies and hands them to the kernel; what it does not take is in `unsent`."""
        # A session that was refused cannot encrypt any more; its peer is told why and no total.
        if self.ending != "tls":
            self.transmit(self.session.encrypt(replies))

    def overdue(self) -> str:
        """What the frame deadline has ended, for the log."""
        if not self.session.handshaken:
            return "no TLS handshake in time"
        return super().overdue() if self.rest else "a TLS record stopped"

    def release(self) -> None:
        """Says that nothing more comes, where the peer may still read it."""
        if (self.lingers or self.session.ended) and not self.unsent:
            self.transmit(self.session.farewell())
        super().release()
