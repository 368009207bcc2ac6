"""The additions of a run in the one order in which a counter can have counted them. Pure.

The law: whatever is called impossible here is certain. A chain is exact if its additions neither
overlap nor leave a gap, and nothing behind an addition in it was answered before that addition was
sent. What may explain a gap is for gaps.py to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from counter.proof.history import IMPOSSIBLE, History, Verdict

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from counter.proof.history import Words

_NEVER: Final = 2**64 - 1  # a time behind every other


@dataclass(frozen=True)
class Holes:
    """The gaps of a chain: their sizes, and by when an addition in each must have been sent."""

    places: list[int]  # the position in the chain that each is before
    sizes: list[int]
    deadlines: list[int]


class Chain:
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

    def outside(self) -> Verdict | None:
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

    def overlap(self) -> Verdict | None:
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

    def holes(self) -> Holes:
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
        return Holes(where, sizes, deadlines)

    def unexplained(self, holes: Holes) -> Verdict:
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

    def _impossible(self, reason: str, *evidence: str) -> Verdict:
        return Verdict(IMPOSSIBLE, reason, evidence)


def earliest_behind(history: History, order: NDArray[Any]) -> Words:
    """For each place in an order, when the first of those there and behind was answered."""
    import numpy as np

    earliest: Words = history.answered[order][::-1]
    np.minimum.accumulate(earliest, out=earliest)
    return earliest[::-1]


def disorder(history: History, order: NDArray[Any]) -> Verdict | None:
    """The first addition in an order with one behind it that was answered before it was sent."""
    import numpy as np

    sent, earliest = history.sent[order], earliest_behind(history, order)
    found = np.flatnonzero(sent[:-1] > earliest[1:])
    if not len(found):
        return None
    place = int(found[0])
    behind = history.answered[order[place + 1 :]] < sent[place]
    answered_first = order[place + 1 + int(behind.argmax())]
    return Verdict(
        IMPOSSIBLE,
        "a total was answered before a lower one was even asked for",
        (history.describe(answered_first), history.describe(order[place])),
    )
