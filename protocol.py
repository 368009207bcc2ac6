"""The wire: frames to amounts, totals to replies, and how an address is written.

What lives here is pure: bytes in, values out. No socket, no gevent, no clock, and no knowledge of
which side is asking, so that server and client judge the same bytes by the same rules.

    request, 16 bytes                                    reply, 8 bytes
    offset 0   amount, uint64, big-endian                offset 0   total, uint64, big-endian
    offset 8   XXH64 (seed 0) of the amount's decimal
               ASCII text, big-endian

The checksum shows that the sender meant a number; it is not authentication. It covers the decimal
text and not the eight bytes, so that text sent to the port by mistake is refused.

Three outcomes of reading, in this order: whole frames are amounts, an incomplete frame is a value
(what is left over), a bad frame is an error that carries what was good before it.

A control frame has the same 16 bytes, and a checksum over `<kind>:<decimal>` instead: no frame that
asks to add anything is one. Three of them at the start of a connection are a hello, which makes it
a connection of a session (docs/protocol.md).
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import accumulate
from typing import Any, Final

from xxhash import xxh64_digest

REQUEST_SIZE: Final = 16
REPLY_SIZE: Final = 8
MAX_AMOUNT: Final = 2**64 - 1
TOTAL_MASK: Final = 2**64 - 1  # totals are arithmetic modulo 2^64: total & TOTAL_MASK

# Frames a client may have sent without reading any reply. Their 32 KiB of replies fit the kernel's
# default buffers, and their 64 KiB fit one read of the server: a client that keeps to it can never
# wait for a server that waits for it.
MAX_UNREAD_FRAMES: Final = 4096

# A session may leave so many frames unanswered at most: their totals are what its server keeps.
MAX_WINDOW: Final = MAX_UNREAD_FRAMES

HELLO_SIZE: Final = 3 * REQUEST_SIZE

# From so many frames in a read on NumPy is the faster way: at 96 frames of amount 1 both ways take
# 12 us, at 1,024 NumPy takes 20 us and the plain one 110 us.
DEEP_FRAMES: Final = 96

# Amounts below this are verified by looking their frame up (40 ns), the rest by hashing (250 ns).
# An entry costs 150 bytes in every serving process.
TABLE_SIZE: Final = 4096

# The longest run of frames split by one struct, a third of the time of slicing. A struct keeps 32
# bytes for each of its fields, so that the structs of all lengths to this one are 1 MB.
_SPLIT_FRAMES: Final = 256

_FRAME: Final = struct.Struct(">Q8s")
_TOTAL: Final = struct.Struct(">Q")
_RUN: Final = struct.Struct(">QQ")


class CounterError(Exception):
    """The root of every error that this project's wire and client library raise on purpose."""


class AmountError(CounterError, ValueError):
    """An amount that no frame can carry: the caller's mistake, nothing was sent."""


class AddressError(CounterError, ValueError):
    """Text that is no address: the caller's mistake, nothing was tried."""


class BadFrame(CounterError):
    """A frame that is refused, and with it all that stands behind it.

    `batch` holds the amounts of the frames before it, which count. `reason` is `checksum`, `limit`,
    `hello` or `answer`: a short word, fit for a label.
    """

    def __init__(self, reason: str, detail: str, batch: Batch | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.batch = Batch(()) if batch is None else batch

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, str(self), self.batch)


class Batch:
    """The verified amounts of all whole frames of one read, in the order of their frames.

    A batch is one addition: its sum is added once, and the total before that addition is enough
    to answer every frame in it.
    """

    __slots__ = ("amounts",)

    def __init__(self, amounts: Sequence[int]) -> None:
        self.amounts = amounts

    def __len__(self) -> int:
        """How many frames, and so how many replies."""
        return len(self.amounts)

    def sum(self) -> int:
        """What to add; it may be 2^64 and above, to be taken modulo 2^64."""
        return sum(self.amounts)

    def replies(self, before: int) -> bytes:
        """The reply to every frame, joined: the totals after each, when `before` was the total."""
        totals = list(accumulate(self.amounts, initial=before))
        if totals[-1] > TOTAL_MASK:
            totals = [total & TOTAL_MASK for total in totals]
        return _reply_struct(len(totals) - 1).pack(*totals[1:])


class UniformBatch(Batch):
    """A Batch of one amount over and over: most counters count ones."""

    __slots__ = ("amount", "count")

    def __init__(self, amount: int, count: int) -> None:
        self.amount = amount
        self.count = count

    @property
    def amounts(self) -> Sequence[int]:  # type: ignore[override]
        return [self.amount] * self.count

    def __len__(self) -> int:
        return self.count

    def sum(self) -> int:
        return self.amount * self.count

    def replies(self, before: int) -> bytes:
        last = before + self.amount * self.count
        if last > TOTAL_MASK or not self.amount:
            return super().replies(before)
        totals = range(before + self.amount, last + 1, self.amount)
        return _reply_struct(self.count).pack(*totals)


class Decoder:
    """Turns what a peer sent into batches; one serves any number of connections.

    `max_amount` is the largest amount that is not refused. `table` gives the amount of a frame, for
    the frames of amounts below TABLE_SIZE. It is made once: nothing that a peer sends can grow or
    change it.
    """

    def __init__(self, max_amount: int = MAX_AMOUNT) -> None:
        self.max_amount = max_amount
        known = range(min(TABLE_SIZE, max_amount + 1))
        self.table: dict[bytes, int] = {encode_frame(amount): amount for amount in known}

    def decode(self, data: bytes) -> tuple[Batch, bytes]:
        """Gives back the batch of all whole frames in `data`, and the bytes left over (0 to 15).

        Raises BadFrame at the first frame that is refused.
        """
        left = len(data) % REQUEST_SIZE
        rest = b""
        if left:
            rest = data[-left:]
            data = data[:-left]
        if not data:
            return Batch(()), rest
        return self.decode_whole(data), rest

    def decode_whole(self, data: bytes) -> Batch:
        """The batch of one or more whole frames; BadFrame as decode() raises it."""
        frame = data[:REQUEST_SIZE]
        count = len(data) // REQUEST_SIZE
        # Comparing 1,024 frames takes 1 us; the end, looked at first, settles most that differ.
        if data.endswith(frame) and data == frame * count:
            amount = self.table.get(frame)
            return self.uniform(self.verify(frame) if amount is None else amount, count)
        return self.decode_mixed(data)

    def uniform(self, amount: int, count: int) -> Batch:
        """The batch of frames that are all alike."""
        return UniformBatch(amount, count)

    def decode_mixed(self, data: bytes) -> Batch:
        """The batch of whole frames, each looked up or verified."""
        try:
            return Batch([*map(self.table.__getitem__, _split(data))])
        except KeyError:
            return Batch(self._verify_all(data))

    def verify(self, frame: bytes) -> int:
        """The amount of one frame of 16 bytes; BadFrame, with an empty batch, if it is bad."""
        amount, checksum = _FRAME.unpack(frame)
        if checksum != xxh64_digest(b"%d" % amount):
            raise BadFrame("checksum", f"frame {frame.hex()}: the checksum is not that of {amount}")
        if amount > self.max_amount:
            raise BadFrame("limit", f"amount {amount} is above the limit of {self.max_amount}")
        return int(amount)

    def _verify_all(self, data: bytes) -> Sequence[int]:
        """The amounts of whole frames, each by its hash, in loops that run in C: a third of the
        time of verify() for each. BadFrame as decode() raises it.
        """
        words = struct.unpack(">" + "Q8s" * (len(data) // REQUEST_SIZE), data)
        amounts: tuple[int, ...] = words[::2]
        if words[1::2] != tuple(checksums(amounts)) or max(amounts) > self.max_amount:
            raise self._refusal(data)
        return amounts

    def _refusal(self, data: bytes) -> BadFrame:
        """Finds the first bad frame again, this time remembering what was good before it."""
        good: list[int] = []
        for frame in _split(data):
            try:
                good.append(self.verify(frame))
            except BadFrame as bad:
                bad.batch = Batch(good)
                return bad
        raise AssertionError("a frame was refused once and accepted the second time")


def checksums(amounts: Iterable[int]) -> Iterable[bytes]:
    """The checksum of each amount, as a frame carries it."""
    return map(xxh64_digest, map(b"%d".__mod__, amounts))


def encode_frame(amount: int) -> bytes:
    """The 16 bytes that ask to add `amount`; AmountError outside 0..2^64-1."""
    amount = operator.index(amount)
    if not 0 <= amount <= MAX_AMOUNT:
        raise AmountError(f"amount {amount} is outside 0..{MAX_AMOUNT} (2^64 - 1)")
    return _TOTAL.pack(amount) + xxh64_digest(b"%d" % amount)


class Control(Enum):
    """What a control frame says; its value is what the checksum covers in front of the number."""

    ID_HIGH = "id-high"  # the two halves of a session's id
    ID_LOW = "id-low"
    OPEN = "open"  # the window: frames that may be unanswered
    RESUME = "resume"  # so many frames whose replies the client has
    END = "end"  # the same; the session is over


def encode_control(kind: Control, value: int) -> bytes:
    """The 16 bytes of a control frame; its value is 0..2^64-1."""
    return _TOTAL.pack(value) + _control_checksum(kind, value)


def decode_control(frame: bytes) -> tuple[Control, int] | None:
    """What a frame of 16 bytes says, and its value; None where it is no control frame."""
    value, checksum = _FRAME.unpack(frame)
    for kind in Control:
        if checksum == _control_checksum(kind, value):
            return kind, int(value)
    return None


def _control_checksum(kind: Control, value: int) -> bytes:
    return xxh64_digest(b"%s:%d" % (kind.value.encode(), value))


@dataclass(frozen=True)
class Hello:
    """What a connection of a session begins with: its id of 128 bits, and what is wanted of it.

    `value` is the window where it is to be opened (OPEN), or the number of frames whose replies the
    client has where it is to be gone on with (RESUME).
    """

    session_id: int
    kind: Control
    value: int

    def encode(self) -> bytes:
        """Its 48 bytes."""
        high, low = divmod(self.session_id, 2**64)
        return b"".join(
            (
                encode_control(Control.ID_HIGH, high),
                encode_control(Control.ID_LOW, low),
                encode_control(self.kind, self.value),
            )
        )


_HELLO_KINDS: Final = ((Control.ID_HIGH,), (Control.ID_LOW,), (Control.OPEN, Control.RESUME))


def decode_hello(data: bytes) -> Hello | None:
    """The hello that `data` is; None where it is not whole and was right so far.

    BadFrame, with the reason `hello`, at its first frame that is wrong.
    """
    said: list[tuple[Control, int]] = []
    for at in range(min(len(data), HELLO_SIZE) // REQUEST_SIZE):
        frame = data[at * REQUEST_SIZE : (at + 1) * REQUEST_SIZE]
        control = decode_control(frame)
        wanted = _HELLO_KINDS[at]
        if control is None or control[0] not in wanted:
            names = " or ".join(kind.value for kind in wanted)
            raise BadFrame("hello", f"frame {frame.hex()}: a hello has {names} here")
        said.append(control)
    if len(data) > HELLO_SIZE:
        raise BadFrame("hello", "there is more behind the hello, which was not answered yet")
    if len(said) < len(_HELLO_KINDS):
        return None
    (_, high), (_, low), (kind, value) = said
    if kind is Control.OPEN and not 1 <= value <= MAX_WINDOW:
        raise BadFrame("hello", f"a window of {value} frames: 1 to {MAX_WINDOW} are possible")
    return Hello(high << 64 | low, kind, value)


class Refused(Enum):
    """Why a hello is not followed by a session; what is sent instead of `applied`, before FIN."""

    UNKNOWN = 2**64 - 1  # no such session
    NO_ROOM = 2**64 - 2  # for another one
    HELD = 2**64 - 3  # by another connection, and not given up in time


_REFUSALS: Final = frozenset(refused.value for refused in Refused)

Run = tuple[int, int]
"""The number of the last frame of a batch, and the total right after that frame."""


@dataclass(frozen=True)
class Answer:
    """What answers a hello: how many frames of the session are in the total, the largest amount
    that the server takes, and where those ended whose replies the client may not have."""

    applied: int
    limit: int
    runs: tuple[Run, ...] = ()

    def encode(self) -> bytes:
        """Its bytes."""
        return b"".join(
            (
                encode_total(self.applied),
                encode_total(self.limit),
                *(encode_total(word) for run in self.runs for word in run),
            )
        )


def decode_answer(data: bytes, have: int = 0) -> tuple[Answer | Refused | None, bytes]:
    """What answers a hello that said RESUME with `have`, or OPEN; and the bytes left over.

    None where it is not whole. BadFrame, with the reason `answer`, where no server says so.
    """
    if len(data) < REPLY_SIZE:
        return None, data
    (applied,) = _TOTAL.unpack(data[:REPLY_SIZE])
    if applied in _REFUSALS:
        return Refused(applied), data[REPLY_SIZE:]
    if len(data) < 2 * REPLY_SIZE:
        return None, data
    (limit,) = _TOTAL.unpack(data[REPLY_SIZE : 2 * REPLY_SIZE])
    runs: list[Run] = []
    last, at = have, 2 * REPLY_SIZE
    while last < applied:
        if len(data) < at + _RUN.size:
            return None, data
        run = _RUN.unpack_from(data, at)
        if not last < run[0] <= applied:
            raise BadFrame("answer", f"a run ends with frame {run[0]}, after {last} of {applied}")
        runs.append(run)
        last, at = run[0], at + _RUN.size
    return Answer(applied, limit, tuple(runs)), data[at:]


encode_total = _TOTAL.pack
"""The 8 bytes that answer one frame with a total of 0..2^64-1."""


def decode_totals(data: bytes) -> tuple[tuple[int, ...], bytes]:
    """Gives back the totals of all whole replies in `data`, and the bytes left over (0 to 7)."""
    count, left = divmod(len(data), REPLY_SIZE)
    if not left:
        return _reply_struct(count).unpack(data), b""
    return _reply_struct(count).unpack(data[:-left]), data[-left:]


def parse_address(text: str, default_host: str = "127.0.0.1") -> tuple[str, int]:
    """The host and port of `HOST:PORT`, `:PORT`, `PORT` or `[IPv6]:PORT`; AddressError otherwise.

    >>> parse_address("[::1]:8080")
    ('::1', 8080)
    """
    if "://" in text:
        raise AddressError(f"address {text!r}: write HOST:PORT, without a scheme")
    if text.strip().endswith("]"):
        raise AddressError(f"address {text!r}: the port is missing, as in [::1]:8080")
    host, colon, port = text.strip().rpartition(":")
    if not port or not (colon or port.isdecimal()):
        raise AddressError(f"address {text!r}: the port is missing; write HOST:PORT")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise AddressError(f"address {text!r}: write IPv6 in brackets, as [::1]:8080")
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) <= 65535):
        raise AddressError(f"address {text!r}: the port is not a number of 0 to 65535")
    return host or default_host, int(port)


def format_address(host: str, port: int) -> str:
    """`HOST:PORT` as parse_address reads it, with brackets around IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _split(data: bytes) -> Sequence[bytes]:
    """The frames of whole frames' bytes."""
    if len(data) <= _SPLIT_FRAMES * REQUEST_SIZE:
        return _split_struct(len(data) // REQUEST_SIZE).unpack(data)
    frames: list[bytes] = []
    for start in range(0, len(data), _SPLIT_FRAMES * REQUEST_SIZE):
        frames += _split(data[start : start + _SPLIT_FRAMES * REQUEST_SIZE])
    return frames


@lru_cache(maxsize=_SPLIT_FRAMES + 1)
def _split_struct(count: int) -> struct.Struct:
    return struct.Struct("16s" * count)


@lru_cache(maxsize=MAX_UNREAD_FRAMES + 1)
def _reply_struct(count: int) -> struct.Struct:
    return struct.Struct(f">{count}Q")
