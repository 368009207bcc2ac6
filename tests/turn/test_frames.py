"""The kernel in C says of frames what protocol.py says, and writes the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh64_digest

from kit.engine import compiled
from protocol import (
    MAX_AMOUNT,
    MAX_UNREAD_FRAMES,
    REPLY_SIZE,
    REQUEST_SIZE,
    TABLE_SIZE,
    TOTAL_MASK,
    BadFrame,
    Batch,
    Decoder,
    encode_frame,
)

PROPERTY = settings(deadline=None)
BLOCK = 64  # so many frames are verified at once

VECTORS = {
    0: "0000000000000000 633457081244afec",
    1: "0000000000000001 b7b41276360564d4",
    10: "000000000000000a 4b48550ea3b07f17",
    123: "000000000000007b 3c697d223fa7e885",
    7016996765293437281: "6161616161616161 588f55d90f147231",
    2**63: "8000000000000000 3f4a8fcea23d52a3",
    2**64 - 1: "ffffffffffffffff 8d1f8f6d8dfa7c47",
}

# Where the way of verifying changes, and where a text gets longer.
EDGES = sorted(
    {0, TABLE_SIZE - 1, TABLE_SIZE, 10**8 - 1, 10**16 - 1, 10**16, 2**63 - 1, 2**63, MAX_AMOUNT}
    | {10**digits - 1 for digits in range(1, 20)}
    | {10**digits for digits in range(20)}
)
BY_LENGTH = st.integers(1, 20).flatmap(
    lambda digits: st.integers(10 ** (digits - 1), min(10**digits - 1, MAX_AMOUNT))
)
AMOUNTS = st.one_of(st.integers(0, 100), st.sampled_from(EDGES), BY_LENGTH)
BATCHES = st.one_of(
    st.lists(AMOUNTS, max_size=40),
    # Several blocks, of few amounts or one.
    st.builds(
        lambda amounts, count: (amounts * count)[:count],
        st.lists(AMOUNTS, min_size=1, max_size=20),
        st.integers(BLOCK - 2, 3 * BLOCK),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """Everything that is said of the frames of one read."""

    amounts: Sequence[int]
    sum: int
    replies: bytes
    refusal: str


class Kernel:
    """The functions of frames.h, for bytes."""

    def __init__(self, ffi: Any, lib: Any) -> None:
        self.ffi, self.lib = ffi, lib
        self.refusals = {
            lib.FRAME_GOOD: "",
            lib.FRAME_CHECKSUM: "checksum",
            lib.FRAME_LIMIT: "limit",
        }

    def outcome(
        self, data: bytes, before: int = 0, limit: int = MAX_AMOUNT, shift: int = 0
    ) -> Outcome:
        """What is said of frames that begin `shift` bytes into a buffer, which ends with them."""
        count = len(data) // REQUEST_SIZE
        buffer = self.ffi.new("uint8_t[]", bytes(shift) + data)
        amounts = self.ffi.new("uint64_t[]", count)
        batch = self.lib.frames_verify(buffer + shift, count, limit, amounts)
        replies = self.replies(batch, amounts, before)
        shown = list(amounts[0 : batch.count])
        if batch.uniform:
            shown = [amounts[0]] * batch.count
        return Outcome(shown, batch.sum, replies, self.refusals[batch.refusal])

    def replies(self, batch: Any, amounts: Any, before: int) -> bytes:
        replies = self.ffi.new("uint8_t[]", batch.count * REPLY_SIZE)
        self.lib.totals_write(self.ffi.addressof(batch), amounts, before, replies)
        return bytes(self.ffi.buffer(replies))

    def frame(self, amount: int) -> bytes:
        frame = self.ffi.new("uint8_t[]", REQUEST_SIZE)
        self.lib.frame_write(amount, frame)
        return bytes(self.ffi.buffer(frame))


def expected(data: bytes, before: int = 0, limit: int = MAX_AMOUNT) -> Outcome:
    """The same by protocol.py."""
    refusal = ""
    try:
        batch: Batch = Decoder(limit).decode(data)[0]
    except BadFrame as bad:
        batch, refusal = bad.batch, bad.reason
    return Outcome(list(batch.amounts), batch.sum() & TOTAL_MASK, batch.replies(before), refusal)


def frames_of(amounts: Sequence[int]) -> bytes:
    return b"".join(map(encode_frame, amounts))


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    library = compiled()
    return Kernel(library.ffi, library.lib)


@pytest.mark.parametrize(("amount", "frame"), VECTORS.items())
def test_a_vector_is_written_and_verified(kernel: Kernel, amount: int, frame: str) -> None:
    data = bytes.fromhex(frame)
    assert kernel.frame(amount) == data
    assert kernel.outcome(data) == Outcome([amount], amount, data[:8], "")


@pytest.mark.parametrize("amount", EDGES)
def test_a_frame_at_every_edge_is_that_of_protocol_py(kernel: Kernel, amount: int) -> None:
    data = encode_frame(amount)
    assert kernel.frame(amount) == data
    for frames in (data, data * 3, data + encode_frame(3)):
        assert kernel.outcome(frames) == expected(frames)


def test_every_amount_of_the_table_has_its_own_checksum(kernel: Kernel) -> None:
    amounts = range(TABLE_SIZE + 1)
    assert [kernel.frame(amount) for amount in amounts] == list(map(encode_frame, amounts))


@given(amount=BY_LENGTH)
@PROPERTY
def test_a_text_of_any_length_has_the_checksum_of_xxhash(kernel: Kernel, amount: int) -> None:
    checksum = xxh64_digest(str(amount).encode())
    assert kernel.frame(amount) == amount.to_bytes(8, "big") + checksum
    assert kernel.outcome(kernel.frame(amount)).amounts == [amount]


@given(amounts=BATCHES, before=st.integers(0, TOTAL_MASK), shift=st.integers(0, 15))
@PROPERTY
def test_good_frames_are_what_protocol_py_says_wherever_they_begin(
    kernel: Kernel, amounts: list[int], before: int, shift: int
) -> None:
    data = frames_of(amounts)
    said = kernel.outcome(data, before, shift=shift)
    assert said == expected(data, before)
    assert said.amounts == amounts


@given(
    amounts=BATCHES.filter(len),
    bad=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=3),
    limit=st.one_of(st.just(MAX_AMOUNT), AMOUNTS),
)
@PROPERTY
def test_the_same_frame_is_refused_for_the_same_reason(
    kernel: Kernel, amounts: list[int], bad: list[tuple[float, int]], limit: int
) -> None:
    data = bytearray(frames_of(amounts))
    for place, change in bad:
        data[int(place * len(data))] ^= change
    assert kernel.outcome(bytes(data), 7, limit) == expected(bytes(data), 7, limit)


@pytest.mark.parametrize(
    "amounts",
    [[1], [1, 2], [0, TABLE_SIZE - 1], [1, TABLE_SIZE], [10**18, 10**19], [1, 2**64 - 1]],
)
@pytest.mark.parametrize("place", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 199])
def test_a_bad_frame_at_any_place_of_several_blocks_ends_the_batch_there(
    kernel: Kernel, amounts: list[int], place: int
) -> None:
    good = (amounts * 200)[:200]
    data = bytearray(frames_of(good))
    data[place * REQUEST_SIZE + 15] ^= 1
    said = kernel.outcome(bytes(data))
    assert (said.amounts, said.refusal) == (good[:place], "checksum")
    assert said == expected(bytes(data))


def test_a_wrong_checksum_is_a_reason_before_the_limit(kernel: Kernel) -> None:
    above, wrong = encode_frame(11), b"\xff" * 16
    assert kernel.outcome(above, limit=10).refusal == "limit"
    assert kernel.outcome(wrong, limit=10).refusal == "checksum"
    assert kernel.outcome(encode_frame(1) + above + wrong, limit=10).refusal == "limit"
    assert kernel.outcome(encode_frame(1) + wrong + above, limit=10).refusal == "checksum"


def test_no_frames_are_an_empty_batch(kernel: Kernel) -> None:
    assert kernel.outcome(b"") == Outcome([], 0, b"", "")


@pytest.mark.parametrize("other", [[], [0], [2**63]])
def test_a_sum_and_totals_beyond_2_to_the_64_wrap(kernel: Kernel, other: list[int]) -> None:
    amounts = [2**64 - 1] * MAX_UNREAD_FRAMES + other
    said = kernel.outcome(frames_of(amounts), before=5)
    totals = [total & TOTAL_MASK for total in accumulate(amounts, initial=5)][1:]
    assert said.sum == sum(amounts) & TOTAL_MASK
    assert said.replies == b"".join(total.to_bytes(8, "big") for total in totals)


@pytest.mark.parametrize("amounts", [[3] * 200, list(range(200))])
def test_only_frames_that_are_alike_are_a_uniform_batch_and_then_one_amount_is_written(
    kernel: Kernel, amounts: list[int]
) -> None:
    untouched = 12345
    written = kernel.ffi.new("uint64_t[]", [untouched] * len(amounts))
    batch = kernel.lib.frames_verify(frames_of(amounts), len(amounts), MAX_AMOUNT, written)
    alike = len(set(amounts)) == 1
    assert batch.uniform == alike
    assert list(written) == ([3] + [untouched] * 199 if alike else amounts)


@pytest.mark.parametrize("amounts", [[3] * 200, list(range(200))])
def test_replies_may_take_the_place_of_the_amounts(kernel: Kernel, amounts: list[int]) -> None:
    data = frames_of(amounts)
    place = kernel.ffi.new("uint64_t[]", len(amounts))
    batch = kernel.lib.frames_verify(data, len(amounts), MAX_AMOUNT, place)
    apart = kernel.replies(batch, place, 9)
    replies = kernel.ffi.cast("uint8_t *", place)
    kernel.lib.totals_write(kernel.ffi.addressof(batch), place, 9, replies)
    assert bytes(kernel.ffi.buffer(place)) == apart == expected(data, 9).replies
