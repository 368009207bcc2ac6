"""What the bar says of a run, and that it leaves a terminal as it was."""

from __future__ import annotations

import errno
import io
import sys

import pytest

from counter.options.client import ClientSettings
from counter.report.progress import ProgressBar, RecentRate, Standing, format_left, standing
from counter.results.histogram import Histogram
from counter.results.result import Result


def measured(requests: int, elapsed_s: float = 0.0) -> Result:
    """A run so far, each request of 1 ms."""
    latencies = Histogram()
    latencies.count(1_000_000, requests)
    return Result(latencies=latencies, elapsed_s=elapsed_s)


WARM_UP = ClientSettings(warmup_s=1.0)


@pytest.mark.parametrize(
    ("elapsed_s", "settings", "share", "left"),
    [
        (0.0, WARM_UP, 0.0, "1:01"),
        (0.7, WARM_UP, 0.0, "1:00"),
        (0.7, ClientSettings(warmup_s=1.0, requests=10), 0.0, "?"),
        (11.0, WARM_UP, 1 / 6, "50 s"),
        (11.0, ClientSettings(warmup_s=1.0, duration_s=20.0), 0.5, "10 s"),
        (99.0, ClientSettings(warmup_s=1.0, duration_s=20.0), 1.0, "0 s"),
        (11.0, ClientSettings(warmup_s=1.0, requests=80_000), 0.25, "30 s"),
        (11.0, ClientSettings(warmup_s=1.0, requests=10), 1.0, "0 s"),
        (11.0, ClientSettings(warmup_s=1.0, requests=80_000, duration_s=20.0), 0.5, "10 s"),
        (11.0, ClientSettings(warmup_s=1.0, requests=25_000, duration_s=20.0), 0.8, "2 s"),
    ],
)
def test_progress_says_how_much_is_left_of_the_nearer_bound(
    elapsed_s: float, settings: ClientSettings, share: float, left: str
) -> None:
    now = standing(elapsed_s, measured(20_000), settings, 7.0)
    assert now.share == pytest.approx(share)
    assert now.left == left


def test_progress_has_the_rate_and_the_latency_of_the_measured_part() -> None:
    settings = ClientSettings(warmup_s=1.0, duration_s=20.0)
    now = standing(11.0, measured(60_000), settings, 7_000.0)
    assert now == Standing(0.5, "10 s", "7,000 requests a second, p99 1 ms")
    assert standing(0.5, measured(0), WARM_UP, 0.0).pace == "warming up"


def test_the_rate_is_that_of_the_last_two_seconds() -> None:
    rate = RecentRate()
    assert rate.of(measured(0, 0.0)) == 0, "the warm-up"
    assert rate.of(measured(500, 0.5)) == 1000
    for tenth in range(10, 105, 5):
        rate.of(measured(tenth * 100, tenth / 10))
    assert rate.of(measured(10_000, 11.0)) == 500, "it was 1,000 up to ten seconds, then nothing"
    assert rate.of(measured(10_000, 11.0)) == 500, "an old result says nothing new"
    assert rate.of(measured(10_000, 12.5)) == 0


def test_progress_says_how_many_errors_there_were() -> None:
    so_far = measured(10)
    so_far.errors = {"timeout": 1}
    assert standing(11.0, so_far, WARM_UP, 5).pace == "5 requests a second, p99 1 ms, 1 error"
    so_far.errors = {"timeout": 1, "connection closed": 1200}
    assert standing(11.0, so_far, WARM_UP, 5).pace.endswith("p99 1 ms, 1,201 errors")


def test_a_run_that_has_measured_nothing_yet_does_not_know_its_end() -> None:
    now = standing(11.0, measured(0), ClientSettings(warmup_s=1.0, requests=5), 0.0)
    assert (now.share, now.left) == (0.0, "?")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (65, "1:05"), (7200, "2:00:00"), (-1, "0 s")],
)
def test_a_rest_of_time_is_short(seconds: float, text: str) -> None:
    assert format_left(seconds, 0) == text


def test_nothing_is_shown_or_imported_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    stream = io.StringIO()
    with ProgressBar(WARM_UP, stream) as bar:
        bar.update(2.0, measured(10))
    assert stream.getvalue() == ""
    assert "rich" not in sys.modules


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_gone_afterwards_and_the_cursor_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()

    def run() -> None:
        with ProgressBar(WARM_UP, stream) as bar:
            bar.update(31.0, measured(10_000, 30.0))
            shown = stream.getvalue()
            assert "50%  30 s left" in shown
            assert "333 requests a second, p99 1 ms" in shown
            assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "a kill leaves it so"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert stream.getvalue().endswith("\x1b[2K"), "the line is erased last"


class GoneTerminal(Terminal):
    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_a_terminal_that_is_gone_does_not_end_the_run() -> None:
    with ProgressBar(WARM_UP, GoneTerminal()) as bar:
        for elapsed_s in (2.0, 3.0):
            bar.update(elapsed_s, measured(10))
