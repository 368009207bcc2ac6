"""What a run is found to be: the check of its totals, and the exit code.

Nothing here measures, connects or writes. This is the one place where a Result is judged; every
form of the report and the exit code are made from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from counter.proof.history import EXPLAINED, IMPOSSIBLE, PROVED
from counter.report.thresholds import Outcome
from counter.results.result import CHECKABLE_SUM, PROCESS_DIED, Result
from counter.system.exits import (
    EXIT_ERRORS,
    EXIT_INTERRUPTED,
    EXIT_THRESHOLD,
    EXIT_WRONG_TOTALS,
)
from protocol import TOTAL_MASK

_BY_WEIGHT: Final = (EXIT_WRONG_TOTALS, EXIT_ERRORS, EXIT_THRESHOLD, EXIT_INTERRUPTED, 0)


@dataclass(frozen=True)
class Check:
    """Whether the totals were right: `ok`, `wrong` or `not checked`, and why."""

    word: str
    reason: str


def check_totals(result: Result) -> Check:
    """Holds the totals of a run against what was sent in it.

    While what was sent sums below 2^63 the total must have grown by at least the sum answered.
    Beyond that only equality modulo 2^64 says something, and only if nobody else was adding.
    """
    restarted = "; was the server restarted?" if _looks_restarted(result) else ""
    if result.wrong:
        reason = ": ".join([f"{result.wrong:,} impossible totals", *result.wrong_examples[:1]])
        return Check("wrong", reason + restarted)
    if PROCESS_DIED in result.errors:
        return Check("not checked", f"{PROCESS_DIED}, and what it sent is not known")
    if result.total_before is None or result.total_after is None:
        return Check("not checked", "the server's total could not be read before and after")
    grown = (result.total_after - result.total_before) & TOTAL_MASK
    if grown == result.answered_sum & TOTAL_MASK:
        return Check("ok", f"the total grew by exactly the {result.answered_sum:,} answered")
    if result.answered_sum + result.unknown_sum >= CHECKABLE_SUM or not result.rises_checked:
        return Check("not checked", "more than 2^63 was sent, and others may have added too")
    if grown >= CHECKABLE_SUM:
        fall = f"from {result.total_before:,} to {result.total_after:,}"
        return Check("wrong", f"the total fell {fall}{restarted}")
    if grown < result.answered_sum:
        less = f"less than the {result.answered_sum:,} answered"
        return Check("wrong", f"the total grew by {grown:,}, {less}{restarted}")
    surplus = grown - result.answered_sum
    if surplus <= result.unknown_sum:
        return Check(
            "ok", f"{surplus:,} more than answered, within the {result.unknown_sum:,} unknown"
        )
    return Check("ok", f"the total grew by {surplus:,} more than answered: other clients added too")


def _looks_restarted(result: Result) -> bool:
    """Whether the total is below what was answered, and connections were lost as well."""
    if not result.errors or result.total_before is None or result.total_after is None:
        return False
    grown = (result.total_after - result.total_before) & TOTAL_MASK
    return grown < result.answered_sum or grown >= CHECKABLE_SUM


def exit_code(result: Result, outcomes: Sequence[Outcome] = ()) -> int:
    """The client's exit code after a run: the first of 4, 5, 99 and 130 that applies, or 0.

    A run that is proved impossible has wrong totals, even where they sum to what was sent.

    Where a threshold for errors is given, it alone decides about them and the outcomes that became
    unknown with them; a load process that died leaves the account itself incomplete.

    An interrupt alone makes no error: what is outstanding is waited for, or cut by a second.
    """
    impossible = result.proof is not None and result.proof.word == IMPOSSIBLE
    if check_totals(result).word == "wrong" or impossible:
        return EXIT_WRONG_TOTALS
    limited = any(outcome.threshold.measure == "errors" for outcome in outcomes)
    failed = bool(result.errors or (result.unknown and not result.cut))
    if PROCESS_DIED in result.errors or (failed and not limited):
        return EXIT_ERRORS
    if not all(outcome.ok for outcome in outcomes):
        return EXIT_THRESHOLD
    return EXIT_INTERRUPTED if result.interrupted else 0


@dataclass(frozen=True)
class Conclusion:
    """A run in a word for who reads no further: `PASS`, `FAIL`, or why it is neither; and why."""

    word: str
    reasons: tuple[str, ...]


def conclude(result: Result, outcomes: Sequence[Outcome] = ()) -> Conclusion:
    """What decides a run. PASS claims no more than was checked."""
    check, proof, code = check_totals(result), result.proof, exit_code(result, outcomes)
    breached = [f"{outcome.threshold} is breached" for outcome in outcomes if not outcome.ok]
    if code not in (0, EXIT_INTERRUPTED):
        reasons = [f"totals wrong: {check.reason}"] if check.word == "wrong" else []
        if proof is not None and proof.word == IMPOSSIBLE:
            reasons.append(str(proof))
        if code == EXIT_ERRORS or result.errors:
            reasons.append(errors_of(result))
        return Conclusion("FAIL", (*reasons, *breached))
    if result.interrupted:
        return Conclusion("INTERRUPTED", ("it did not run to its end",))
    if not result.measured:
        return Conclusion("NOTHING MEASURED", ("no request was answered in the measured part",))
    if check.word != "ok":
        return Conclusion("NOT CHECKED", (check.reason,))
    if proof is not None and proof.word not in (PROVED, EXPLAINED):
        return Conclusion("NOT PROVED", (proof.reason,))
    held = f"{len(outcomes)} thresholds kept" if len(outcomes) > 1 else "the threshold kept"
    reasons = [str(proof)] if proof is not None else [f"totals ok: {check.reason}"]
    reasons.append(errors_of(result) if result.errors else "no errors")
    return Conclusion("PASS", (*reasons, *([held] if outcomes else ())))


def errors_of(result: Result) -> str:
    """What went wrong in a run, by kind."""
    found = [f"{kind}: {number:,}" for kind, number in sorted(result.errors.items())]
    if result.unknown:
        found.append(f"outcome unknown: {result.unknown:,}")
    return ", ".join(found)


def first_of(*codes: int) -> int:
    """The exit code that says the most: the first of 4, 5, 99, 130 and 0 among these."""
    return min(codes, key=_BY_WEIGHT.index)
