"""Deep batches, verified and summed with NumPy; equal to protocol.py, frame for frame.

Pure like protocol.py, and nothing but a faster way to the same results: what is refused, at which
frame and why, is protocol.py's to say. A read with few frames is left to it as well, because
calling NumPy costs more than it saves there.

Importing this module imports NumPy, which starts threads: never in a process that forks.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from protocol import (
    DEEP_FRAMES,
    MAX_AMOUNT,
    REQUEST_SIZE,
    BadFrame,
    Batch,
    Decoder,
    UniformBatch,
    checksums,
)

Words = NDArray[np.uint64]

# Amounts below this are compared with a table of their checksums (512 KiB), 3 ns a frame; larger
# ones are hashed.
TABLE_SIZE: Final = 65536

# So many amounts of one length are hashed together; fewer one by one, at 250 ns each.
TOGETHER_FROM: Final = 512

_PRIME_1, _PRIME_2, _PRIME_3, _PRIME_4, _PRIME_5 = (
    np.uint64(prime)
    for prime in (
        0x9E3779B185EBCA87,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x85EBCA77C2B2AE63,
        0x27D4EB2F165667C5,
    )
)
_DIGITS: Final = 20  # of the longest amount


class VectorBatch(Batch):
    """A Batch whose amounts are an array, none of them above `largest`."""

    __slots__ = ("_array", "_largest", "_steps")

    def __init__(self, array: Words, largest: int) -> None:
        self._array = array
        self._largest = largest
        self._steps = array.cumsum()  # modulo 2^64, as replies are

    @property
    def amounts(self) -> list[int]:  # type: ignore[override]
        amounts: list[int] = self._array.tolist()
        return amounts

    def __len__(self) -> int:
        return len(self._array)

    def sum(self) -> int:
        if not len(self._steps):
            return 0
        total = int(self._steps[-1])
        if self._largest * len(self._array) > MAX_AMOUNT:
            # Each step below its own amount passed 2^64. Finding them costs 1 us of 96 frames and
            # 2 us of 4,096; the bound, which spares amounts that are not huge the search, 20 ns.
            total += int(np.count_nonzero(self._steps < self._array)) << 64
        return total

    def replies(self, before: int) -> bytes:
        totals = self._steps + np.uint64(before)
        return totals.byteswap(inplace=True).tobytes()


class VectorUniformBatch(UniformBatch):
    """A deep UniformBatch."""

    __slots__ = ()

    def replies(self, before: int) -> bytes:
        totals = np.arange(1, self.count + 1, dtype=np.uint64)
        totals *= np.uint64(self.amount)
        totals += np.uint64(before)
        return totals.byteswap(inplace=True).tobytes()


class VectorDecoder(Decoder):
    """A Decoder that takes deep batches at once."""

    def __init__(self, max_amount: int = MAX_AMOUNT) -> None:
        super().__init__(max_amount)
        self._table = _hashed(np.arange(TABLE_SIZE, dtype=np.uint64))

    def uniform(self, amount: int, count: int) -> Batch:
        batch = UniformBatch if count < DEEP_FRAMES else VectorUniformBatch
        return batch(amount, count)

    def decode_mixed(self, data: bytes) -> Batch:
        if len(data) < DEEP_FRAMES * REQUEST_SIZE:
            return super().decode_mixed(data)
        words = np.frombuffer(data, np.uint64)
        amounts, given = words[::2].byteswap(), words[1::2]
        largest = int(amounts.max())
        if largest < TABLE_SIZE:
            good = self._table.take(amounts.view(np.int64)) == given
        else:
            good = self._table.take(np.minimum(amounts, TABLE_SIZE - 1).view(np.int64)) == given
            large = np.flatnonzero(amounts >= TABLE_SIZE)
            good[large] = _hashed(amounts[large]) == given[large]
        if largest > self.max_amount:
            good &= amounts <= self.max_amount
        if not good.all():
            raise self._first_bad(data, amounts, int(good.argmin()))
        return VectorBatch(amounts, largest)

    def _first_bad(self, data: bytes, amounts: Words, index: int) -> BadFrame:
        """What the plain decoder says of the frame that is refused."""
        frame = data[index * REQUEST_SIZE : (index + 1) * REQUEST_SIZE]
        try:
            self.verify(frame)
        except BadFrame as bad:
            bad.batch = VectorBatch(amounts[:index], self.max_amount)
            return bad
        raise AssertionError(f"frame {frame.hex()} is refused in a batch and accepted alone")


def _hashed(amounts: Words) -> Words:
    """The checksums of amounts, in the byte order that frames have."""
    if len(amounts) < TOGETHER_FROM:
        return _hashed_singly(amounts)
    text = _decimal_text(amounts)
    lengths = _DIGITS - (text != ord("0")).argmax(axis=1)
    lengths[amounts == 0] = 1
    result = np.empty(len(amounts), np.uint64)
    for length, count in enumerate(np.bincount(lengths)):
        if count:
            chosen = np.flatnonzero(lengths == length)
            if count < TOGETHER_FROM:
                result[chosen] = _hashed_singly(amounts[chosen])
            else:
                result[chosen] = _xxh64(np.ascontiguousarray(text[chosen, _DIGITS - length :]))
    return result


def _hashed_singly(amounts: Words) -> Words:
    return np.frombuffer(b"".join(checksums(amounts.tolist())), np.uint64)


def _decimal_text(amounts: Words) -> NDArray[np.uint8]:
    """The amounts as ASCII, one a row, filled up with zeros from the left to 20 digits."""
    text = np.empty((len(amounts), _DIGITS // 4), np.uint32)
    rest = amounts
    for column in range(_DIGITS // 4 - 1, -1, -1):
        above = rest // np.uint64(10_000)  # numpy divides by a constant fast, in divmod it does not
        text[:, column] = _FOUR_DIGITS[rest - above * np.uint64(10_000)]
        rest = above
    return text.view(np.uint8)


_FOUR_DIGITS: Final[NDArray[np.uint32]] = np.frombuffer(
    b"".join(b"%04d" % number for number in range(10_000)), np.uint32
)


def _xxh64(text: NDArray[np.uint8]) -> Words:
    """XXH64 with seed 0 of each row, after its specification for inputs shorter than 32 bytes.

    All rows have one length. In network order, as frames have it.
    """
    rows, length = text.shape
    result: Any = np.full(rows, _PRIME_5 + np.uint64(length))
    at = 0
    while at + 8 <= length:
        result ^= _round(_lanes(text, at, np.uint64))
        result = _rotate(result, 27) * _PRIME_1 + _PRIME_4
        at += 8
    if at + 4 <= length:
        result ^= _lanes(text, at, np.uint32).astype(np.uint64) * _PRIME_1
        result = _rotate(result, 23) * _PRIME_2 + _PRIME_3
        at += 4
    for column in range(at, length):
        result ^= text[:, column].astype(np.uint64) * _PRIME_5
        result = _rotate(result, 11) * _PRIME_1
    result ^= result >> np.uint64(33)
    result *= _PRIME_2
    result ^= result >> np.uint64(29)
    result *= _PRIME_3
    result ^= result >> np.uint64(32)
    return result.byteswap()  # type: ignore[no-any-return]


def _lanes(text: NDArray[np.uint8], at: int, kind: Any) -> Any:
    """One little-endian word of each row, from byte `at` on."""
    size = np.dtype(kind).itemsize
    return np.ascontiguousarray(text[:, at : at + size]).view(kind)[:, 0]


def _round(lane: Any) -> Any:
    return _rotate(lane * _PRIME_2, 31) * _PRIME_1


def _rotate(words: Any, bits: int) -> Any:
    return (words << np.uint64(bits)) | (words >> np.uint64(64 - bits))
