"""A server of the wire, sessions included, in a few threads and a dict: what clients are tried on.

It is right, and slow; `fault` makes it wrong in one way on purpose:

    applied   a resume is told one frame more than was applied
    run       the total of a run is one too high
    unfenced  a resume leaves the connection before it to go on adding
    forgets   a session is forgotten when its connection ends, as by a server that was started anew
    full      there is room for no session
    held      a resume finds its session held elsewhere
    old       sessions are not known, as to an old server: a hello ends the connection

Run by itself it serves on a free port, which its first line names:
    python tests/kit/session_server.py [FAULT]
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from protocol import (
    MAX_AMOUNT,
    REQUEST_SIZE,
    TOTAL_MASK,
    Answer,
    BadFrame,
    Control,
    Decoder,
    Hello,
    Refused,
    Run,
    decode_control,
    decode_hello,
    encode_total,
)

FAULTS: Final = ("", "applied", "run", "unfenced", "forgets", "full", "held", "old")


@dataclass
class Kept:
    """One session."""

    window: int
    applied: int = 0
    runs: list[Run] = field(default_factory=list)
    holder: socket.socket | None = None


class SessionServer:
    """Serves in threads until it is closed; `address` is where."""

    def __init__(self, fault: str = "", limit: int = MAX_AMOUNT, port: int = 0) -> None:
        assert fault in FAULTS, f"the faults are {', '.join(FAULTS[1:])}"
        self.fault = fault
        self.limit = limit
        self.total = 0
        self.sessions: dict[int, Kept] = {}
        self.hellos: list[Hello] = []
        self._decoder = Decoder(limit)
        self._lock = threading.Lock()
        self._peers: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)
        self.port = self._listener.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Ends everything; nobody is answered at its port any more."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.disconnect()

    def disconnect(self) -> None:
        """Ends every connection, with RST for what is unread."""
        for peer in list(self._peers):
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                peer, _ = self._listener.accept()
                self._peers.add(peer)
                threading.Thread(target=self._live, args=(peer,), daemon=True).start()

    def _live(self, peer: socket.socket) -> None:
        with suppress(OSError, BadFrame), peer:
            try:
                self._serve(peer)
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(65536):
                    pass
            finally:
                self._leave(peer)
        self._peers.discard(peer)

    def _serve(self, peer: socket.socket) -> None:
        data = b""
        while len(data) < REQUEST_SIZE:
            got = peer.recv(65536)
            if not got:
                return
            data += got
        if self.fault == "old" or decode_control(data[:REQUEST_SIZE]) is None:
            self._add(peer, None, data)
            return
        try:
            while (hello := decode_hello(data)) is None:
                got = peer.recv(65536)
                if not got:
                    return
                data += got
        except BadFrame:
            return
        with self._lock:
            answer = self._greet(peer, hello)
            # Under the lock: an addition of the session's must not overtake its answer.
            peer.sendall(
                encode_total(answer.value) if isinstance(answer, Refused) else answer.encode()
            )
            kept = self.sessions.get(hello.session_id)
        if isinstance(answer, Answer) and kept is not None:
            self._add(peer, kept, b"")

    def _greet(self, peer: socket.socket, hello: Hello) -> Answer | Refused:
        self.hellos.append(hello)
        kept = self.sessions.get(hello.session_id)
        if hello.kind is Control.OPEN:
            if self.fault == "full":
                return Refused.NO_ROOM
            if kept is None:
                kept = self.sessions[hello.session_id] = Kept(hello.value)
            elif kept.applied:
                return Refused.UNKNOWN
        elif self.fault == "held":
            return Refused.HELD
        if kept is None or _have(hello) + kept.window < kept.applied:
            return Refused.UNKNOWN
        if kept.holder not in (None, peer) and self.fault != "unfenced":
            with suppress(OSError):
                kept.holder.shutdown(socket.SHUT_RDWR)
        kept.holder = peer
        have = _have(hello)
        if have > kept.applied:
            del self.sessions[hello.session_id]
        wrong = 1 if self.fault == "applied" and kept.applied else 0
        runs = tuple(
            (last, (after + (self.fault == "run")) & TOTAL_MASK)
            for last, after in kept.runs
            if last > have
        )
        if wrong and have <= kept.applied:
            runs += ((kept.applied + wrong, self.total),)
        return Answer(kept.applied + wrong, self.limit, runs)

    def _add(self, peer: socket.socket, kept: Kept | None, data: bytes) -> None:
        while True:
            refused = None
            try:
                batch, data = self._decoder.decode(data)
            except BadFrame as bad:
                at = len(bad.batch) * REQUEST_SIZE
                batch, refused = bad.batch, data[at : at + REQUEST_SIZE]
            with self._lock:
                if kept is not None and kept.holder is not peer and self.fault != "unfenced":
                    return
                replies = batch.replies(self.total) if batch else b""
                self.total = (self.total + batch.sum()) & TOTAL_MASK
                if kept is not None and batch:
                    kept.applied += len(batch)
                    kept.runs.append((kept.applied, self.total))
                    oldest = kept.applied - kept.window
                    kept.runs = [run for run in kept.runs if run[0] > oldest]
                peer.sendall(replies)
                if refused is not None:
                    self._refuse(peer, kept, refused)
                    return
            got = peer.recv(65536)
            if not got:
                return
            data += got

    def _refuse(self, peer: socket.socket, kept: Kept | None, frame: bytes) -> None:
        control = decode_control(frame)
        if kept is None:
            return
        if control is not None and control[0] is Control.END:
            peer.sendall(encode_total(kept.applied))
        for session_id in [key for key, value in self.sessions.items() if value is kept]:
            del self.sessions[session_id]

    def _leave(self, peer: socket.socket) -> None:
        with self._lock:
            for session_id, kept in list(self.sessions.items()):
                if kept.holder is peer:
                    kept.holder = None
                    if self.fault == "forgets":
                        del self.sessions[session_id]


def _have(hello: Hello) -> int:
    """Of how many frames the client has the replies."""
    return hello.value if hello.kind is Control.RESUME else 0


@contextmanager
def session_server(fault: str = "", limit: int = MAX_AMOUNT) -> Iterator[SessionServer]:
    """One for the block."""
    server = SessionServer(fault, limit)
    try:
        yield server
    finally:
        server.close()


if __name__ == "__main__":
    served = SessionServer(sys.argv[1] if len(sys.argv) > 1 else "")
    print(served.address, flush=True)
    threading.Event().wait()
