"""The engine in Python: what turn.c does, on the same epoll, for machines without a compiler.

A peer that waits for each reply sends one whole frame at a time. That case is written out in
receive() and answer(): attributes and calls cost as much as the rest of it.
"""

from __future__ import annotations

import _socket
import time
import traceback
from abc import ABC, abstractmethod
from itertools import repeat
from typing import Final

from counter.turn.engine import (
    HELLO_ROOM,
    TURN_PARTS,
    Engine,
    Interest,
    KeptTurn,
    Kind,
    Share,
    Turn,
)
from protocol import (
    MAX_UNREAD_FRAMES,
    REPLY_SIZE,
    REQUEST_SIZE,
    TOTAL_MASK,
    BadFrame,
    Batch,
    Decoder,
    encode_total,
)

# A buffer of less than 480 bytes comes from Python's own allocator, 0.2 us sooner than one from the
# heap. A read that fills it is followed by large ones for as long as there is much to read.
SMALL_READ: Final = 464
LARGE_READ: Final = 65536

_EPOLLIN: Final = 0x001
_GONE: Final = 0x008 | 0x010  # EPOLLERR, EPOLLHUP
_LOOKED_AT: Final = 0  # one that is read whether it is ready or not
_REFUSALS: Final = {"checksum": Kind.CHECKSUM, "limit": Kind.LIMIT}


class Asker(ABC):
    """Who asks in a turn of Python's: a connection until it is forgotten, or what it asked void."""

    __slots__ = ("fd", "is_live", "owed", "tag", "tells")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.is_live = True
        self.owed = 0  # frames that wait for a store
        self.tag = 0  # that it bears; 0: none
        self.tells = False  # that nothing is owed, once that is so

    @abstractmethod
    def reply(self, data: bytes) -> None:
        """Sends replies, as far as the kernel takes them."""

    @abstractmethod
    def tell(self, kind: Kind, data: bytes = b"") -> None:
        """Has the connection decide something."""

    def owe(self, frames: int) -> None:
        """So many frames are owed from now on."""
        self.owed += frames
        if self.owed >= MAX_UNREAD_FRAMES and not self.tells:
            self.tells = True
            self.tell(Kind.FULL)

    def settle(self, frames: int) -> None:
        """So many frames are owed no longer."""
        self.owed -= frames
        if not self.owed and self.tells:
            self.tells = False
            self.tell(Kind.ANSWERED)


Part = tuple[Asker, int, Batch | None]
"""Who asks, the sum, and the batch that it is the sum of, unless it is a single frame."""


class BatchTurn(KeptTurn):
    """A turn of batches that Python has decoded."""

    __slots__ = ("amount", "frames", "is_kept", "parts", "reads", "tagged")

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self.is_kept = False
        self._count()

    def _count(self) -> None:
        self.amount = sum([amount for _, amount, _ in self.parts])
        self.frames = sum([1 if batch is None else len(batch) for _, _, batch in self.parts])
        self.reads = len(self.parts)
        self.tagged = sum([asker.tag > 0 for asker, _, _ in self.parts])

    def shares(self) -> list[Share]:
        return self.shares_behind(0)

    def shares_behind(self, offset: int) -> list[Share]:
        """The shares of its parts, in a turn that has amounts of such a sum before them."""
        shares = []
        for asker, amount, batch in self.parts:
            offset = (offset + amount) & TOTAL_MASK
            if asker.tag:
                shares.append((asker.tag, 1 if batch is None else len(batch), offset))
        return shares

    def answer(self, before: int) -> None:
        for asker, amount, batch in self.parts:
            after = (before + amount) & TOTAL_MASK
            if asker.is_live:
                try:
                    asker.reply(encode_total(after) if batch is None else batch.replies(before))
                except Exception:
                    # Left open it would be one reply behind for ever.
                    asker.tell(Kind.FAILED, traceback.format_exc().encode())
                if self.is_kept:
                    asker.settle(1 if batch is None else len(batch))
            before = after

    def purge(self) -> None:
        live = [part for part in self.parts if part[0].is_live]
        if len(live) < len(self.parts):
            self.parts = live
            self._count()

    def live_frames(self) -> int:
        return sum(
            [1 if batch is None else len(batch) for asker, _, batch in self.parts if asker.is_live]
        )

    def keep(self) -> KeptTurn:
        self.is_kept = True
        for asker, _, batch in self.parts:
            asker.owe(1 if batch is None else len(batch))
        return self

    def askers(self) -> list[int]:
        return [asker.fd for asker, _, _ in self.parts if asker.is_live]


_PeerPart = tuple["_Peer", int, Batch | None]


class _Peer(Asker):
    """One connection, until what it asked is void."""

    __slots__ = (
        "engine",
        "holds",
        "is_fresh",
        "is_plain",
        "is_served",
        "left",
        "read_at",
        "read_size",
        "rest",
        "sock",
    )

    def __init__(self, engine: PlainEngine, sock: _socket.socket, is_served: bool) -> None:
        super().__init__(sock.fileno())
        self.engine = engine
        self.sock = sock
        self.is_served = is_served
        self.holds = False
        self.is_fresh = True  # none of its frames was taken or refused yet
        self.is_plain = False  # not fresh, and nothing is to be seen to but what it asks
        self.rest = b""  # the bytes of an incomplete frame
        self.left = -1
        self.read_size = SMALL_READ
        self.read_at = 0.0

    def tell(self, kind: Kind, data: bytes = b"") -> None:
        self.engine.events.append((kind, self.fd, data))

    def reply(self, data: bytes) -> None:
        sent = 0
        if not self.holds:
            try:
                sent = self.sock.send(data)
            except BlockingIOError:
                pass
            except OSError:
                self.tell(Kind.RESET)
                return
        if sent < len(data):
            self.tell_unsent(data[sent:])

    def note_plain(self) -> None:
        """Notes whether all there is to it is what it asks."""
        self.is_plain = not (self.is_fresh or self.rest or self.left >= 0 or self.tag)

    def tell_unsent(self, data: bytes) -> None:
        """Has replies kept that the kernel did not take, and all that follow them."""
        self.holds = True
        self.tell(Kind.UNSENT, data)


class _PeerTurn(BatchTurn):
    """What peers of this engine ask, answered before anything else is read. Those that ask with one
    known frame stand apart, in two lists: a tuple for each would cost 0.1 us."""

    __slots__ = ("amounts", "lone")

    parts: list[_PeerPart]  # type: ignore[assignment]

    def __init__(self, lone: list[_Peer], amounts: list[int], parts: list[_PeerPart]) -> None:
        self.lone = lone
        self.amounts = amounts
        BatchTurn.__init__(self, parts)  # type: ignore[arg-type]

    def _count(self) -> None:
        if self.parts:
            BatchTurn._count(self)
        else:  # mostly; counting nothing would cost 0.3 us
            self.amount = self.frames = self.reads = self.tagged = 0
        self.amount += sum(self.amounts)
        self.frames += len(self.lone)
        self.reads += len(self.lone)

    def shares(self) -> list[Share]:
        return self.shares_behind(sum(self.amounts))

    def keep(self) -> KeptTurn:
        self.parts += zip(self.lone, self.amounts, repeat(None))
        self.lone, self.amounts = [], []
        return BatchTurn.keep(self)

    def answer(self, before: int) -> None:
        if self.is_kept:
            BatchTurn.answer(self, before)
            return
        for peer, amount in zip(self.lone, self.amounts, strict=True):
            before = (before + amount) & TOTAL_MASK
            reply = encode_total(before)
            try:
                sent = 0 if peer.holds else peer.sock.send(reply)
                if sent != REPLY_SIZE:
                    peer.tell_unsent(reply[sent:])
            except BlockingIOError:
                peer.tell_unsent(reply)
            except OSError:
                peer.tell(Kind.RESET)
        for peer, amount, batch in self.parts:
            try:
                peer.reply(
                    encode_total(before + amount) if batch is None else batch.replies(before)
                )
            except Exception:
                # Left open it would be one reply behind for ever.
                peer.tell(Kind.FAILED, traceback.format_exc().encode())
            before = (before + amount) & TOTAL_MASK


class PlainEngine(Engine):
    """The engine in Python, on a decoder of frames."""

    name = "plain"

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self._decoder = decoder
        self._peers: dict[int, _Peer] = {}
        self._is_quiet = True

    def open(self, sock: _socket.socket, interest: Interest) -> None:
        peer = _Peer(self, sock, interest.is_served)
        self._epoll.register(peer.fd, interest.mask)
        self._peers[peer.fd] = peer

    def watch(self, fd: int, interest: Interest) -> None:
        self._peers[fd].is_served = interest.is_served
        self._epoll.modify(fd, interest.mask)

    def forget(self, fd: int) -> None:
        self._peers.pop(fd).is_live = False

    def void(self, fd: int) -> None:
        old = self._peers[fd]
        old.is_live = False
        new = self._peers[fd] = _Peer(self, old.sock, old.is_served)
        new.rest, new.holds, new.left, new.read_at = old.rest, old.holds, old.left, old.read_at
        new.read_size, new.tag = old.read_size, old.tag
        new.is_fresh, new.is_plain = old.is_fresh, old.is_plain

    def limit(self, fd: int, count: int) -> None:
        peer = self._peers[fd]
        peer.left, peer.read_size = count, min(count, LARGE_READ)
        peer.note_plain()

    def join(self, fd: int, tag: int) -> None:
        peer = self._peers[fd]
        peer.tag = tag
        peer.note_plain()

    def hold(self, fd: int, holds: bool) -> None:
        self._peers[fd].holds = holds

    def tell_answered(self, fd: int) -> None:
        self._peers[fd].tells = True

    def owed(self, fd: int) -> int:
        return self._peers[fd].owed

    def held(self, fd: int) -> int:
        return len(self._peers[fd].rest)

    def read_at(self, fd: int) -> float:
        return self._peers[fd].read_at

    def is_quiet(self) -> bool:
        return self._is_quiet

    def receive(self, fd: int = -1) -> Turn | None:
        ready = self._epoll.poll(0, TURN_PARTS) if fd < 0 else [(fd, _LOOKED_AT)]
        self._is_quiet = not ready
        now = time.monotonic()
        peers, known = self._peers, self._decoder.table.get
        lone: list[_Peer] = []
        amounts: list[int] = []
        parts: list[_PeerPart] = []
        for fd, mask in ready:
            peer = peers[fd]
            if (mask != _EPOLLIN or not peer.is_served) and mask != _LOOKED_AT:
                # A peer that reset is not counted any more, whatever it left in the socket.
                peer.tell(Kind.RESET if mask & _GONE else Kind.READY)
                continue
            try:
                data = peer.sock.recv(peer.read_size)
                peer.read_at = now
                amount = known(data)
                if amount is not None and peer.is_plain:
                    lone.append(peer)
                    amounts.append(amount)
                else:
                    self._take(peer, data, parts)
            except BlockingIOError:
                pass
            except OSError:
                peer.tell(Kind.RESET)
            except Exception:
                peer.tell(Kind.FAILED, traceback.format_exc().encode())
        return _PeerTurn(lone, amounts, parts) if lone or parts else None

    def _take(self, peer: _Peer, data: bytes, parts: list[_PeerPart]) -> None:
        """Takes what was read, which is not just one frame that is known."""
        if not data:
            peer.tell(Kind.END)
            return
        if peer.left >= 0:
            peer.left -= len(data)
            peer.read_size = min(peer.left, LARGE_READ)
        else:
            peer.read_size = LARGE_READ if len(data) >= SMALL_READ else SMALL_READ
        refusal: tuple[Kind, bytes] | None = None
        had_begun, frames = bool(peer.rest), peer.rest + data
        try:
            batch, peer.rest = self._decoder.decode(frames)
        except BadFrame as bad:
            batch, peer.rest = bad.batch, b""
            at = len(batch) * REQUEST_SIZE
            refusal = _REFUSALS[bad.reason], frames[at : at + REQUEST_SIZE]
            # Whether it is a hello is not said here: it gets what stands behind it too.
            if peer.is_fresh and not batch and refusal[0] is Kind.CHECKSUM:
                refusal = Kind.HELLO, frames[:HELLO_ROOM]
        peer.is_fresh = peer.is_fresh and len(frames) < REQUEST_SIZE
        peer.note_plain()
        if batch:
            parts.append((peer, batch.sum(), batch))
        if peer.rest and (batch or not had_begun):
            peer.tell(Kind.BEGUN)
        elif had_begun and not peer.rest and (refusal is None or refusal[0] is not Kind.HELLO):
            peer.tell(Kind.COMPLETED)
        if refusal is not None:
            peer.tell(*refusal)
        if not peer.left:
            peer.tell(Kind.DRAINED)
