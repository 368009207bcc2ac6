"""A connection under TLS: what connection.py does, with a Session between it and the socket.

The engine tells that there is something to read; it is read, decrypted and decoded here. The
handshake is served in the same way, as its bytes arrive, and is bounded by the frame deadline.
Frames that come in one read are one addition, and their replies one record: pipelining and batching
stay. A refused handshake ends with an alert and FIN, so that the peer learns the reason.
"""

from __future__ import annotations

import _socket
import ssl
import time
from contextlib import suppress

from counter.serving.connection import Connection, Host, State
from counter.serving.ending import Ending
from counter.tls.session import Session, TlsError
from counter.turn.engine import Interest, Kind
from counter.turn.plain import LARGE_READ, Asker, BatchTurn
from protocol import REQUEST_SIZE, BadFrame, Decoder


class _Asker(Asker):
    """What a turn may ask of a connection under TLS, until what it asked for is void."""

    __slots__ = ("connection",)

    def __init__(self, connection: TlsConnection) -> None:
        super().__init__(connection.fd)
        self.connection = connection

    def reply(self, data: bytes) -> None:
        self.connection.send(data)

    def tell(self, kind: Kind, data: bytes = b"") -> None:
        self.connection.host.engine.events.append((kind, self.fd, data))


class TlsConnection(Connection):
    """One peer under TLS. `unsent` holds bytes of the wire, as everywhere."""

    __slots__ = ("asker", "decoder", "is_fresh", "left", "read_at", "rest", "session")

    interest = Interest.BYTES

    def __init__(
        self, host: Host, sock: _socket.socket, context: ssl.SSLContext, decoder: Decoder
    ) -> None:
        self.session = Session(context)
        self.decoder = decoder
        super().__init__(host, sock)
        self.asker = _Asker(self)
        self.is_fresh = True  # no frame was taken yet
        self.rest = b""  # the bytes of an incomplete frame
        self.left = -1  # bytes that are still to be read; below 0: without an end
        self.read_at = 0.0
        host.frame_deadlines.begin(self)

    def last_read_at(self) -> float:
        return self.read_at

    def on_ready(self, data: bytes) -> None:
        if self.state in (State.SERVED, State.DRAINING) and not self.unsent:
            self.read()
        else:
            super().on_ready(data)

    def limit(self, count: int) -> None:
        self.left = count

    def read(self) -> None:
        """Takes what has arrived."""
        size = LARGE_READ if self.left < 0 else min(self.left, LARGE_READ)
        try:
            data = self.sock.recv(size)
        except BlockingIOError:
            return
        except OSError:
            self.on_reset(b"")
            return
        self.read_at = time.monotonic()
        if not data:
            self.end(Ending.GONE)
            return
        self.take(data)
        if self.left >= 0:
            self.left -= len(data)
            if not self.left:
                self.end(Ending.DRAIN)

    def take(self, data: bytes) -> None:
        """Takes bytes of the wire."""
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
        if not session.handshaken or self.state is State.CLOSED:
            return
        deadlines = self.host.frame_deadlines
        began_at = None
        if not (self.rest or self.hello) and (
            frames or not before or not session.is_within_record()
        ):
            # Of the handshake, or of a record that is whole now.
            began_at = deadlines.end(self)
        if frames:
            self.decode(frames)
            if began_at is not None and before and len(self.rest) == len(frames):
                deadlines.begin(self, began_at)
        if self.ending is not None:
            return
        if session.ended:
            self.end(Ending.GONE)
        elif session.is_within_record():
            # A frame begins with the record that holds it.
            deadlines.begin_unless_begun(self)
            if self.state is State.STALLED:  # by the replies to what came before it
                deadlines.pause(self)

    def decode(self, data: bytes) -> None:
        """Verifies all whole frames, has them added, and keeps the rest."""
        if self.hello:
            self.take_hello(self.hello + data)
            return
        had_begun = bool(self.rest)
        data = self.rest + data
        refused: BadFrame | None = None
        try:
            batch, self.rest = self.decoder.decode(data)
        except BadFrame as bad:
            batch, self.rest = bad.batch, b""
            refused = bad.with_traceback(None)  # which would hold this call's frame
        if self.rest:
            if batch or not had_begun:
                self.host.frame_deadlines.begin(self)
        elif had_begun:
            self.host.frame_deadlines.end(self)
        is_first = self.is_fresh and not batch
        self.is_fresh = self.is_fresh and not batch and refused is None
        if batch:
            self.host.additions.ask(BatchTurn([(self.asker, batch.sum(), batch)]))
        if refused is not None:
            self.decide_refusal(refused.reason, data[len(batch) * REQUEST_SIZE :], is_first)

    def decide_refusal(self, reason: str, data: bytes, is_first: bool) -> None:
        """Decides what is done about data that begins with a frame that is refused."""
        if reason == "limit":
            self.on_limit(data[:REQUEST_SIZE])
        elif is_first:
            self.on_hello(data)
        else:
            self.on_checksum(data[:REQUEST_SIZE])

    def join(self, tag: int) -> None:
        self.asker.tag = tag

    def say(self, data: bytes) -> None:
        self.send(data)

    def send(self, replies: bytes) -> None:
        """Encrypts replies and hands them to the kernel."""
        # A session that was refused cannot encrypt any more; its peer is told why and no total.
        if self.ending is not Ending.TLS:
            self.transmit(self.session.encrypt(replies))

    def owed(self) -> int:
        return self.asker.owed

    def tell_answered(self) -> None:
        self.asker.tells = True

    def void(self) -> None:
        self.asker.is_live = False
        if self.asker.owed:
            self.host.additions.note_void()
        tag, self.asker = self.asker.tag, _Asker(self)
        self.asker.tag = tag

    def overdue(self) -> str:
        if not self.session.handshaken:
            return "no TLS handshake in time"
        if self.hello:
            return super().overdue()
        if self.rest:
            return f"a frame stopped after {len(self.rest)} bytes"
        return "a TLS record stopped"

    def release(self) -> None:
        """Says that nothing more comes, where the peer may still read it."""
        if self.state is State.CLOSED:
            return
        lingers = self.ending is not None and self.ending.lingers
        if (lingers or self.session.ended) and not self.unsent:
            with suppress(OSError):
                self.sock.send(self.session.farewell())
        super().release()
        del self.asker  # or both would live until the collector comes
