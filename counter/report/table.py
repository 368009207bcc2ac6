"""The closing table of a run: what was done, how fast, and whether it was right, line by line.

compute -> lines -> sink: here are the lines. Nothing is measured, judged or written.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Final

from counter.report.check import check_totals
from counter.report.percentiles import PERCENTILES
from counter.report.thresholds import Outcome
from counter.report.units import count, format_ns, format_s
from counter.results.histogram import Histogram
from counter.results.result import Result

# Above this share of one core, a load process delays its own requests.
SATURATED: Final = 0.9
SATURATED_S: Final = 0.5  # below, the share is mostly the start of the run

# Up to these, requests that were due and not sent are those of the last instant.
BEHIND: Final = 5
BEHIND_SHARE: Final = 0.01


# What to do about an error, by the end of its kind.
_NOTES: Final = {
    "timeout": "no reply in time: is the store away, or --maxConnections reached?",
    os.strerror(errno.EMFILE).lower(): "raise the descriptor limit (ulimit -n), or lower "
    "--connections",
    os.strerror(errno.EADDRNOTAVAIL).lower(): "every local port is taken: lower --connections, or "
    "widen sysctl net.ipv4.ip_local_port_range",
}


def lines(result: Result, outcomes: Sequence[Outcome] = ()) -> list[str]:
    """The closing table."""
    check = check_totals(result)
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
        ("rate", f"{result.rate:,.0f} requests a second{asked}"),
        *_latency_rows(result),
        ("errors", (errors or "none") + unknown),
        ("total", f"{_total(result.total_before)} before, {_total(result.total_after)} after"),
        ("check", f"{check.word}: {check.reason}"),
        *(("threshold", str(outcome)) for outcome in outcomes),
    ]
    if result.proof:
        rows.append(("verify", str(result.proof)))
        rows += [("", line) for line in result.proof.evidence]
    rows += [("note", note) for kind, note in _NOTES.items() if _has_met(result, kind)]
    if result.behind > max(BEHIND, BEHIND_SHARE * (result.measured + result.behind)):
        rows.append(("behind", f"{count(result.behind, 'request')} due and not sent at the end"))
    if result.cpu_share > SATURATED and result.elapsed_s > SATURATED_S:
        share = f"{result.cpu_share:.0%} of a core"
        rows.append(("note", f"a load process took {share}: the client was the bottleneck"))
    table = [f"  {name:<9} {text}" for name, text in rows]
    return [f"{ending} after {format_s(result.elapsed_s)}.", "", *table]


def _has_met(result: Result, kind: str) -> bool:
    """Whether there was an error of a kind, on a connection or when one was to be made."""
    return kind in result.errors or f"connect: {kind}" in result.errors


def _latency_rows(result: Result) -> list[tuple[str, str]]:
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


def _total(total: int | None) -> str:
    return "unknown" if total is None else f"{total:,}"
