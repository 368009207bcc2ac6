"""What a run recorded, addition by addition, and what can be said of it: data, no judging.

Pure, and light to import: NumPy, which starts threads, is imported by what computes with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Words = NDArray[np.uint64]

PROVED: Final = "proved"
EXPLAINED: Final = "explained"
UNDECIDED: Final = "undecided"
IMPOSSIBLE: Final = "impossible"

LIMIT: Final = 2**64  # what sums to this and more comes back to totals it had before


@dataclass(frozen=True)
class Verdict:
    """What a history shows: one of the four words, the reason, and lines of evidence."""

    word: str
    reason: str
    evidence: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{'proved exact' if self.word == PROVED else self.word}: {self.reason}"


@dataclass(frozen=True)
class History:
    """What a run recorded. Times in ns of one clock; arrays of uint64, one element an addition.

    An addition counts between `sent` and `answered`, those `lost` (never answered) after they were
    sent, or never. `before` and `after` were read before the first addition was sent and after the
    last answer, None where that failed. `name` says whose the addition of an index is.
    """

    sent: Words
    answered: Words
    amount: Words
    total: Words
    lost_sent: Words
    lost_amount: Words
    before: int | None
    after: int | None
    name: Callable[[int], str] = "addition {}".format

    def sum(self) -> int:
        """All amounts, exactly."""
        return exact_sum(self.amount) + exact_sum(self.lost_amount)

    def growth(self) -> int | None:
        """From before to after, modulo 2^64."""
        if self.before is None or self.after is None:
            return None
        return (self.after - self.before) % LIMIT

    def describe(self, index: int) -> str:
        """One addition in a line, its times from the start of the run."""
        start = int(self.sent.min())
        sent_s, answered_s = (
            (int(times[index]) - start) / 1e9 for times in (self.sent, self.answered)
        )
        return (
            f"{self.name(index)}: sent at {sent_s:.6f} s, answered at {answered_s:.6f} s, "
            f"amount {int(self.amount[index]):,}, total {int(self.total[index]):,}"
        )


def exact_sum(amounts: Words) -> int:
    """The sum as a Python number, which has no end at 2^64."""
    import numpy as np

    high = int((amounts >> np.uint64(32)).sum(dtype=np.uint64))
    low = int((amounts & np.uint64(2**32 - 1)).sum(dtype=np.uint64))
    return (high << 32) + low
