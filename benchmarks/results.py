"""Question: what do the measurements of a comparison say? Medians, ratios, a table.

Command: none, compare.py and commit_ways.py use it. Nothing here starts or measures anything.

Invalid if: a ratio is taken between different rounds. The machine's speed drifts by tens of percent
within minutes, so a ratio is always that of two runs in one round, and its median is over rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

# The peers that the plot holds others against and labels, and that of the pairs.
FLOOR, SERVER, GO_PAIR = "floor", "server", "go_pair"


@dataclass(frozen=True)
class Case:
    """One kind of load: how it is called, the generator's flags for it, and who takes part."""

    key: str
    title: str
    flags: Sequence[str]
    peers: Sequence[str]
    length: float = 1  # measured for so many times the seconds of a run


@dataclass(frozen=True)
class Measurement:
    """One run. What a case does not measure is None."""

    rate: float  # requests a second
    p50_us: float | None = None
    p99_us: float | None = None
    cpu_us: float | None = None  # the server's, per request
    generator_share: float | None = None  # of one CPU

    @property
    def server_share(self) -> float | None:
        """How much of one CPU the server took."""
        return None if self.cpu_us is None else self.cpu_us * self.rate / 1e6


@dataclass
class Results:
    """Everything that was measured: by case, peer and round."""

    rounds: int
    seconds: float
    runs: dict[tuple[str, str], dict[int, Measurement]] = field(default_factory=dict)
    idle_bytes: dict[str, float] = field(default_factory=dict)  # by peer, per connection
    skipped: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, case: str, peer: str, round_number: int, measurement: Measurement) -> None:
        self.runs.setdefault((case, peer), {})[round_number] = measurement

    def rates(self, case: str, peer: str) -> list[float]:
        return [run.rate for run in self.runs.get((case, peer), {}).values()]

    def ratios(self, case: str, peer: str, base: str) -> list[float]:
        """The peer's rate over that of `base`, for each round in which both ran."""
        bases = self.runs.get((case, base), {})
        runs = self.runs.get((case, peer), {})
        return [run.rate / bases[number].rate for number, run in runs.items() if number in bases]

    def median(
        self, case: str, peer: str, value: Callable[[Measurement], float | None]
    ) -> float | None:
        runs = self.runs.get((case, peer), {}).values()
        values = [number for run in runs if (number := value(run)) is not None]
        return statistics.median(values) if values else None


def amount_text(number: float) -> str:
    """Three digits and a unit: `131 k`."""
    for unit, size in ((" M", 1e6), (" k", 1e3)):
        if number >= size:
            return three_digits(number / size) + unit
    return three_digits(number)


def rate_text(rates: Sequence[float]) -> str:
    """The median and, in brackets, the lowest and highest: `131 k (124 k-140 k)`."""
    return _spread_text(rates, amount_text)


def ratio_text(ratios: Sequence[float]) -> str:
    """The median and, in brackets, the lowest and highest: `0.94 (0.91-0.97)`."""
    return _spread_text(ratios, lambda ratio: f"{ratio:.2f}")


def _spread_text(numbers: Sequence[float], text: Callable[[float], str]) -> str:
    if not numbers:
        return "-"
    low, high = min(numbers), max(numbers)
    spread = f" ({text(low)}-{text(high)})" if low < high else ""
    return text(statistics.median(numbers)) + spread


def time_text(time_us: float | None) -> str:
    if time_us is None:
        return "-"
    return (
        f"{three_digits(time_us / 1000)} ms" if time_us >= 1000 else f"{three_digits(time_us)} us"
    )


def share_text(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def three_digits(number: float) -> str:
    """Without an exponent; all digits of what has more before the point."""
    return f"{number:.0f}" if number >= 99.95 else f"{number:#.3g}"


def load_table(
    results: Results,
    cases: Iterable[Case],
    names: Mapping[str, str],
    bases: Mapping[str, str],
) -> list[str]:
    """One row for each case and server, as a Markdown table.

    `bases` are the peers that all are held against, by what the column is called.
    """
    header = ["case", "server", "requests/s", *bases]
    header += ["server CPU us/request", "server busy", "generator busy", "p50", "p99"]
    rows = []
    for case in cases:
        measured = [peer for peer in case.peers if (case.key, peer) in results.runs]
        for place, peer in enumerate(measured):
            title = case.title if place == 0 else ""
            ratios = [ratio_text(results.ratios(case.key, peer, base)) for base in bases.values()]
            rate = rate_text(results.rates(case.key, peer))
            rows.append([title, names[peer], rate, *ratios, *_cost_cells(results, case.key, peer)])
    return markdown_table(header, rows)


def _cost_cells(results: Results, case: str, peer: str) -> list[str]:
    cpu_us = results.median(case, peer, lambda run: run.cpu_us)
    return [
        "-" if cpu_us is None else three_digits(cpu_us),
        share_text(results.median(case, peer, lambda run: run.server_share)),
        share_text(results.median(case, peer, lambda run: run.generator_share)),
        time_text(results.median(case, peer, lambda run: run.p50_us)),
        time_text(results.median(case, peer, lambda run: run.p99_us)),
    ]


def pair_table(results: Results, case: Case, names: Mapping[str, str]) -> list[str]:
    """Server and client together: one row for each pair, as a Markdown table."""
    rows = [
        [
            names[peer],
            rate_text(results.rates(case.key, peer)),
            ratio_text(results.ratios(case.key, peer, GO_PAIR)),
        ]
        for peer in case.peers
        if (case.key, peer) in results.runs
    ]
    return markdown_table(["server and client", "requests/s", "of the Go pair"], rows)


def memory_table(results: Results, names: Mapping[str, str]) -> list[str]:
    rows = [
        [names[peer], f"{size / 1000:.1f} KB"]
        for peer, size in sorted(results.idle_bytes.items(), key=lambda item: item[1])
    ]
    return markdown_table(["server", "memory per idle connection"], rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table that reads well as plain text too; none without rows."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [header, rule, *rows]
    ]
