"""The vector decoder gives what the plain one gives, frame for frame."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counter.turn.vector import (
    TABLE_SIZE,
    TOGETHER_FROM,
    VectorBatch,
    VectorDecoder,
    VectorUniformBatch,
    _hashed,
)
from protocol import (
    DEEP_FRAMES,
    MAX_AMOUNT,
    BadFrame,
    Batch,
    Decoder,
    UniformBatch,
    checksums,
    encode_frame,
)

PLAIN = Decoder()
VECTOR = VectorDecoder()

# Around every place where the way of verifying changes, and where a text gets longer.
EDGES = sorted(
    {0, 1, TABLE_SIZE - 1, TABLE_SIZE, TABLE_SIZE + 1, 2**32, 2**63, MAX_AMOUNT}
    | {10**digits - 1 for digits in range(1, 20)}
    | {10**digits for digits in range(1, 20)}
)
AMOUNTS = st.one_of(st.integers(0, 1000), st.sampled_from(EDGES), st.integers(0, MAX_AMOUNT))


def outcome(decoder: Decoder, data: bytes, before: int) -> tuple[object, ...]:
    """Everything that decoding says: amounts, sum, replies, what is left, and the refusal."""
    try:
        batch, rest = decoder.decode(data)
        refusal = ""
    except BadFrame as bad:
        batch, rest, refusal = bad.batch, b"", f"{bad.reason}: {bad}"
    return list(batch.amounts), len(batch), batch.sum(), batch.replies(before), rest, refusal


def deep(seed: int, amounts: list[int], count: int) -> list[int]:
    return random.Random(seed).choices(amounts, k=count)


@settings(deadline=None)
@given(
    amounts=st.lists(AMOUNTS, min_size=1, max_size=20),
    count=st.sampled_from([1, DEEP_FRAMES - 1, DEEP_FRAMES, DEEP_FRAMES + 1, 2 * TOGETHER_FROM]),
    seed=st.integers(0, 1000),
    before=st.integers(0, MAX_AMOUNT),
    tail=st.binary(max_size=15),
)
def test_both_ways_are_equal_for_mixed_amounts_that_wrap_around(
    amounts: list[int], count: int, seed: int, before: int, tail: bytes
) -> None:
    data = b"".join(map(encode_frame, deep(seed, amounts, count))) + tail
    assert outcome(VECTOR, data, before) == outcome(PLAIN, data, before)


@settings(deadline=None)
@given(
    amounts=st.lists(AMOUNTS, min_size=1, max_size=20),
    count=st.sampled_from([DEEP_FRAMES, 300, 2 * TOGETHER_FROM]),
    place=st.floats(0, 1, exclude_max=True),
    change=st.integers(1, 255),
    limit=st.one_of(st.just(MAX_AMOUNT), AMOUNTS),
)
def test_both_ways_refuse_the_same_frame_for_the_same_reason(
    amounts: list[int], count: int, place: float, change: int, limit: int
) -> None:
    data = bytearray(b"".join(map(encode_frame, deep(1, amounts, count))))
    data[int(place * len(data))] ^= change
    plain, vector = Decoder(limit), VECTOR if limit == MAX_AMOUNT else VectorDecoder(limit)
    assert outcome(vector, bytes(data), 7) == outcome(plain, bytes(data), 7)


@pytest.mark.parametrize("place", [0, 1, DEEP_FRAMES // 2, DEEP_FRAMES, 999])
@pytest.mark.parametrize("amount", [1, 2**40])
def test_a_bad_frame_at_any_place_of_a_deep_batch_ends_it_there(place: int, amount: int) -> None:
    data = encode_frame(amount) * place + b"c" * 16 + encode_frame(amount) * (999 - place)
    with pytest.raises(BadFrame) as caught:
        VECTOR.decode(data)
    assert caught.value.reason == "checksum"
    assert list(caught.value.batch.amounts) == [amount] * place


@pytest.mark.parametrize("amount", [1, 2**57, MAX_AMOUNT // DEEP_FRAMES, 2**63, MAX_AMOUNT])
def test_the_sum_of_a_deep_batch_is_whole_where_it_passes_2_to_the_64(amount: int) -> None:
    frames = encode_frame(amount) * 200 + encode_frame(0) * 200
    batch, _ = VECTOR.decode(frames)
    assert isinstance(batch, VectorBatch)
    assert batch.sum() == 200 * amount


@pytest.mark.parametrize("digits", range(1, 21))
def test_checksums_hashed_together_are_those_of_xxhash(digits: int) -> None:
    import numpy as np

    low, high = 10 ** (digits - 1) if digits > 1 else 0, min(10**digits - 1, MAX_AMOUNT)
    pick = random.Random(digits)
    amounts = [low, high, *(pick.randint(low, high) for _ in range(2 * TOGETHER_FROM))]
    assert _hashed(np.array(amounts, np.uint64)).tobytes() == b"".join(checksums(amounts))


def test_each_kind_of_read_takes_its_own_way() -> None:
    one, two = encode_frame(1), encode_frame(2)
    ways = {
        one * DEEP_FRAMES: VectorUniformBatch,
        one * (DEEP_FRAMES - 1): UniformBatch,
        one * (DEEP_FRAMES - 1) + two: VectorBatch,
        one * (DEEP_FRAMES - 2) + two: Batch,
    }
    for data, way in ways.items():
        assert type(VECTOR.decode(data)[0]) is way
