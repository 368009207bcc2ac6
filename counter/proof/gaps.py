"""Whether unanswered additions explain the gaps in a chain of totals. Pure.

The law: `True` and `False` are certain; what a bounded search cannot settle is `None`. An
unanswered addition may have been counted at any moment after it was sent, or never, so each fills
at most one gap, and only one that it was sent in time for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

# A search of so many steps takes less than a second. Which amounts add up to a gap is a puzzle
# whose worst cases no computer solves.
MAX_STEPS: Final = 200_000


def explained(
    gaps: Sequence[int], deadlines: Sequence[int], lost: Sequence[tuple[int, int]]
) -> bool | None:
    """Whether some of the lost additions, each used once, fill every gap exactly.

    `gaps` are their sizes in the order of the chain, `deadlines` the times by which an addition in
    each must have been sent, which never fall from one gap to the next; `lost` are pairs of when
    each was sent and its amount.
    """
    useful = sorted((sent, amount) for sent, amount in lost if amount)
    if len(gaps) > len(useful) or sum(gaps) > sum(amount for _, amount in useful):
        return False
    if len({amount for _, amount in useful}) <= 1:
        return _explained_by_equals(gaps, deadlines, useful)
    return _Search(gaps, deadlines, useful).result()


def _explained_by_equals(
    gaps: Sequence[int], deadlines: Sequence[int], lost: Sequence[tuple[int, int]]
) -> bool:
    """With one amount only how many there are matters: those sent first fill the first gaps.

    Whoever was sent in time for a gap was in time for all behind it, so this never wastes one.
    """
    used = 0
    for gap, deadline in zip(gaps, deadlines, strict=True):
        count, rest = divmod(gap, lost[0][1])
        used += count
        if rest or used > len(lost) or lost[used - 1][0] > deadline:
            return False
    return True


class _Search:
    """Tries the amounts gap by gap, the largest first.

    Lost additions of one amount that are in time for a gap are alike from there on, so a state is
    how many of each amount are left, and a gap is entered once with each state.
    """

    def __init__(
        self, gaps: Sequence[int], deadlines: Sequence[int], lost: Sequence[tuple[int, int]]
    ) -> None:
        self.gaps = gaps
        self.amounts = sorted({amount for _, amount in lost}, reverse=True)
        self.arrivals = self._arrivals(deadlines, lost)

    def _arrivals(
        self, deadlines: Sequence[int], lost: Sequence[tuple[int, int]]
    ) -> list[list[int]]:
        """For each gap, the kinds of the additions in time for it and not for the one before."""
        kinds = {amount: kind for kind, amount in enumerate(self.amounts)}
        arrivals: list[list[int]] = []
        taken = 0
        for deadline in deadlines:
            arrivals.append([])
            while taken < len(lost) and lost[taken][0] <= deadline:
                arrivals[-1].append(kinds[lost[taken][1]])
                taken += 1
        return arrivals

    def _entering(self, gap: int, left: tuple[int, ...]) -> tuple[int, ...]:
        """What is left when a gap is entered."""
        counts = list(left)
        for kind in self.arrivals[gap]:
            counts[kind] += 1
        return tuple(counts)

    def result(self) -> bool | None:
        """True, False, or None when the steps ran out."""
        start = self._entering(0, (0,) * len(self.amounts)) if self.gaps else ()
        entered = {(0, start)}
        # A gap, what is open of it, the first kind that may still be used in it, and what is left.
        todo = [(0, self.gaps[0], 0, start)] if self.gaps else []
        for _ in range(MAX_STEPS):
            if not todo:
                return not self.gaps
            gap, rest, kind, left = todo.pop()
            if not rest:
                if gap + 1 == len(self.gaps):
                    return True
                left = self._entering(gap + 1, left)
                if (gap + 1, left) not in entered:
                    entered.add((gap + 1, left))
                    todo.append((gap + 1, self.gaps[gap + 1], 0, left))
            elif kind < len(self.amounts):
                todo.append((gap, rest, kind + 1, left))
                if left[kind] and self.amounts[kind] <= rest:
                    fewer = (*left[:kind], left[kind] - 1, *left[kind + 1 :])
                    todo.append((gap, rest - self.amounts[kind], kind, fewer))
        return None
