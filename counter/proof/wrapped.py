"""Runs that sum to 2^64 or more, where the counter passes the same total several times. Pure.

The law is that of verify.py: `proved` and `impossible` are certain, the rest is `undecided`.

An addition is a step from one total to another, and a chain is a walk that takes every step once
(an Eulerian trail), from the total before the run to the one after. Such a walk needs each total
to be reached as often as it is left. One that is found and agrees with real time is a proof. Where
no two additions leave the same total there is no other, and its failure shows the opposite; that
is so for amounts drawn from all 64 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from counter.proof.chain import disorder
from counter.proof.history import IMPOSSIBLE, PROVED, UNDECIDED, History, Verdict

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from counter.proof.history import Words

_WHY = "what was sent sums to 2^64 or more, so totals repeat"


def verify_wrapped(history: History, alone: bool, missing: str) -> Verdict:
    """The verdict, as verify() gives it; `alone`: nobody else added, and nothing is missing."""
    import numpy as np

    if missing:
        return Verdict(UNDECIDED, missing)
    if history.before is None or history.after is None:
        return Verdict(UNDECIDED, "the server's total could not be read before and after the run")
    adding, reading = np.flatnonzero(history.amount), np.flatnonzero(history.amount == 0)
    starts = history.total[adding] - history.amount[adding]
    is_whole = alone and not history.lost_amount.any()
    if is_whole and (wrong := _unbalanced(history, adding, starts)):
        return wrong
    is_forced = len(np.unique(starts)) == len(starts)
    order = _walk(history, adding, starts)
    if len(reading) and order is not None:
        # A read of a total that is passed twice could stand at either place.
        twice = bool((starts == np.uint64(history.after)).any())
        is_forced = is_forced and not (
            twice and bool((history.total[reading] == np.uint64(history.after)).any())
        )
        order = _with_reads(history, order, reading) if is_forced else None
    if order is not None:
        wrong = disorder(history, order)
        if wrong is None:
            count = f"{len(order):,} additions"
            return Verdict(PROVED, f"{count} form one chain, in agreement with real time")
        if is_whole and is_forced:
            return wrong
    if is_whole and is_forced:
        return Verdict(IMPOSSIBLE, "the only chain there can be does not hold every addition")
    return Verdict(UNDECIDED, f"{_WHY}, and no chain that agrees with real time was found")


def _unbalanced(history: History, adding: NDArray[Any], starts: Words) -> Verdict | None:
    """A total that is left more often than it is reached, or the other way round."""
    import numpy as np

    assert history.before is not None
    assert history.after is not None
    left = np.sort(np.append(starts, np.uint64(history.after)))
    reached = np.sort(np.append(history.total[adding], np.uint64(history.before)))
    found = np.flatnonzero(left != reached)
    if not len(found):
        return None
    total = min(left[found[0]], reached[found[0]])
    leaving = adding[starts == total][:2]
    reaching = adding[history.total[adding] == total][:2]
    often = "more" if left[found[0]] == total else "less"
    return Verdict(
        IMPOSSIBLE,
        f"the total {int(total):,} was added to {often} often than it was reached",
        tuple(history.describe(index) for index in (*reaching, *leaving)),
    )


def _walk(history: History, adding: NDArray[Any], starts: Words) -> NDArray[Any] | None:
    """The additions in an order in which each begins where the one before ends; None if it ends
    early. Of several that begin at a total, the one that was answered first goes first.
    """
    import numpy as np

    assert history.before is not None
    sorting = np.lexsort((history.answered[adding], starts))
    sorted_starts = starts[sorting]
    totals, first = np.unique(sorted_starts, return_index=True)
    if not len(totals):
        return adding if history.before == history.after else None
    # Groups of additions that begin at one total, and the group that each addition leads to.
    ends = history.total[adding][sorting]
    group = np.searchsorted(totals, ends).clip(max=len(totals) - 1)
    group[totals[group] != ends] = -1
    places = np.empty(len(adding), np.int64)
    # By their memoryviews, which give and take Python's numbers in a third of an array's time.
    leads, taken = group.data, places.data
    following, limit = first.copy().data, np.append(first[1:], len(adding)).data
    now = int(np.searchsorted(totals, np.uint64(history.before)).clip(max=len(totals) - 1))
    if totals[now] != history.before:
        return None
    for step in range(len(adding)):
        if now < 0 or following[now] == limit[now]:
            return None
        place = following[now]
        following[now] += 1
        taken[step] = place
        now = leads[place]
    order = adding[sorting[places]]
    return order if int(history.total[order[-1]]) == history.after else None


def _with_reads(
    history: History, order: NDArray[Any], reading: NDArray[Any]
) -> NDArray[Any] | None:
    """The chain with each read before the addition that leaves its total, or at the end."""
    import numpy as np

    totals = history.total[reading]
    if not len(order):
        return reading if (totals == np.uint64(history.after or 0)).all() else None
    starts = history.total[order] - history.amount[order]
    sorting = np.argsort(starts)
    near = sorting[np.searchsorted(starts, totals, sorter=sorting).clip(max=len(order) - 1)]
    found = starts[near] == totals
    if not (found | (totals == np.uint64(history.after or 0))).all():
        return None
    place = np.where(found, near, len(order))
    # Twice the place, so that a read's is before that of its addition.
    places = np.concatenate((2 * np.arange(len(order)) + 1, 2 * place))
    both = np.concatenate((order, reading))
    chain: NDArray[Any] = both[np.lexsort((history.sent[both], places))]
    return chain
