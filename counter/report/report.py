"""A Result as lines and as JSON: compute -> lines -> sink.

Nothing here measures, connects or writes. The verdict is the one place where a Result is judged,
and every form of the report and the exit code are made from it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from counter.options.client import ClientSettings
from counter.options.shown import plain_values
from counter.proof.verify import IMPOSSIBLE, Proof
from counter.results.result import CHECKABLE_SUM, PROCESS_DIED, Histogram, Result
from protocol import TOTAL_MASK

if TYPE_CHECKING:
    from counter.report.thresholds import Outcome

# Grows when a name or a meaning changes; new names alone leave it.
JSON_VERSION: Final = 1

EXIT_WRONG_TOTALS: Final = 4
EXIT_ERRORS: Final = 5
EXIT_THRESHOLD: Final = 99
EXIT_INTERRUPTED: Final = 130
_BY_WEIGHT: Final = (EXIT_WRONG_TOTALS, EXIT_ERRORS, EXIT_THRESHOLD, EXIT_INTERRUPTED, 0)

# Above this share of one core, a load process delays its own requests.
SATURATED: Final = 0.9
SATURATED_S: Final = 0.5  # below, the share is mostly the start of the run

# Up to these, requests that were due and not sent are those of the last instant.
BEHIND: Final = 5
BEHIND_SHARE: Final = 0.01

PERCENTILES: Final = (50, 90, 99, 99.9)


@dataclass(frozen=True)
class Verdict:
    """Whether the totals were right: `ok`, `wrong` or `not checked`, and why."""

    word: str
    reason: str


def judge(result: Result) -> Verdict:
    """Holds the totals of a run against what was sent in it.

    While what was sent sums below 2^63 the total must have grown by at least the sum answered.
    Beyond that only equality modulo 2^64 says something, and only if nobody else was adding.
    """
    restarted = "; was the server restarted?" if _looks_restarted(result) else ""
    if result.wrong:
        reason = ": ".join([f"{result.wrong:,} impossible totals", *result.wrong_examples[:1]])
        return Verdict("wrong", reason + restarted)
    if PROCESS_DIED in result.errors:
        return Verdict("not checked", f"{PROCESS_DIED}, and what it sent is not known")
    if result.total_before is None or result.total_after is None:
        return Verdict("not checked", "the server's total could not be read before and after")
    grown = (result.total_after - result.total_before) & TOTAL_MASK
    if grown == result.answered_sum & TOTAL_MASK:
        return Verdict("ok", f"the total grew by exactly the {result.answered_sum:,} answered")
    if result.answered_sum + result.unknown_sum >= CHECKABLE_SUM or not result.rises_checked:
        return Verdict("not checked", "more than 2^63 was sent, and others may have added too")
    if grown >= CHECKABLE_SUM:
        fall = f"from {result.total_before:,} to {result.total_after:,}"
        return Verdict("wrong", f"the total fell {fall}{restarted}")
    if grown < result.answered_sum:
        less = f"less than the {result.answered_sum:,} answered"
        return Verdict("wrong", f"the total grew by {grown:,}, {less}{restarted}")
    surplus = grown - result.answered_sum
    if surplus <= result.unknown_sum:
        return Verdict(
            "ok", f"{surplus:,} more than answered, within the {result.unknown_sum:,} unknown"
        )
    return Verdict(
        "ok", f"the total grew by {surplus:,} more than answered: other clients added too"
    )


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
    if judge(result).word == "wrong" or impossible:
        return EXIT_WRONG_TOTALS
    limited = any(outcome.threshold.measure == "errors" for outcome in outcomes)
    failed = bool(result.errors or (result.unknown and not result.cut))
    if PROCESS_DIED in result.errors or (failed and not limited):
        return EXIT_ERRORS
    if not all(outcome.ok for outcome in outcomes):
        return EXIT_THRESHOLD
    return EXIT_INTERRUPTED if result.interrupted else 0


def first_of(*codes: int) -> int:
    """The exit code that says the most: the first of 4, 5, 99, 130 and 0 among these."""
    return min(codes, key=_BY_WEIGHT.index)


def format_ns(time_ns: float) -> str:
    """A time with three digits and the unit that suits it."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if time_ns >= 0.9995 * size:  # of which three digits are a whole unit
            return f"{float(f'{time_ns / size:.3g}'):g} {unit}"  # :g writes no 2e+03
    return f"{time_ns:.3g} ns"


def count(number: int, noun: str) -> str:
    """The number and its noun: `1 process`, `40 connections`."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending * (number != 1)}"


def format_s(seconds: float) -> str:
    """Seconds to a tenth, without a zero behind the point."""
    return f"{seconds:.1f}".removesuffix(".0") + " s"


def rate(result: Result) -> float:
    """Measured requests a second."""
    return result.measured / result.elapsed_s if result.elapsed_s > 0 else 0.0


def latency_rows(result: Result) -> list[tuple[str, str]]:
    """Latencies; of an open loop, both from when requests were due and from when they were sent."""
    if not len(result.raw_latencies):
        return [("latency", _times(result.latencies))]
    return [
        ("latency", f"{_times(result.latencies)}  (from when each was due)"),
        ("raw", f"{_times(result.raw_latencies)}  (from when each was sent)"),
    ]


def _times(latency: Histogram) -> str:
    if not len(latency):
        return "none"
    percentiles = (f"p{p:g} {format_ns(latency.percentile_ns(p))}" for p in PERCENTILES)
    return "  ".join(
        (f"mean {format_ns(latency.mean_ns())}", *percentiles, f"max {format_ns(latency.max_ns)}")
    )


def lines(result: Result, outcomes: Sequence[Outcome] = ()) -> list[str]:
    """The closing table."""
    verdict = judge(result)
    errors = ", ".join(f"{kind}: {count:,}" for kind, count in sorted(result.errors.items()))
    unknown = f"; outcome unknown: {result.unknown:,}" if result.unknown else ""
    asked = f", {result.asked_rate:,.10g} asked for" if result.asked_rate else ""
    ending = "Interrupted" if result.interrupted else "All clients finished"
    rows = [
        (
            "clients",
            f"{count(result.connections, 'connection')} in {count(result.processes, 'process')}",
        ),
        (
            "in all",
            f"{result.sent:,} sent, {result.answered:,} answered, warm-up and reads included",
        ),
        ("measured", f"{result.measured:,} requests in {format_s(result.elapsed_s)}"),
        ("rate", f"{rate(result):,.0f} requests a second{asked}"),
        *latency_rows(result),
        ("errors", (errors or "none") + unknown),
        ("total", f"{_total(result.total_before)} before, {_total(result.total_after)} after"),
        ("check", f"{verdict.word}: {verdict.reason}"),
        *(("threshold", str(outcome)) for outcome in outcomes),
    ]
    if result.proof:
        rows.append(("verify", str(result.proof)))
        rows += [("", line) for line in result.proof.evidence]
    if "timeout" in result.errors:
        rows.append(("note", "no reply in time: has the server fewer workers than connections?"))
    if result.behind > max(BEHIND, BEHIND_SHARE * (result.measured + result.behind)):
        rows.append(("behind", f"{count(result.behind, 'request')} due and not sent at the end"))
    if result.cpu_share > SATURATED and result.elapsed_s > SATURATED_S:
        share = f"{result.cpu_share:.0%} of a core"
        rows.append(("note", f"a load process took {share}: the client was the bottleneck"))
    table = [f"  {name:<9} {text}" for name, text in rows]
    return [f"{ending} after {format_s(result.elapsed_s)}.", "", *table]


def as_json(result: Result, settings: ClientSettings, outcomes: Sequence[Outcome] = ()) -> str:
    """The report for programs; docs/result.schema.json describes it.

    Totals and sums are text, because many JSON readers end at 2^53.
    """
    verdict = judge(result)
    return json.dumps(
        {
            "version": JSON_VERSION,
            "settings": plain_values(settings),
            "python": platform.python_version(),
            "machine": platform.platform(),
            "connections": result.connections,
            "processes": result.processes,
            "interrupted": result.interrupted,
            "sent": result.sent,
            "answered": result.answered,
            "answered_sum": str(result.answered_sum),
            "unknown": result.unknown,
            "unknown_sum": str(result.unknown_sum),
            "measured": result.measured,
            "behind": result.behind,
            "asked_requests_per_s": result.asked_rate,
            "elapsed_s": result.elapsed_s,
            "requests_per_s": rate(result),
            "latency_ns": _times_ns(result.latencies),
            "raw_latency_ns": _times_ns(result.raw_latencies),
            "errors": result.errors,
            "total_before": _text(result.total_before),
            "total_after": _text(result.total_after),
            "check": {"verdict": verdict.word, "reason": verdict.reason},
            "verify": _proof(result.proof),
            "client_cpu_share": result.cpu_share,
            "thresholds": [_outcome(outcome) for outcome in outcomes],
            "timeline": _course(result),
        },
        indent=2,
    )


def _proof(proof: Proof | None) -> dict[str, Any] | None:
    """The proof of a run; None where none was asked for."""
    if proof is None:
        return None
    return {"verdict": proof.word, "reason": proof.reason, "evidence": list(proof.evidence)}


def _times_ns(latency: Histogram) -> dict[str, float] | None:
    """The latencies in nanoseconds; None where none were recorded."""
    if not len(latency):
        return None
    percentiles = {f"p{p:g}": latency.percentile_ns(p) for p in PERCENTILES}
    return {"mean": latency.mean_ns(), **percentiles, "max": latency.max_ns}


def _outcome(outcome: Outcome) -> dict[str, Any]:
    """A threshold; a value in nanoseconds for a latency, a share of 1 where the limit is in %."""
    text, value = str(outcome.threshold), outcome.value
    return {"threshold": text, "ok": outcome.ok, "value": value}


def _course(result: Result) -> dict[str, Any]:
    from counter.report.percentiles import moments

    return {
        "interval_s": result.timeline.interval_s,
        "intervals": [
            {
                "start_s": round(moment.start_s, 3),
                "seconds": moment.seconds,
                "requests": moment.requests,
                "requests_per_s": moment.rate,
                "latency_ns": None
                if moment.max_ns is None
                else {"p50": moment.p50_ns, "p99": moment.p99_ns, "max": moment.max_ns},
            }
            for moment in moments(result)
        ],
    }


def _total(total: int | None) -> str:
    return "unknown" if total is None else f"{total:,}"


def _text(number: int | None) -> str | None:
    return None if number is None else str(number)
