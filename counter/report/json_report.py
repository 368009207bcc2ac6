"""A Result as JSON, for programs: what docs/result.schema.json describes.

Totals and sums are text, because many JSON readers end at 2^53.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from typing import Any, Final

from counter.options.client import ClientSettings
from counter.options.shown import plain_values
from counter.proof.history import Verdict
from counter.report.check import check_totals
from counter.report.percentiles import PERCENTILES, moments
from counter.report.thresholds import Outcome
from counter.results.histogram import Histogram
from counter.results.result import Result

# Grows when a name or a meaning changes; new names alone leave it.
JSON_VERSION: Final = 1


def as_json(result: Result, settings: ClientSettings, outcomes: Sequence[Outcome] = ()) -> str:
    """The whole report."""
    check = check_totals(result)
    return json.dumps(
        {
            "version": JSON_VERSION,
            "settings": plain_values(settings),
            "python": platform.python_version(),
            "machine": platform.platform(),
            "connections": result.connections,
            "processes": result.processes,
            "engine": result.engine,
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
            "requests_per_s": result.rate,
            "latency_ns": _times_ns(result.latencies),
            "raw_latency_ns": _times_ns(result.raw_latencies),
            "errors": result.errors,
            "total_before": _text(result.total_before),
            "total_after": _text(result.total_after),
            "check": {"verdict": check.word, "reason": check.reason},
            "verify": _proof(result.proof),
            "client_cpu_share": result.cpu_share,
            "thresholds": [_outcome(outcome) for outcome in outcomes],
            "timeline": _course(result),
        },
        indent=2,
    )


def _proof(proof: Verdict | None) -> dict[str, Any] | None:
    """The proof of a run; None where none was asked for."""
    if proof is None:
        return None
    return {"verdict": proof.word, "reason": proof.reason, "evidence": list(proof.evidence)}


def _times_ns(latency: Histogram) -> dict[str, float] | None:
    """The latencies in nanoseconds; None where nothing was measured."""
    if not len(latency):
        return None
    percentiles = {f"p{p:g}": latency.percentile_ns(p) for p in PERCENTILES}
    return {"mean": latency.mean_ns(), **percentiles, "max": latency.max_ns}


def _outcome(outcome: Outcome) -> dict[str, Any]:
    """A threshold; a value in nanoseconds for a latency, a share of 1 where the limit is in %."""
    text, value = str(outcome.threshold), outcome.value
    return {"threshold": text, "ok": outcome.ok, "value": value}


def _course(result: Result) -> dict[str, Any]:
    return {
        "interval_s": result.timeline.interval_s,
        "intervals": [
            {
                "start_s": round(moment.start_s, 3),
                "seconds": moment.seconds,
                "requests": moment.requests,
                "requests_per_s": moment.rate,
                "errors": moment.errors,
                "latency_ns": None
                if moment.max_ns is None
                else {"p50": moment.p50_ns, "p99": moment.p99_ns, "max": moment.max_ns},
            }
            for moment in moments(result)
        ],
    }


def _text(number: int | None) -> str | None:
    return None if number is None else str(number)
