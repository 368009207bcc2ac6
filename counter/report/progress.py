"""The bar on a terminal while a run lasts: how far it is, its rate, its p99 and errors.

Where there is no terminal the log says once what begins, and nothing more until the end: it is read
later, or by a machine.

What the bar says is a pure function of the result so far; rich draws it, and is imported only where
there is a terminal. Its own refreshing, a thread, stays off: the parent forks, and has no thread.
The bar is drawn when results come, twice a second, and is gone afterwards.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TextIO

from counter.options.client import ClientSettings
from counter.options.values import Seconds
from counter.report.units import count, format_ns
from counter.results.result import Result

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_log = logging.getLogger("client")


@dataclass(frozen=True)
class Standing:
    """How far a run is: the share that is done, what is left, and how it goes."""

    share: float
    left: str
    pace: str


class RecentRate:
    """The requests a second of the last two seconds: what hangs or recovers shows at once."""

    WINDOW_S: Final = 2.0

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque([(0.0, 0)])

    def of(self, so_far: Result) -> float:
        """The rate up to this result; by its own clock, since it may be half a second old."""
        at_s, done = so_far.elapsed_s, len(so_far.latencies)
        if at_s > self._samples[-1][0]:
            self._samples.append((at_s, done))
        while len(self._samples) > 2 and self._samples[1][0] <= at_s - self.WINDOW_S:
            self._samples.popleft()
        (from_s, before), (to_s, after) = self._samples[0], self._samples[-1]
        return (after - before) / (to_s - from_s) if to_s > from_s else 0.0


def standing(elapsed_s: float, so_far: Result, settings: ClientSettings, rate: float) -> Standing:
    """Where a run stands `elapsed_s` after its start; of two bounds the nearer one counts."""
    duration_s = settings.planned_duration_s
    if elapsed_s < settings.warmup_s:
        whole_s = None if duration_s is None else settings.warmup_s + duration_s
        return Standing(0.0, format_left(whole_s, elapsed_s), "warming up")
    measured_s = max(elapsed_s - settings.warmup_s, 0.001)
    done = len(so_far.latencies)
    ends: list[tuple[float, float | None]] = []  # share done and seconds in all, by each bound
    if duration_s is not None:
        ends.append((measured_s / duration_s, duration_s))
    if settings.requests is not None and done:
        share = done / settings.requests
        ends.append((share, measured_s / share))
    share, whole_s = max(ends, default=(0.0, None))
    left = format_left(whole_s, measured_s)
    pace = [f"{rate:,.0f} requests a second"]
    if done:
        pace.append(f"p99 {format_ns(so_far.latencies.percentile_ns(99))}")
    if errors := sum(so_far.errors.values()):
        pace.append(count(errors, "error"))
    return Standing(min(1.0, share), left, ", ".join(pace))


def beginning(connections: int, settings: ClientSettings) -> str:
    """What begins: the load and what bounds it."""
    bounds = []
    if settings.planned_duration_s is not None:
        bounds.append(str(Seconds(settings.planned_duration_s)))
    if settings.requests is not None:
        bounds.append(count(settings.requests, "request"))
    warmup = f" after {Seconds(settings.warmup_s)} of warm-up" if settings.warmup_s else ""
    return f"Starting {count(connections, 'connection')} for {' or '.join(bounds)}{warmup}"


def format_left(whole_s: float | None, elapsed_s: float) -> str:
    """What is left of some time: 59 s, 1:05, 2:00:00, or ? where nobody knows."""
    if whole_s is None:
        return "?"
    left_s = max(0, round(whole_s - elapsed_s))
    if left_s < 60:
        return f"{left_s} s"
    minutes, hours = left_s // 60 % 60, left_s // 3600
    return f"{hours}:{minutes:02}:{left_s % 60:02}" if hours else f"{minutes}:{left_s % 60:02}"


class ProgressBar:
    """Shows where a run stands, if the stream is a terminal; a context that leaves it clean.

    Otherwise the first update is logged, as the beginning of the run.
    """

    def __init__(self, settings: ClientSettings, stream: TextIO) -> None:
        self._settings = settings
        self._stream = stream
        self._rate = RecentRate()
        self._shown = stream.isatty()
        self._says_start = not self._shown
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def update(self, elapsed_s: float, so_far: Result) -> None:
        """Draws the bar anew."""
        if self._says_start:
            self._says_start = False
            _log.info("%s", beginning(so_far.connections, self._settings))
        if not self._shown:
            return
        now = standing(elapsed_s, so_far, self._settings, self._rate.of(so_far))
        try:
            bar, task = self._started()
            bar.update(task, completed=now.share, left=now.left, pace=now.pace)
            bar.refresh()
        except (ImportError, OSError):  # no package, or the terminal is gone: the run goes on
            self._shown = False

    def end(self, text: str) -> None:
        """Takes the bar away for good, and says something in its place."""
        self._shown = False
        with contextlib.suppress(OSError):  # the terminal is gone
            if self._bar is not None:
                self._bar.stop()
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def _started(self) -> tuple[Progress, TaskID]:
        if self._bar is not None and self._task is not None:
            return self._bar, self._task
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(file=self._stream, highlight=False)
        self._bar = Progress(
            BarColumn(24),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[left]} left", markup=False),
            TextColumn("{task.fields[pace]}", markup=False),
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("", total=1.0, left="", pace="")
        self._bar.start()
        # A client that is killed cannot give the terminal its cursor back.
        console.show_cursor(True)
        return self._bar, self._task

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):  # as above
                self._bar.stop()
