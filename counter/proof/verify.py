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

from counter.proof import gaps
from counter.proof.chain import Chain, Holes, disorder
from counter.proof.history import EXPLAINED, LIMIT, PROVED, UNDECIDED, History, Verdict
from counter.proof.wrapped import verify_wrapped


def verify(history: History, shared: bool = False, missing: str = "") -> Verdict:
    """The verdict on a history.

    `shared` says that other clients may have added; `missing` why answered additions are not in
    the history, if so: what was recorded can still be impossible, but not proved.
    """
    if history.before is None:
        return Verdict(UNDECIDED, "the server's total could not be read before the run")
    if history.sum() >= LIMIT:
        return verify_wrapped(history, alone=not (shared or missing), missing=missing)
    chain = Chain(history)
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


def _word(
    history: History, holes: Holes, filled: bool | None, shared: bool, missing: str
) -> Verdict:
    """The verdict on a chain in which nothing is impossible."""
    count = f"{len(history.total):,} additions"
    gap_count = f"{len(holes.sizes):,} gap{'s' * (len(holes.sizes) != 1)}"
    size = f"{gap_count}, {sum(holes.sizes):,} in all,"
    if missing:
        return Verdict(UNDECIDED, missing)
    if history.after is None:
        return Verdict(UNDECIDED, "the server's total could not be read after the run")
    if not holes.sizes:
        return Verdict(PROVED, f"{count} form one chain, in agreement with real time")
    if filled:
        return Verdict(
            EXPLAINED,
            f"{count} form a chain but for {size} which unanswered additions fill",
        )
    if shared:
        return Verdict(
            EXPLAINED, f"{count} form a chain but for {size} which other clients explain"
        )
    return Verdict(
        UNDECIDED,
        f"whether the {len(history.lost_sent):,} unanswered additions fill {size} is too much to "
        "search",
    )
