"""A connection under TLS: what connection.py does, with a Session between it and the socket.

The handshake is served by the same callback as frames, as its bytes arrive: it holds a worker but
neither the accept loop nor a greenlet, and is bounded by the frame deadline. Afterwards frames are
decrypted together and decoded together, and the replies of a turn are one record: pipelining and
batching stay. A refused handshake ends with an alert and FIN, so that the peer learns the reason.
"""

from __future__ import annotations

import _socket
import ssl

from counter.serving.connection import LARGE_READ, Connection, Host
from counter.serving.ending import Ending
from counter.tls.session import Session, TlsError


class TlsConnection(Connection):
    """One peer under TLS. `unsent` holds bytes of the wire, as everywhere."""

    __slots__ = ("session",)

    def __init__(self, host: Host, sock: _socket.socket, context: ssl.SSLContext) -> None:
        self.session = Session(context)
        super().__init__(host, sock)
        host.deadlines.begin(self)

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
            self.host.refused(Ending.TLS, f"{self.peer()}: {error}")
            self.transmit(session.outgoing())
            self.end(Ending.TLS)
            return
        if answer := session.outgoing():
            self.transmit(answer)
        if not session.handshaken or self.ending is Ending.GONE:
            return
        deadlines = self.host.deadlines
        began_at = None
        if not self.rest and (frames or not before or not session.is_within_record()):
            # Of the handshake, or of a record that is whole now.
            began_at = deadlines.end(self)
        if frames:
            self.decode(frames)
            if began_at is not None and before and len(self.rest) == len(frames):
                deadlines.begin(self, began_at)
        if self.ending is not None:
            return
        if session.ended:
            # What came before is answered while the socket is there.
            self.host.commit()
            super().take(b"")
        elif session.is_within_record():
            # A frame begins with the record that holds it.
            deadlines.begin_unless_begun(self)

    def send(self, replies: bytes) -> None:
        """Encrypts replies and hands them to the kernel; what it does not take is in `unsent`."""
        # A session that was refused cannot encrypt any more; its peer is told why and no total.
        if self.ending is not Ending.TLS:
            self.transmit(self.session.encrypt(replies))

    def overdue(self) -> str:
        """What the frame deadline has ended, for the log."""
        if not self.session.handshaken:
            return "no TLS handshake in time"
        return super().overdue() if self.rest else "a TLS record stopped"

    def release(self) -> None:
        """Says that nothing more comes, where the peer may still read it."""
        if (self.lingers() or self.session.ended) and not self.unsent:
            self.transmit(self.session.farewell())
        super().release()
