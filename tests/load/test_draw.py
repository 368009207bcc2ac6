"""AmountRange and the frames that carry them."""

from __future__ import annotations

import pytest

from counter.load.draw import Draw, split_batch
from counter.options.client import ClientSettings
from counter.options.values import AmountRange
from protocol import DEEP_FRAMES, Batch, Decoder, UniformBatch


@pytest.mark.parametrize("pipeline", [1, DEEP_FRAMES])
@pytest.mark.parametrize(
    "amounts", [AmountRange(7, 7), AmountRange(0, 3), AmountRange(2**64 - 2, 2**64 - 1)]
)
@pytest.mark.parametrize("count", [1, 2, 200])
def test_the_frames_carry_what_was_drawn(amounts: AmountRange, pipeline: int, count: int) -> None:
    draw = Draw(ClientSettings(amount=amounts, pipeline=pipeline))
    batch = draw.batch(count)
    decoded, rest = Decoder().decode(draw.frames(batch))
    assert rest == b""
    assert list(decoded.amounts) == list(batch.amounts)
    assert len(batch) == count
    assert set(batch.amounts) <= set(range(amounts.low, amounts.high + 1))


def test_one_request_of_the_usual_amount_is_always_the_same_batch() -> None:
    draw = Draw(ClientSettings(amount=AmountRange(7, 7)))
    assert draw.batch(1) is draw.lone
    assert Draw(ClientSettings(amount=AmountRange(7, 8))).batch(1) is not draw.lone


@pytest.mark.parametrize("batch", [UniformBatch(5, 4), Batch([1, 2, 3, 4])])
def test_a_batch_is_split_where_its_replies_were(batch: Batch) -> None:
    first, later = split_batch(batch, 3)
    assert [*first.amounts, *later.amounts] == list(batch.amounts)
    assert (len(first), len(later), type(first)) == (3, 1, type(batch))
