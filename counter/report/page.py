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
from typing import Final

from counter.options.client import ClientSettings
from counter.options.shown import shown
from counter.options.values import masked
from counter.proof.verify import EXPLAINED, IMPOSSIBLE, PROVED
from counter.report import charts
from counter.report.percentiles import Moment, moments, percentile_steps
from counter.report.report import PERCENTILES, count, format_ns, format_s, judge, lines, rate
from counter.report.thresholds import Outcome
from counter.results.result import Result
from counter.system.version import VERSION

PACKAGES: Final = ("gevent", "greenlet", "xxhash", "numpy")

POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"

STYLE: Final = """
:root { color-scheme: light dark; --back: #fff; --card: #f6f7f9; --text: #1d2430; --faint: #5c6675;
  --line: #dfe3e8; --rate: #00798c; --p50: #00798c; --p99: #d1495b; --max: #8d96a3;
  --good: #1b7f4b; --bad: #c0293f; --unsure: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --back: #14181f; --card: #1c222b; --text: #e6e9ee;
  --faint: #9aa5b4; --line: #303845; --rate: #3fb8c9; --p50: #3fb8c9; --p99: #f0788a;
  --max: #a3adba; --good: #4cc38a; --bad: #ff7b8c; --unsure: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1.5rem 1.25rem 3rem; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0; } .faint { color: var(--faint); } .note { font-size: .87rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem;
  margin: 1.2rem 0 .8rem; }
.figure { background: var(--card); border-radius: .5rem; padding: .55rem .8rem; }
.figure b { display: block; font-size: 1.3rem; font-weight: 600; white-space: nowrap; }
.figure span { color: var(--faint); font-size: .85rem; }
.verdict { border-left: .3rem solid var(--unsure); background: var(--card); padding: .55rem .8rem;
  border-radius: 0 .5rem .5rem 0; margin: .5rem 0; overflow-wrap: anywhere; }
.verdict.ok { border-color: var(--good); } .verdict.ok b { color: var(--good); }
.verdict.bad { border-color: var(--bad); } .verdict.bad b { color: var(--bad); }
.verdict.unsure b { color: var(--unsure); }
.chart { display: block; width: 100%; height: auto; } .chart.narrow { display: none; }
pre { background: var(--card); border-radius: .5rem; padding: .8rem 1rem; overflow-x: auto;
  font: .8rem/1.5 ui-monospace, monospace; margin: .5rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { text-align: left; font-weight: 400; color: var(--faint); }
td, th { padding: .2rem .8rem .2rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
.rows td, .rows th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.scroll { overflow-x: auto; } summary { cursor: pointer; margin: 1rem 0 .4rem; }
.command { font: .85rem/1.5 ui-monospace, monospace; background: var(--card);
  border-radius: .5rem; padding: .6rem 1rem; margin: .5rem 0; }
.command span { display: inline-block; max-width: 100%; overflow-wrap: anywhere; }
.conditions th { width: 11rem; white-space: nowrap; }
@media (max-width: 640px) { body { padding: 1rem .9rem 2rem; } .chart.wide { display: none; }
  .chart.narrow { display: block; } .conditions th { width: 8.2rem; }
  .rows { font-size: .76rem; } .rows td, .rows th { padding: .15rem .3rem .15rem 0; }
  .figure b { font-size: 1.15rem; } pre { font-size: .75rem; } }
"""


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
    body = [
        "<h1>Load on a counter server</h1>",
        f'<p class="faint">{_text(address)}, {_text(date)}</p>',
        _figures(result),
        *_verdicts(result, outcomes),
        *_charts(result, course),
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
<title>{_text(f"{rate(result):,.0f} requests a second, {address}, {date}")}</title>
<style>{STYLE}</style>
</head>
<body>
{chr(10).join(body)}
</body>
</html>
"""


def _figures(result: Result) -> str:
    latency = result.latencies
    figures = [(f"{rate(result):,.0f}", "requests/s")]
    times = [(latency.percentile_ns(p), f"p{p:g}") for p in PERCENTILES] + [(latency.max_ns, "max")]
    figures += [(format_ns(time_ns) if len(latency) else "none", name) for time_ns, name in times]
    cells = (f'<div class="figure"><b>{a}</b><span>{b}</span></div>' for a, b in figures)
    return f'<div class="figures">{"".join(cells)}</div>'


def _verdicts(result: Result, outcomes: Sequence[Outcome]) -> list[str]:
    verdict = judge(result)
    kind = {"ok": "ok", "wrong": "bad"}.get(verdict.word, "unsure")
    found = [_verdict(kind, f"Totals {verdict.word}", verdict.reason)]
    if result.proof:
        known = {PROVED: "ok", EXPLAINED: "ok", IMPOSSIBLE: "bad"}
        kind = known.get(result.proof.word, "unsure")
        found.append(_verdict(kind, "Proof", str(result.proof)))
    errors = [f"{kind}: {number:,}" for kind, number in sorted(result.errors.items())]
    if result.unknown:
        errors.append(f"outcome unknown: {result.unknown:,}")
    if errors:
        limits = [outcome.ok for outcome in outcomes if outcome.threshold.measure == "errors"]
        kind = "unsure" if limits and all(limits) else "bad"
        found.append(_verdict(kind, "Errors", ", ".join(errors)))
    for outcome in outcomes:
        found.append(_verdict("ok" if outcome.ok else "bad", "Threshold", str(outcome)))
    if result.interrupted:
        found.append(_verdict("unsure", "Interrupted", f"after {format_s(result.elapsed_s)}"))
    return found


def _verdict(kind: str, name: str, words: str) -> str:
    return f'<p class="verdict {kind}"><b>{_text(name)}</b>&ensp;{_text(words)}</p>'


def _charts(result: Result, course: Sequence[Moment]) -> list[str]:
    if not len(result.latencies):
        return ["<h2>Charts</h2><p>Nothing was measured, so there is nothing to draw.</p>"]
    curves = [("latency", list(percentile_steps(result.latencies)))]
    if len(result.raw_latencies):
        raw = list(percentile_steps(result.raw_latencies))
        curves = [("since it was due", curves[0][1]), ("since it was sent", raw)]
    every = format_s(result.timeline.interval_s)
    found = []
    if len(course) > 1:
        found = [
            "<h2>Requests a second over time</h2>",
            charts.rate_chart(course),
            "<h2>Latency over time</h2>",
            charts.latency_chart(course),
            f'<p class="faint note">Of the replies in each {every}; a logarithmic axis.</p>',
        ]
    return [
        *found,
        "<h2>Latency by percentile</h2>",
        charts.percentile_chart(curves),
        '<p class="faint note">Each further nine takes the same room.</p>',
    ]


def _interval_table(course: Sequence[Moment]) -> str:
    rows = []
    for moment in course:
        times = (moment.p50_ns, moment.p99_ns, moment.max_ns)
        cells = [
            f"{moment.start_s:.1f} s",
            f"{moment.requests:,}",
            f"{moment.rate:,.0f}",
            *("" if time_ns is None else format_ns(time_ns) for time_ns in times),
        ]
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{n}</th>" for n in ("from", "requests", "a second", "p50", "p99", "max"))
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
