"""Whether a run kept to its thresholds: each against what was measured.

Pure. How a threshold is written is values.py's; which exit code follows is check.py's. A limit on
something that was not measured is breached: a test that measured nothing has shown nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from counter.options.values import Threshold
from counter.report.units import format_ns
from counter.results.result import Result

_HOLDS: Final[dict[str, Callable[[Decimal, Decimal], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Outcome:
    """A threshold, whether the run kept to it, and what was measured: None where nothing was.

    The value is in nanoseconds for a latency, else a number or a share of 1.
    """

    threshold: Threshold
    ok: bool
    value: float | None

    def __str__(self) -> str:
        return f"{self.threshold}  {'ok' if self.ok else 'BREACHED'}: {self._shown()}"

    def _shown(self) -> str:
        if self.value is None:
            return "nothing was measured"
        if self.threshold.is_share:
            return f"{self.value * 100:.3g} %"
        if self.threshold.measure in ("rps", "errors"):
            return f"{self.value:,.0f}"
        return format_ns(self.value)


def hold(result: Result, thresholds: Iterable[Threshold]) -> list[Outcome]:
    """Holds a run against each threshold, in the order given."""
    outcomes = []
    for threshold in thresholds:
        value = _measured(result, threshold)
        ok = value is not None and _HOLDS[threshold.sign](Decimal(value), threshold.limit)
        outcomes.append(Outcome(threshold, ok, value))
    return outcomes


def _measured(result: Result, threshold: Threshold) -> float | None:
    if threshold.measure == "errors":
        # Lost connections and failed attempts; a request whose outcome is unknown went with one.
        errors = sum(result.errors.values())
        if not threshold.is_share:
            return errors
        return errors / (result.sent + errors) if result.sent + errors else None
    if not result.measured:
        return None
    if threshold.measure == "rps":
        return result.rate
    if threshold.measure == "mean":
        return result.latencies.mean_ns()
    if threshold.measure == "max":
        return result.latencies.max_ns
    return result.latencies.percentile_ns(float(threshold.measure[1:]))
