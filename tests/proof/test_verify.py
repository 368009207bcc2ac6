"""verify.py: right histories pass, each kind of wrong one fails, and a checker that tries all
orders agrees on every tiny history.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counter.proof import gaps
from counter.proof.history import (
    EXPLAINED,
    IMPOSSIBLE,
    PROVED,
    UNDECIDED,
    History,
    Verdict,
)
from counter.proof.verify import verify

TOP = 2**64
PROPERTY = settings(deadline=None, derandomize=True, max_examples=300)
MUTATIONS = settings(deadline=None, derandomize=True, max_examples=60)


@dataclass(frozen=True)
class Op:
    """One addition; `total` None if it was never answered."""

    sent: int
    answered: int
    amount: int
    total: int | None


def history(ops: Sequence[Op], before: int | None = 0, after: int | None = 0) -> History:
    def words(numbers: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        return np.array(numbers, np.uint64)

    known = [op for op in ops if op.total is not None]
    lost = [op for op in ops if op.total is None]
    return History(
        sent=words([op.sent for op in known]),
        answered=words([op.answered for op in known]),
        amount=words([op.amount for op in known]),
        total=words([op.total or 0 for op in known]),
        lost_sent=words([op.sent for op in lost]),
        lost_amount=words([op.amount for op in lost]),
        before=before,
        after=after,
    )


def judge(
    ops: Sequence[Op], before: int | None, after: int | None, shared: bool = False
) -> Verdict:
    return verify(history(ops, before, after), shared)


# What each verdict says


def test_a_chain_is_proved() -> None:
    proof = judge([Op(0, 9, 5, 5), Op(0, 9, 2, 7), Op(1, 9, 0, 5)], 0, 7)
    assert str(proof) == ("proved exact: 3 additions form one chain, in agreement with real time")


def test_nothing_sent_is_proved_if_nothing_grew() -> None:
    assert judge([], 7, 7).word == PROVED
    assert judge([], 7, 8).word == IMPOSSIBLE
    assert judge([], 7, 8, shared=True).word == EXPLAINED


def test_two_additions_from_one_total_are_impossible_and_both_are_shown() -> None:
    proof = judge([Op(1_000, 3_000, 1, 6), Op(2_000, 4_000, 1, 6)], 5, 7)
    assert proof.word == IMPOSSIBLE
    assert "one of them was lost" in proof.reason
    assert proof.evidence == (
        "addition 0: sent at 0.000000 s, answered at 0.000002 s, amount 1, total 6",
        "addition 1: sent at 0.000001 s, answered at 0.000003 s, amount 1, total 6",
    )


def test_a_total_that_was_never_there_cannot_be_read() -> None:
    proof = judge([Op(0, 9, 5, 5), Op(0, 9, 0, 3)], 0, 5)
    assert proof.word == IMPOSSIBLE
    assert "a read found a total that was never there" in proof.reason


def test_an_addition_counted_twice_is_impossible_or_explained_by_others() -> None:
    ops = [Op(0, 9, 1, 1), Op(0, 9, 1, 3)]
    proof = judge(ops, 0, 3)
    assert proof.word == IMPOSSIBLE
    assert "the total grew by 1 more in one place" in proof.reason
    assert "--verify shared" in proof.reason
    assert len(proof.evidence) == 2
    shared = judge(ops, 0, 3, shared=True)
    assert str(shared) == (
        "explained: 2 additions form a chain but for 1 gap, 1 in all, which other clients explain"
    )


def test_a_total_answered_before_its_time_is_impossible_even_beside_others() -> None:
    ops = [Op(0, 1, 1, 2), Op(2, 3, 1, 1)]
    for shared in (False, True):
        proof = judge(ops, 0, 2, shared)
        assert proof.word == IMPOSSIBLE
        assert "before a lower one was even asked for" in proof.reason
        assert proof.evidence[0].startswith("addition 0")


def test_a_stale_read_is_impossible() -> None:
    assert judge([Op(0, 1, 1, 1), Op(2, 3, 0, 0)], 0, 1).word == IMPOSSIBLE
    assert judge([Op(0, 2, 1, 1), Op(2, 3, 0, 0)], 0, 1).word == PROVED, "they met"


@pytest.mark.parametrize(
    ("op", "before", "after"),
    [(Op(0, 1, 1, 12), 10, 11), (Op(0, 1, 3, 11), 10, 13), (Op(0, 1, 0, 9), 10, 10)],
)
def test_a_total_outside_of_before_and_after_is_impossible(op: Op, before: int, after: int) -> None:
    assert judge([op], before, after).word == IMPOSSIBLE


@pytest.mark.parametrize(("before", "after"), [(None, 5), (0, None), (None, None)])
def test_without_both_totals_nothing_is_proved(before: int | None, after: int | None) -> None:
    proof = judge([Op(0, 1, 5, 5)], before, after)
    assert proof.word == UNDECIDED
    assert "could not be read" in proof.reason


def test_without_the_total_after_what_is_impossible_still_is() -> None:
    assert judge([Op(0, 1, 5, 5), Op(0, 1, 4, 5)], 0, None).word == IMPOSSIBLE


def test_records_that_are_missing_leave_it_undecided_but_excuse_no_overlap() -> None:
    whole = history([Op(0, 1, 1, 1), Op(0, 1, 1, 3)], 0, 3)
    assert verify(whole, missing="a load process died") == Verdict(UNDECIDED, "a load process died")
    overlapping = history([Op(0, 1, 2, 2), Op(0, 1, 2, 3)], 0, 3)
    assert verify(overlapping, missing="a load process died").word == IMPOSSIBLE


# Unanswered additions


def test_unanswered_additions_explain_a_gap_of_their_size() -> None:
    ops = [Op(0, 9, 1, 1), Op(0, 9, 1, 4), Op(0, 0, 2, None), Op(0, 0, 5, None)]
    proof = judge(ops, 0, 4)
    assert proof.word == EXPLAINED
    assert "which unanswered additions fill" in proof.reason
    assert judge(ops, 0, 9).word == EXPLAINED, "the other one may count later"
    assert judge(ops, 0, 8).word == IMPOSSIBLE


def test_unanswered_additions_need_not_have_counted() -> None:
    assert judge([Op(0, 9, 1, 1), Op(0, 0, 2, None)], 0, 1).word == PROVED


def test_an_unanswered_addition_sent_too_late_explains_nothing() -> None:
    assert judge([Op(0, 5, 1, 3), Op(5, 0, 2, None)], 0, 3).word == EXPLAINED
    assert judge([Op(0, 5, 1, 3), Op(6, 0, 2, None)], 0, 3).word == IMPOSSIBLE
    assert judge([Op(0, 5, 1, 3), Op(6, 0, 2, None)], 0, 3, shared=True).word == EXPLAINED


def test_equal_amounts_are_settled_however_many_there_are() -> None:
    sizes, deadlines = [3] * 10_000, list(range(3, 30_003, 3))
    lost = [(sent, 1) for sent in range(1, 30_001)]
    assert gaps.explained(sizes, deadlines, lost) is True
    assert gaps.explained(sizes, [*deadlines[:5000], *deadlines[4999:-1]], lost) is False


def test_a_puzzle_too_large_to_search_is_undecided() -> None:
    ops = [Op(0, 9, 1, 1 + 10**6 + 1)]
    ops += [Op(0, 0, 2 * amount, None) for amount in range(10_000, 10_400)]
    proof = judge(ops, 0, 10**6 + 2)
    assert proof.word == UNDECIDED
    assert "too much to search" in proof.reason
    assert judge(ops, 0, 10**6 + 2, shared=True).word == EXPLAINED


@PROPERTY
@given(st.data())
def test_the_search_agrees_with_trying_every_assignment(data: st.DataObject) -> None:
    lost = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=5))
    sizes = data.draw(st.lists(st.integers(1, 6), max_size=3))
    deadlines = sorted(data.draw(st.integers(0, 3)) for _ in sizes)

    def possible(left: list[int], index: int) -> bool:
        if index == len(lost):
            return not any(left)
        sent, amount = lost[index]
        return possible(left, index + 1) or any(
            left[gap] >= amount
            and sent <= deadlines[gap]
            and possible([size - amount * (gap == g) for g, size in enumerate(left)], index + 1)
            for gap in range(len(left))
        )

    assert gaps.explained(sizes, deadlines, lost) is possible(sizes, 0)


# Histories of a simulated counter

amounts = st.integers(0, 3) | st.sampled_from([10, 1000])


@st.composite
def linearizable(
    draw: st.DrawFn, size: int = 30, amounts: st.SearchStrategy[int] = amounts, others: bool = False
) -> tuple[list[Op], int, int]:
    """What a right counter answers: each addition counts at a moment between its two times."""
    before = draw(st.sampled_from([0, 5, TOP - 1, TOP - 7]) | st.integers(0, TOP - 1))
    moments = []
    for _ in range(draw(st.integers(0, size))):
        sent, wait, rest = draw(st.tuples(st.integers(0, 40), st.integers(0, 9), st.integers(0, 9)))
        kinds = ["answered", "answered", "answered", "lost", "never"] + ["other"] * others
        moments.append((sent + wait, sent, rest, draw(amounts), draw(st.sampled_from(kinds))))
    total, ops = before, []
    for moment, sent, rest, amount, kind in sorted(moments):
        if kind != "never":
            total = (total + amount) % TOP
        if kind != "other":
            ops.append(Op(sent, moment + rest, amount, total if kind == "answered" else None))
    return draw(st.permutations(ops)), before, total


@PROPERTY
@given(linearizable())
def test_what_a_right_counter_answers_is_proved_or_explained(
    run: tuple[list[Op], int, int],
) -> None:
    ops, before, after = run
    assert judge(ops, before, after).word in (PROVED, EXPLAINED)
    if all(op.total is not None for op in ops):
        assert judge(ops, before, after).word == PROVED


@PROPERTY
@given(linearizable(others=True))
def test_what_a_right_counter_answers_beside_others_is_never_impossible(
    run: tuple[list[Op], int, int],
) -> None:
    assert judge(*run, shared=True).word in (PROVED, EXPLAINED)


def simulated(seed: int, change: str = "") -> tuple[list[Op], int, int]:
    """300 additions by 8 connections, one of them wrong as `change` says."""
    chance = random.Random(seed)
    ops: list[Op] = []
    clock, total = 0, chance.choice([0, TOP - 100, 10**9])
    before, free = total, [0] * 8
    wrong = chance.randrange(100, 200)
    for number in range(300):
        connection = min(range(8), key=lambda c: free[c])
        sent = max(free[connection], 0) + chance.randrange(5)
        clock = max(clock + 1, sent + chance.randrange(20))
        free[connection] = answered = clock + chance.randrange(20)
        amount = chance.randrange(6)
        if number == wrong:
            amount = 0 if change == "stale" else max(1, amount)
            applied = {"lost": 0, "twice": 2 * amount}.get(change, amount)
            told = total + (2 * amount if change == "twice" else amount)
            if change == "stale":
                earlier = [op for op in ops if op.answered < sent and op.amount]
                told = (earlier[-1].total or 0) - 1
            total += applied
            ops.append(Op(sent, answered, amount, told % TOP))
        else:
            total += amount
            ops.append(Op(sent, answered, amount, total % TOP))
    if change == "early":
        first = ops[wrong]
        later = next(op for op in ops[::-1] if op.amount == first.amount)
        ops[ops.index(later)] = replace(later, total=first.total)
        ops[wrong] = replace(first, total=later.total)
    chance.shuffle(ops)
    return ops, before, total % TOP


@MUTATIONS
@given(st.integers(0, 2**32))
def test_a_simulated_run_is_proved(seed: int) -> None:
    assert judge(*simulated(seed)).word == PROVED


@pytest.mark.parametrize("change", ["lost", "twice", "stale", "early"])
@MUTATIONS
@given(seed=st.integers(0, 2**32))
def test_one_wrong_addition_among_hundreds_is_impossible(change: str, seed: int) -> None:
    assert judge(*simulated(seed, change)).word == IMPOSSIBLE


@pytest.mark.parametrize("change", ["lost", "stale", "early"])
@MUTATIONS
@given(seed=st.integers(0, 2**32))
def test_other_clients_excuse_nothing_but_gaps(change: str, seed: int) -> None:
    assert judge(*simulated(seed, change), shared=True).word == IMPOSSIBLE


# The checker that tries all orders


def linearizes(ops: Sequence[Op], before: int, after: int, shared: bool) -> bool:
    """Whether some order of the answered and some of the lost additions explains all totals."""

    def fits(left: frozenset[int], total: int) -> bool:
        known = [ops[index] for index in left if ops[index].total is not None]
        if not known and (total == after or (shared and total <= after)):
            return True
        for index in left:
            op = ops[index]
            if any(other.answered < op.sent for other in known):
                continue
            if op.total is None:
                starts: Sequence[int] = (
                    range(total, max(total, after - op.amount) + 1) if shared else [total]
                )
                if any(fits(left - {index}, (start + op.amount) % TOP) for start in starts):
                    return True
                continue
            follows = (total + op.amount) % TOP == op.total
            passes = shared and total + op.amount <= op.total
            if (follows or passes) and fits(left - {index}, op.total):
                return True
        return False

    return fits(frozenset(range(len(ops))), before)


@st.composite
def tiny(draw: Any, amounts: st.SearchStrategy[int]) -> tuple[list[Op], int, int]:
    """A handful of additions; every second history has a total that may be wrong."""
    ops, before, after = draw(linearizable(5, amounts))
    shift, totals = TOP - before, {(after - before) % TOP, 0}
    ops = [op if op.total is None else replace(op, total=(op.total + shift) % TOP) for op in ops]
    totals |= {op.total for op in ops if op.total is not None}
    after = (after - before) % TOP
    near = st.sampled_from(sorted(totals | {(total + 1) % TOP for total in totals}))
    is_changed = draw(st.tuples(st.booleans(), st.sampled_from([True, False, False])))
    if ops and is_changed[0]:
        index = draw(st.integers(0, len(ops) - 1))
        if ops[index].total is not None:
            ops[index] = replace(ops[index], total=draw(near))
    if is_changed[1]:
        after = draw(near)
    return ops, 0, after


@settings(PROPERTY, max_examples=1500)
@given(tiny(st.integers(0, 3)), st.booleans())
def test_trying_all_orders_says_the_same(run: tuple[list[Op], int, int], shared: bool) -> None:
    word = judge(*run, shared=shared).word
    assert word in (PROVED, EXPLAINED, IMPOSSIBLE)
    assert (word != IMPOSSIBLE) is linearizes(*run, shared)


# Totals that come round again


@settings(PROPERTY, max_examples=1500)
@given(tiny(st.sampled_from([0, 1, TOP // 4, TOP // 2, TOP // 4 * 3, TOP - 1])))
def test_over_several_laps_what_is_certain_is_right(run: tuple[list[Op], int, int]) -> None:
    word = judge(*run).word
    if word != UNDECIDED:
        assert (word != IMPOSSIBLE) is linearizes(*run, shared=False)


@PROPERTY
@given(linearizable(amounts=st.integers(0, TOP - 1)))
def test_amounts_of_64_bits_are_proved_in_spite_of_the_laps(
    run: tuple[list[Op], int, int],
) -> None:
    ops, before, after = run
    word = judge(ops, before, after).word
    assert word != IMPOSSIBLE
    if all(op.total is not None for op in ops) and len({op.amount for op in ops}) == len(ops):
        assert word in (PROVED, UNDECIDED)


def long_lap(seed: int) -> list[Op]:
    chance, total, ops = random.Random(seed), 0, []
    for number in range(200):
        amount = chance.randrange(TOP)
        total = (total + amount) % TOP
        ops.append(Op(2 * number, 2 * number + chance.randrange(9), amount, total))
    return ops


@MUTATIONS
@given(st.integers(0, 2**32))
def test_many_laps_of_random_amounts_are_proved_and_what_is_wrong_in_them_found(seed: int) -> None:
    ops = long_lap(seed)
    after = ops[-1].total
    assert judge(ops, 0, after).word == PROVED
    assert judge([*ops[:90], *ops[91:]], 0, after).word == IMPOSSIBLE, "a gap"
    doubled = replace(ops[50], total=(ops[50].total or 0) + 1)
    assert judge([*ops[:50], doubled, *ops[51:]], 0, after).word == IMPOSSIBLE
    late = replace(ops[50], sent=10**6, answered=10**6)
    assert judge([*ops[:50], late, *ops[51:]], 0, after).word == IMPOSSIBLE
    assert judge(ops, 0, after, shared=True).word == PROVED
    assert judge([*ops[:90], *ops[91:]], 0, after, shared=True).word == UNDECIDED


HALF = TOP // 2


def test_where_several_walks_are_possible_a_failed_one_shows_nothing() -> None:
    """The order is 0, 1, 2, 3; the walk that is tried begins with 2, which was answered first."""
    ops = [Op(0, 20, HALF, HALF), Op(0, 4, HALF, 0), Op(5, 10, HALF, HALF), Op(0, 30, HALF, 0)]
    assert linearizes(ops, 0, 0, shared=False)
    proof = judge(ops, 0, 0)
    assert proof.word == UNDECIDED
    assert "sums to 2^64 or more, so totals repeat" in proof.reason


def test_a_read_of_a_total_that_is_passed_twice_shows_nothing() -> None:
    ops = [Op(0, 1, HALF, HALF), Op(2, 3, HALF, 0), Op(4, 5, 0, 0)]
    assert linearizes(ops, 0, 0, shared=False)
    assert judge(ops, 0, 0).word == UNDECIDED


def test_a_total_left_more_often_than_reached_is_impossible_in_any_lap() -> None:
    ops = [Op(0, 9, HALF, HALF), Op(5, 9, HALF, 0), Op(0, 1, HALF, HALF)]
    proof = judge(ops, 0, 0)
    assert proof.word == IMPOSSIBLE
    assert "the total 0 was added to more often than it was reached" in proof.reason
