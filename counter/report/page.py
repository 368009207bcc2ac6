"""A run as one page that needs nothing else: no script, no address, no font from elsewhere.

The page's own policy forbids it to fetch anything. It says everything that is needed to judge the
run later, on another machine: what was asked for, of what, by which versions. Whatever came from
outside the program is escaped; passwords in addresses are masked before they get here.
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from counter.options.client import ClientSettings
from counter.options.shown import shown
from counter.options.values import masked
from counter.proof.history import EXPLAINED, IMPOSSIBLE, PROVED
from counter.report import charts
from counter.report.check import Conclusion, check_totals, conclude, errors_of
from counter.report.percentiles import PERCENTILES, Moment, moments, percentile_steps
from counter.report.table import lines
from counter.report.thresholds import Outcome
from counter.report.units import count, format_ns, format_s
from counter.results.result import Result
from counter.system.version import VERSION

PACKAGES: Final = ("gevent", "greenlet", "xxhash", "numpy")

POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"

_STYLE: Final = Path(__file__).with_name("page.css")


@dataclass(frozen=True)
class Conditions:
    """What a Result does not know of its run: who asked for it, when and where."""

    command: Sequence[str]
    cpus: float
    ended_at: datetime


def as_html(
    result: Result,
    settings: ClientSettings,
    outcomes: Sequence[Outcome],
    conditions: Conditions,
) -> str:
    """The whole page."""
    course = moments(result)
    date = conditions.ended_at.strftime("%Y-%m-%d %H:%M:%S %Z").strip()
    address = masked(str(settings.server_address))
    conclusion = conclude(result, outcomes)
    title = f"{conclusion.word}: {result.rate:,.0f} requests a second, {address}, {date}"
    body = [
        "<h1>Load on a counter server</h1>",
        f'<p class="faint">{_text(address)}, {_text(date)}</p>',
        _headline(conclusion),
        _figures(result, outcomes),
        *_findings(result, outcomes),
        *_charts(result, course, outcomes),
        "<h2>The run in figures</h2>",
        f"<pre>{_text(chr(10).join(lines(result, outcomes)))}</pre>",
        _interval_table(course),
        "<h2>Conditions</h2>",
        _command(conditions.command),
        _pairs(_conditions(result, settings, conditions, address, date)),
        "<details><summary>Every option</summary>",
        _pairs((option.flag, option.text) for option in shown(settings)),
        "</details>",
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>
{_STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
{chr(10).join(body)}
</body>
</html>
"""


def _headline(conclusion: Conclusion) -> str:
    kind = {"PASS": "ok", "FAIL": "bad"}.get(conclusion.word, "unsure")
    reasons = "".join(f"<li>{_text(reason)}</li>" for reason in conclusion.reasons)
    return f'<div class="headline {kind}"><b>{conclusion.word}</b><ul>{reasons}</ul></div>'


def _figures(result: Result, outcomes: Sequence[Outcome]) -> str:
    """The tiles; one whose threshold is breached is marked."""
    latency = result.latencies
    times = [(latency.percentile_ns(p), f"p{p:g}") for p in PERCENTILES] + [(latency.max_ns, "max")]
    figures = [
        (f"{result.rate:,.0f}", "requests/s", "rps"),
        *((format_ns(ns) if len(latency) else "none", name, name) for ns, name in times),
        (f"{sum(result.errors.values()):,}", "errors", "errors"),
    ]
    limits: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        limits.setdefault(outcome.threshold.measure, []).append(outcome)
    cells = []
    for figure, name, measure in figures:
        held = limits.get(measure, [])
        breached = " breached" if not all(outcome.ok for outcome in held) else ""
        wanted = "".join(f"<i>{_text(str(outcome.threshold))}</i>" for outcome in held)
        cells.append(
            f'<div class="figure{breached}"><b>{figure}</b><span>{name}</span>{wanted}</div>'
        )
    return f'<div class="figures">{"".join(cells)}</div>'


def _findings(result: Result, outcomes: Sequence[Outcome]) -> list[str]:
    check = check_totals(result)
    kind = {"ok": "ok", "wrong": "bad"}.get(check.word, "unsure")
    found = [_finding(kind, f"Totals {check.word}", check.reason)]
    if result.proof:
        known = {PROVED: "ok", EXPLAINED: "ok", IMPOSSIBLE: "bad"}
        kind = known.get(result.proof.word, "unsure")
        found.append(_finding(kind, "Proof", str(result.proof)))
    if errors := errors_of(result):
        limits = [outcome.ok for outcome in outcomes if outcome.threshold.measure == "errors"]
        kind = "unsure" if limits and all(limits) else "bad"
        found.append(_finding(kind, "Errors", errors))
    for outcome in outcomes:
        found.append(_finding("ok" if outcome.ok else "bad", "Threshold", str(outcome)))
    if result.interrupted:
        found.append(_finding("unsure", "Interrupted", f"after {format_s(result.elapsed_s)}"))
    return found


def _finding(kind: str, name: str, words: str) -> str:
    return f'<p class="verdict {kind}"><b>{_text(name)}</b>&ensp;{_text(words)}</p>'


def _charts(result: Result, course: Sequence[Moment], outcomes: Sequence[Outcome]) -> list[str]:
    if not len(result.latencies):
        return ["<h2>Charts</h2><p>Nothing was measured, so there is nothing to draw.</p>"]
    curves = [("latency", list(percentile_steps(result.latencies)))]
    if len(result.raw_latencies):
        raw = list(percentile_steps(result.raw_latencies))
        curves = [("since it was due", curves[0][1]), ("since it was sent", raw)]
    every = format_s(result.timeline.interval_s)
    found = []
    if len(course) > 1:
        rates, latencies = _limits(result, outcomes)
        found = [
            "<h2>Requests a second over time</h2>",
            charts.rate_chart(course, rates),
            *_dashed(rates),
        ]
        if any(moment.errors for moment in course):
            found += [f"<h2>Errors in each {every} over time</h2>", charts.error_chart(course)]
        found += [
            "<h2>Latency over time</h2>",
            charts.latency_chart(course, latencies),
            f'<p class="faint note">Of the replies in each {every}; a logarithmic axis.</p>',
            *_dashed(latencies),
        ]
    return [
        *found,
        "<h2>Latency by percentile</h2>",
        charts.percentile_chart(curves),
        '<p class="faint note">Each further nine takes the same room.</p>',
    ]


def _dashed(limits: Sequence[tuple[str, float]]) -> list[str]:
    """What the dashed lines of a chart are."""
    names = ", ".join(name for name, _ in limits)
    return [f'<p class="faint note">Dashed: {_text(names)}.</p>'] if limits else []


def _limits(
    result: Result, outcomes: Sequence[Outcome]
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """What the rate, and the latencies, are held against: names and values for the charts."""
    rates, latencies = [], []
    if result.asked_rate:
        rates.append((f"the {result.asked_rate:,.10g} asked for", result.asked_rate))
    for outcome in outcomes:
        threshold = outcome.threshold
        if threshold.measure == "rps":
            rates.append((str(threshold), float(threshold.limit)))
        elif threshold.measure not in ("errors", "mean") and threshold.limit > 0:
            latencies.append((str(threshold), float(threshold.limit)))
    return rates, latencies


def _interval_table(course: Sequence[Moment]) -> str:
    rows = []
    for moment in course:
        times = (moment.p50_ns, moment.p99_ns, moment.max_ns)
        cells = [
            f"{moment.start_s:.1f} s",
            f"{moment.requests:,}",
            f"{moment.rate:,.0f}",
            *("" if time_ns is None else format_ns(time_ns) for time_ns in times),
            f"{moment.errors:,}",
        ]
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    names = ("from", "requests", "a second", "p50", "p99", "max", "errors")
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        f"<details><summary>{count(len(course), 'interval')}</summary>"
        f'<div class="scroll"><table class="rows"><tr>{head}</tr>{"".join(rows)}</table></div>'
        "</details>"
    )


def _conditions(
    result: Result, settings: ClientSettings, conditions: Conditions, address: str, date: str
) -> list[tuple[str, str]]:
    loop = f"open, {result.asked_rate:,.10g} requests a second" if result.asked_rate else "closed"
    return [
        ("server", address + (" (TLS)" if settings.wants_tls() else "")),
        ("connections", f"{result.connections:,}"),
        ("processes", f"{result.processes:,}"),
        ("frames in flight", f"{settings.pipeline:,} per connection"),
        ("loop", loop),
        ("amounts", str(settings.amount)),
        ("warm-up", str(settings.warmup_s)),
        ("busiest process", f"{result.cpu_share:.0%} of a core"),
        ("CPUs of the client", f"{conditions.cpus:g}"),
        ("machine", platform.platform()),
        ("Python", f"{platform.python_implementation()} {platform.python_version()}"),
        ("versions", ", ".join(versions())),
        ("ended", date),
    ]


def _command(words: Iterable[str]) -> str:
    """The command line, which breaks between its words only."""
    shown = masked(shlex.join(words)).split(" ")
    return f'<p class="command">{" ".join(f"<span>{_text(word)}</span>" for word in shown)}</p>'


def versions() -> list[str]:
    """This program and the packages that make its speed, with their versions."""
    found = [f"counter {VERSION}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found


def _pairs(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{_text(name)}</th><td>{_text(text)}</td></tr>" for name, text in rows)
    return f'<table class="conditions">{cells}</table>'


def _text(text: str) -> str:
    return escape(text)
