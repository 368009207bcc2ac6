"""The page of a run: whole in itself, true to the result, and safe whatever the run was given."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest

from counter.options.client import ClientSettings
from counter.options.values import Address, parse_thresholds
from counter.proof.history import Verdict
from counter.report.charts import even_ticks, format_count, log_ticks, nines_of
from counter.report.page import Conditions, as_html
from counter.report.thresholds import hold
from counter.results.histogram import Histogram
from counter.results.result import Result
from counter.results.timeline import Interval, Timeline

CONDITIONS = Conditions(
    ["python", "client.py", "--rate", "100"], 1.5, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
)


def make_result(intervals: int = 60, longest_ns: int = 20_000_000) -> Result:
    """A run of so many seconds, each with 999 requests of 1 ms and one of the longest time."""
    result = Result(elapsed_s=float(intervals), connections=40, processes=2, measured=0)
    line = []
    for second in range(intervals):
        part = Histogram()
        part.count(1_000_000 + second * 10_000, 999)
        part.count(longest_ns)
        result.latencies.merge(part)
        line.append(Interval(1.0, {bucket: n for bucket, n in enumerate(part.counts) if n}))
    result.timeline = Timeline(0, 1.0, line)
    result.measured = result.sent = result.answered = result.answered_sum = 1000 * intervals
    result.total_before, result.total_after = 0, result.answered_sum
    return result


def page_of(
    result: Result,
    settings: ClientSettings | None = None,
    conditions: Conditions = CONDITIONS,
) -> str:
    settings = settings or ClientSettings()
    return as_html(result, settings, hold(result, settings.threshold), conditions)


class _Reader(HTMLParser):
    """Finds elements that are not closed, and whatever a browser would fetch or run."""

    VOID = frozenset({"meta", "rect", "line", "path", "circle", "link", "img", "br", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("script", "link", "img", "iframe", "object", "embed", "base", "image", "use"):
            self.fetched.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action") or name.startswith("on"):
                self.fetched.append(f"{name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read_page(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_needs_nothing_else_and_runs_nothing() -> None:
    page = page_of(make_result())
    assert read_page(page).fetched == []
    assert not re.search(r"url\(|@import|<\?", page)
    addresses = set(re.findall(r"\w+://[^\s\"'<]+|//\w+\.[^\s\"'<]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}, "the name of SVG, which nobody fetches"
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page


def test_the_page_has_a_bounded_size() -> None:
    result = make_result(119)
    result.raw_latencies.merge(result.latencies)
    assert len(page_of(result).encode()) < 200_000


def test_the_page_has_each_chart_for_both_widths() -> None:
    page = page_of(make_result())
    for title in ("requests a second", "latency", "latency by percentile"):
        assert page.count(f"<title>{title}</title>") == 2
    assert page.count("chart wide") == page.count("chart narrow") == 3


def test_the_page_says_what_the_run_found_and_under_what_conditions() -> None:
    result = make_result()
    settings = ClientSettings(
        server_address=Address("example.org", 81), threshold=parse_thresholds("p99<1us,max<1s")
    )
    page = "".join(read_page(page_of(result, settings)).texts)
    for text in (
        *("example.org:81", "2026-01-02 03:04:05 UTC", "python client.py --rate 100"),
        *("1,000 requests a second", "the total grew by exactly the 60,000 answered"),
        *("p99<1us  BREACHED", "max<1s  ok: 20 ms", "CPUs of the client1.5", "Python", "gevent "),
        *("40 connections in 2 processes", "--pipeline1", "60 intervals"),
    ):
        assert text in page


@pytest.mark.parametrize(
    ("word", "kind"),
    [("proved", "ok"), ("explained", "ok"), ("undecided", "unsure"), ("impossible", "bad")],
)
def test_a_proof_is_among_the_verdicts(word: str, kind: str) -> None:
    result = make_result()
    result.proof = Verdict(word, "so it is")
    assert f'class="verdict {kind}"><b>Proof</b>&ensp;{result.proof}</p>' in page_of(result)


def test_errors_within_their_threshold_are_no_failure_of_the_page() -> None:
    result = make_result()
    result.count_error("timeout")
    for limit, kind in (("errors<2", "unsure"), ("errors<1", "bad"), ("max<1m", "bad")):
        page = page_of(result, ClientSettings(threshold=parse_thresholds(limit)))
        assert f'class="verdict {kind}"><b>Errors</b>' in page


def test_a_run_that_measured_nothing_has_no_latencies_on_its_page() -> None:
    page = page_of(Result())
    assert page.count("<b>none</b>") == 5
    assert "0 ns" not in page


def test_wrong_totals_errors_and_an_interrupt_are_told_apart() -> None:
    result = make_result()
    assert 'class="verdict ok"><b>Totals ok' in page_of(result)
    result.total_after = 5
    result.count_error("timeout")
    result.interrupted = True
    page = page_of(result)
    assert 'class="verdict bad"><b>Totals wrong' in page
    assert 'class="verdict bad"><b>Errors</b>&ensp;timeout: 1' in page
    assert 'class="verdict unsure"><b>Interrupted' in page
    assert 'class="verdict unsure"><b>Totals not checked' in page_of(Result())


def test_whatever_the_run_was_given_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    result = make_result()
    result.count_error(evil)
    settings = ClientSettings(server_address=Address(evil, 1), json=evil)
    page = page_of(result, settings, replace(CONDITIONS, command=["client.py", evil]))
    assert "<script" not in page
    assert read_page(page).fetched == []


def test_passwords_are_masked() -> None:
    secret = "redis://user:secret@host/0"
    conditions = replace(CONDITIONS, command=["client.py", "--json", secret])
    page = page_of(make_result(), ClientSettings(json=secret), conditions)
    assert "secret" not in page
    assert page.count("redis://user:***@host/0") == 2


@pytest.mark.parametrize("result", [Result(), Result(errors={"timeout": 3}, interrupted=True)])
def test_a_run_without_measurements_has_a_page_too(result: Result) -> None:
    assert "Nothing was measured" in "".join(read_page(page_of(result)).texts)


@pytest.mark.parametrize("longest_ns", [1_000_001, 2**42, 2**60])
@pytest.mark.parametrize("intervals", [1, 2, 119])
def test_runs_of_every_length_are_drawn(intervals: int, longest_ns: int) -> None:
    page = page_of(make_result(intervals, longest_ns))
    read_page(page)
    assert page.count("<svg") == (2 if intervals == 1 else 6)


def test_an_interval_without_an_answer_is_a_gap_and_no_error() -> None:
    result = make_result(5)
    result.timeline.intervals[2] = Interval(1.0, {})
    read_page(page_of(result))


def test_a_run_of_times_below_a_microsecond_is_drawn() -> None:
    result = Result(measured=10, elapsed_s=1.0)
    result.latencies.count(0, 10)
    counts = {0: 10}
    result.timeline = Timeline(0, 0.5, [Interval(0.5, counts), Interval(0.5, {})])
    read_page(page_of(result))


def test_an_open_loop_has_both_curves() -> None:
    result = make_result()
    result.raw_latencies.merge(result.latencies)
    page = page_of(result)
    assert "since it was due" in page
    assert "since it was sent" in page


@pytest.mark.parametrize(
    ("most", "wanted", "ticks"),
    [
        (10, 5, [0, 2, 4, 6, 8, 10]),
        (60, 10, [0, 10, 20, 30, 40, 50, 60]),
        (0.3, 5, [0, 0.1, 0.2, 0.3]),
        (68_815, 5, [0, 20_000, 40_000, 60_000, 80_000]),
    ],
)
def test_ticks_are_round_and_even(most: float, wanted: int, ticks: list[float]) -> None:
    assert even_ticks(most, wanted) == ticks


@pytest.mark.parametrize(
    ("least", "most", "ticks"),
    [
        (150, 4000, [100, 200, 500, 1000, 2000, 5000]),
        (1000, 1000, [1000]),
        (3, 10**9, [10**power for power in range(10)]),
    ],
)
def test_ticks_of_a_logarithmic_axis_enclose_the_values(
    least: float, most: float, ticks: list[float]
) -> None:
    assert log_ticks(least, most, 8) == ticks


def test_each_nine_is_a_unit_of_the_percentile_axis() -> None:
    assert [round(nines_of(share), 9) for share in (0, 0.9, 0.99, 0.999)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (950, "950"), (12_500, "12.5k"), (75e6, "75M"), (0.5, "0.5")]
)
def test_counts_are_short(number: float, text: str) -> None:
    assert format_count(number) == text


def test_drawing_leaves_no_hook_in_the_importer() -> None:
    """pygal's has no find_spec, for which Python 3.11 warns at every later import."""
    assert all(hasattr(hook, "find_spec") for hook in sys.meta_path)


@pytest.mark.parametrize(
    ("thresholds", "errors", "headline"),
    [
        ("", 0, '<div class="headline ok"><b>PASS</b>'),
        ("max<1ms", 0, '<div class="headline bad"><b>FAIL</b>'),
        ("", 1, '<div class="headline bad"><b>FAIL</b>'),
    ],
)
def test_what_decides_comes_first(thresholds: str, errors: int, headline: str) -> None:
    result = make_result()
    if errors:
        result.count_error("timeout")
    page = page_of(result, ClientSettings(threshold=parse_thresholds(thresholds)))
    assert page.index(headline) < page.index('<div class="figures">')
    word = "PASS" if "PASS" in headline else "FAIL"
    assert f"<title>{word}: " in page


def test_a_breached_figure_is_marked_and_its_limit_is_drawn() -> None:
    settings = ClientSettings(threshold=parse_thresholds("max<1ms,p99<1m,rps>5"))
    page = page_of(make_result(), settings)
    assert page.count('<div class="figure breached">') == 1
    assert re.search(r'figure breached"><b>[^<]*</b><span>max</span><i>max&lt;1ms</i>', page)
    assert "Dashed: max&lt;1ms, p99&lt;1m.</p>" in page
    assert "Dashed: rps&gt;5.</p>" in page
    assert page.count("6,5") >= 6, "lines in both drawings of both charts"


def test_errors_have_a_chart_where_there_are_any() -> None:
    result = make_result(5)
    assert "<title>errors</title>" not in page_of(result)
    result.timeline.intervals[2] = Interval(1.0, {}, 7)
    result.errors["timeout"] = 7
    page = page_of(result)
    assert page.count("<title>errors</title>") == 2
    assert "<td>7</td>" in page


def test_the_asked_rate_is_drawn_beside_what_was_answered() -> None:
    result = make_result()
    result.asked_rate = 1500.0
    assert "Dashed: the 1,500 asked for.</p>" in page_of(result)


def test_charts_of_one_time_axis_leave_their_labels_the_same_room() -> None:
    page = page_of(make_result())
    labels = re.findall(r'text-anchor[^>]*>|<text[^>]*class="[^"]*"[^>]*>([^<]*)</text>', page)
    assert any(label.startswith("\u2007") for label in labels)
