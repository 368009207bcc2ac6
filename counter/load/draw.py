"""What requests ask to add: the amounts that are drawn for them, and the frames that carry those.

Pure but for chance: no socket, no clock.
"""

from __future__ import annotations

import random

from counter.options.client import ClientSettings
from protocol import DEEP_FRAMES, Batch, UniformBatch, encode_frame


class Draw:
    """Draws the amounts of one process, uniform over the range that the settings name.

    `amount` is the usual one, the lowest; `lone` is the batch of a single request of it, always
    the same object where all amounts are alike, and `lone_frame` its frame.
    """

    def __init__(self, settings: ClientSettings) -> None:
        self._low, self._high = settings.amount.low, settings.amount.high
        self.amount = self._low
        self.lone: Batch = UniformBatch(self._low, 1)
        self.lone_frame = encode_frame(self._low)
        self._uniform = _deep_batch() if settings.pipeline >= DEEP_FRAMES else UniformBatch
        self._random = random.Random()

    def batch(self, count: int) -> Batch:
        """The amounts of the next `count` requests."""
        if self._low == self._high:
            return self.lone if count == 1 else self._uniform(self._low, count)
        draw, low, high = self._random.randint, self._low, self._high
        return Batch([draw(low, high) for _ in range(count)])

    def frames(self, batch: Batch) -> bytes:
        """The frames that carry these amounts, joined."""
        if batch is self.lone:
            return self.lone_frame
        if isinstance(batch, UniformBatch):
            return encode_frame(batch.amount) * batch.count
        return b"".join(map(encode_frame, batch.amounts))


def split_batch(batch: Batch, count: int) -> tuple[Batch, Batch]:
    """The first `count` frames of a batch, and those behind them."""
    if isinstance(batch, UniformBatch):
        kind = type(batch)
        return kind(batch.amount, count), kind(batch.amount, batch.count - count)
    return Batch(batch.amounts[:count]), Batch(batch.amounts[count:])


def _deep_batch() -> type[UniformBatch]:
    """The batch of many frames alike; imports NumPy, which small runs do not need."""
    from counter.turn.vector import VectorUniformBatch

    return VectorUniformBatch
