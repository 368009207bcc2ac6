"""Is a recorded run exact, that is linearizable? Pure: no socket, no clock, no process.

The law: `proved` and `impossible` are certain. Whatever is in doubt is `explained` (the totals fit,
if others added what is missing) or `undecided`, and says why.

An addition of amount a that was answered with total t covers the steps (t - a, t], counted from
the total before the run. While everything sums below 2^64, one chain at most holds all additions:
sorted by where they end, reads (amount 0) behind the addition that ends at their total. The run is
exact if and only if the covers neither overlap nor leave a gap, and nothing behind an addition in
the chain was answered before that addition was sent. wrapped.py judges runs that sum to more.

Where other clients may add too, all that was counted during the run is taken to sum below 2^64:
without that bound, others can explain any total whatever.

In O(n log n); 75 bytes of memory for each addition at the peak, the 32 of its history included.
NumPy is imported by what computes, so that importing this module stays light.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from counter.proof import gaps

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Words = NDArray[np.uint64]

PROVED: Final = "proved"
EXPLAINED: Final = "explained"
UNDECIDED: Final = "undecided"
IMPOSSIBLE: Final = "impossible"

LIMIT: Final = 2**64  # what sums to this and more comes back to totals it had before
_NEVER: Final = 2**64 - 1  # a time behind every other


@dataclass(frozen=True)
class Proof:
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


def verify(history: History, shared: bool = False, missing: str = "") -> Proof:
    """The verdict on a history.

    `shared` says that other clients may have added; `missing` why answered additions are not in
    the history, if so: what was recorded can still be impossible, but not proved.
    """
    if history.before is None:
        return Proof(UNDECIDED, "the server's total could not be read before the run")
    if history.sum() >= LIMIT:
        from counter.proof.wrapped import verify_laps

        return verify_laps(history, alone=not (shared or missing), missing=missing)
    chain = _Chain(history)
    wrong = chain.outside() or chain.overlap() or disorder(history, chain.order)
    if wrong:
        return wrong
    holes = chain.holes()
    filled: bool | None = True
    if holes.sizes:
        lost = zip(history.lost_sent.tolist(), history.lost_amount.tolist(), strict=True)
        filled = gaps.explained(holes.sizes, holes.deadlines, list(lost))
    if filled is False and not (shared or missing):
        return chain.unexplained(holes)
    return _word(history, holes, filled, shared, missing)


@dataclass(frozen=True)
class _Holes:
    """The gaps of a chain: their sizes, and by when an addition in each must have been sent."""

    places: list[int]  # the position in the chain that each is before
    sizes: list[int]
    deadlines: list[int]


def _word(
    history: History, holes: _Holes, filled: bool | None, shared: bool, missing: str
) -> Proof:
    """The verdict on a chain in which nothing is impossible."""
    count = f"{len(history.total):,} additions"
    gap_count = f"{len(holes.sizes):,} gap{'s' * (len(holes.sizes) != 1)}"
    size = f"{gap_count}, {sum(holes.sizes):,} in all,"
    if missing:
        return Proof(UNDECIDED, missing)
    if history.after is None:
        return Proof(UNDECIDED, "the server's total could not be read after the run")
    if not holes.sizes:
        return Proof(PROVED, f"{count} form one chain, in agreement with real time")
    if filled:
        return Proof(
            EXPLAINED,
            f"{count} form a chain but for {size} which unanswered additions fill",
        )
    if shared:
        return Proof(EXPLAINED, f"{count} form a chain but for {size} which other clients explain")
    return Proof(
        UNDECIDED,
        f"whether the {len(history.lost_sent):,} unanswered additions fill {size} is too much to "
        "search",
    )


class _Chain:
    """The additions in the one order in which a counter can have counted them."""

    def __init__(self, history: History) -> None:
        import numpy as np

        assert history.before is not None
        self.history = history
        end = history.total - np.uint64(history.before)
        is_read = history.amount == 0
        # Each process's totals rise, so a stable sort by the end merges a few runs. Additions that
        # end at the same total overlap in whatever order.
        if is_read.any():
            self.order = np.lexsort((history.sent, is_read, end))
        else:
            self.order = np.argsort(end, kind="stable")
        self.end = end[self.order]
        self.amount = history.amount[self.order]

    def outside(self) -> Proof | None:
        """An addition that begins before the total before the run, or ends behind the one after."""
        import numpy as np

        history, growth = self.history, self.history.growth()
        early = np.flatnonzero(self.end < self.amount)
        if len(early):
            return self._impossible(
                "an addition began below the total before the run",
                f"the total before the run: {history.before:,}",
                history.describe(self.order[early[0]]),
            )
        if growth is not None and len(self.end) and int(self.end[-1]) > growth:
            return self._impossible(
                "an answered total is not between those before and after the run",
                history.describe(self.order[-1]),
                f"the total before the run: {history.before:,}, after it: {history.after:,}",
            )
        return None

    def overlap(self) -> Proof | None:
        """Two neighbours of which one begins before the other ends."""
        import numpy as np

        start = self.end - self.amount
        found = np.flatnonzero(start[1:] < self.end[:-1])
        if not len(found):
            return None
        first, second = self.order[found[0]], self.order[found[0] + 1]
        what = "two additions counted from the same total: one of them was lost"
        if not self.history.amount[first]:
            what = "a read found a total that was never there: an addition passed over it"
        return self._impossible(what, self.history.describe(first), self.history.describe(second))

    def holes(self) -> _Holes:
        """Where the chain is broken."""
        import numpy as np

        step = self.end - self.amount
        step[1:] -= self.end[:-1]
        places = np.flatnonzero(step)
        sizes, where = step[places].tolist(), places.tolist()
        deadlines: list[int] = []
        if where:
            deadlines = earliest_behind(self.history, self.order)[places].tolist()
        growth = self.history.growth()
        last = int(self.end[-1]) if len(self.end) else 0
        if growth is not None and growth > last:
            where.append(len(self.end))
            sizes.append(growth - last)
            deadlines.append(_NEVER)
        return _Holes(where, sizes, deadlines)

    def unexplained(self, holes: _Holes) -> Proof:
        """The verdict on gaps that nothing explains, with what stands around the first."""
        history, place = self.history, holes.places[0]
        lost = len(history.lost_sent)
        whom = f"that the {lost:,} unanswered additions do not fill: " if lost else ""
        before = f"the total before the run: {history.before:,}"
        after = f"the total after the run: {history.after or 0:,}"
        return self._impossible(
            f"the total grew by {holes.sizes[0]:,} more in one place, {whom}"
            "an addition was counted twice, or another client adds (then say --verify shared)",
            history.describe(self.order[place - 1]) if place else before,
            history.describe(self.order[place]) if place < len(self.order) else after,
        )

    def _impossible(self, reason: str, *evidence: str) -> Proof:
        return Proof(IMPOSSIBLE, reason, evidence)


def earliest_behind(history: History, order: NDArray[Any]) -> Words:
    """For each place in an order, when the first of those there and behind was answered."""
    import numpy as np

    earliest: Words = history.answered[order][::-1]
    np.minimum.accumulate(earliest, out=earliest)
    return earliest[::-1]


def disorder(history: History, order: NDArray[Any]) -> Proof | None:
    """The first addition in an order with one behind it that was answered before it was sent."""
    import numpy as np

    sent, earliest = history.sent[order], earliest_behind(history, order)
    found = np.flatnonzero(sent[:-1] > earliest[1:])
    if not len(found):
        return None
    place = int(found[0])
    behind = history.answered[order[place + 1 :]] < sent[place]
    answered_first = order[place + 1 + int(behind.argmax())]
    return Proof(
        IMPOSSIBLE,
        "a total was answered before a lower one was even asked for",
        (history.describe(answered_first), history.describe(order[place])),
    )


def exact_sum(amounts: Words) -> int:
    """The sum as a Python number, which has no end at 2^64."""
    import numpy as np

    high = int((amounts >> np.uint64(32)).sum(dtype=np.uint64))
    low = int((amounts & np.uint64(2**32 - 1)).sum(dtype=np.uint64))
    return (high << 32) + low
