"""The charts of a run as SVG, drawn by pygal: rate and latency over time, and the percentiles.

Each is drawn twice, wide and narrow, because a drawing that is scaled to a phone has letters that
nobody can read; the page shows the one that fits. Colours are the page's CSS variables, so that
light and dark are the page's affair. What pygal would fetch from the network is taken out.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pygal
from pygal.style import Style

from counter.report.percentiles import Moment, Step
from counter.report.units import format_ns

# pygal puts a hook for its plugins, which there are none of here, before what is imported later.
sys.meta_path[:] = [hook for hook in sys.meta_path if type(hook).__name__ != "PluginImportFixer"]

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """A named line; the colour is a CSS colour."""

    name: str
    colour: str
    points: Sequence[Point]
    is_limit: bool = False  # something to hold the others against: dashed, and not filled


@dataclass(frozen=True)
class Size:
    """One drawing's size in CSS pixels, and how many labels its axes have room for."""

    name: str  # the CSS class of the drawing
    width: int
    height: int
    labels: int


SIZES: Final = (Size("wide", 880, 300, 10), Size("narrow", 360, 260, 4))

# One meaning a colour, on the tiles and in every chart.
P50, P99, MAX = "var(--p50)", "var(--p99)", "var(--max)"
RATE, ERRORS, LIMIT = "var(--rate)", "var(--bad)", "var(--limit)"
SINCE_DUE, SINCE_SENT = "var(--due)", "var(--sent)"

# Labels of the upright axes are filled up to so many characters, so that pygal leaves all of them
# the same room: charts of one time axis can be read one below the other.
LABEL_WIDTH: Final = 7
FIGURE_SPACE: Final = "\u2007"  # as wide as a digit

HEADROOM: Final = 1.05  # of the highest point below the upper edge

# Labels of the percentile axis; its unit is one more nine.
NINES: Final = ("0%", "90%", "99%", "99.9%", "99.99%", "99.999%", "99.9999%", "99.99999%")


def rate_chart(course: Sequence[Moment], limits: Sequence[tuple[str, float]] = ()) -> str:
    """Requests a second over time, and what they were to be: the names and rates of `limits`."""
    series = [Series("answered", RATE, [(_middle(m), m.rate) for m in course])]
    series += _limits(limits, _end(course))
    return _drawings(series, _end(course), format_count, "requests a second", fill=True)


def error_chart(course: Sequence[Moment]) -> str:
    """Errors of each interval over time."""
    series = [Series("errors", ERRORS, [(_middle(m), m.errors) for m in course])]
    return _drawings(series, _end(course), format_count, "errors", fill=True)


def _limits(limits: Sequence[tuple[str, float]], end_s: float) -> list[Series]:
    return [
        Series(name, _colour(name), [(0.0, y), (end_s, y)], is_limit=True) for name, y in limits
    ]


def _colour(limit: str) -> str:
    """That of what a limit is for, where it has one."""
    measure = re.split("[<>]", limit)[0]
    return {"p50": P50, "p99": P99, "max": MAX, "rps": RATE}.get(measure, LIMIT)


def latency_chart(course: Sequence[Moment], limits: Sequence[tuple[str, float]] = ()) -> str:
    """Median, 99th percentile and maximum of each interval over time; the axis is logarithmic.

    `limits` are names and nanoseconds that some of them were to keep to.
    """
    series = [
        Series("max", MAX, [(_middle(m), m.max_ns) for m in course]),
        Series("p99", P99, [(_middle(m), m.p99_ns) for m in course]),
        Series("p50", P50, [(_middle(m), m.p50_ns) for m in course]),
        *_limits(limits, _end(course)),
    ]
    return _drawings(series, _end(course), format_ns, "latency", logarithmic=True)


def percentile_chart(curves: Sequence[tuple[str, Sequence[Step]]]) -> str:
    """Latency by percentile, each nine as wide as the one before, as HdrHistogram plots it.

    Of an open loop there are two curves.
    """
    colours = (SINCE_DUE, SINCE_SENT) if len(curves) > 1 else (SINCE_DUE,)
    series = [
        Series(name, colour, [(nines_of(step.share), step.value_ns) for step in steps[:-1]])
        for (name, steps), colour in zip(curves, colours, strict=False)
    ]
    # The last step is 100 %, which is infinitely far to the right.
    most = max((x for line in series for x, _ in line.points), default=1.0)
    labels = [(float(at), text) for at, text in enumerate(NINES) if at <= math.ceil(most)]
    return _drawings(series, max(1.0, most), format_ns, "latency by percentile", x_labels=labels)


def nines_of(share: float) -> float:
    """How many nines a share has: 0 of 0, 1 of 0.9, 2 of 0.99."""
    return -math.log10(1 - share)


def format_count(number: float) -> str:
    """A number in few characters: 950, 12.5k, 75M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def even_ticks(most: float, wanted: int) -> list[float]:
    """Round numbers from 0 up to the first at or above `most`, about as many as wanted."""
    rough = max(most, 1e-9) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [round(step * index, 9) for index in range(math.ceil(most / step - 1e-9) + 1)]


def log_ticks(least: float, most: float, wanted: int) -> list[float]:
    """Round numbers that enclose a range, evenly spaced on a logarithmic axis."""
    low, high = math.floor(math.log10(least)), math.ceil(math.log10(most))
    factors = (1, 2, 5) if (high - low) * 2 < wanted else (1,)
    ticks = [f * 10.0**power for power in range(low, high + 1) for f in factors]
    below = max((tick for tick in ticks if tick <= least * 1.001), default=ticks[0])
    above = min((tick for tick in ticks if tick >= most * 0.999), default=ticks[-1])
    return [tick for tick in ticks if below <= tick <= above]


def _middle(moment: Moment) -> float:
    return moment.start_s + moment.seconds / 2


def _end(course: Sequence[Moment]) -> float:
    return course[-1].start_s + course[-1].seconds if course else 1.0


def _drawings(
    series: Sequence[Series],
    x_end: float,
    y_format: Callable[[float], str],
    title: str,
    x_labels: Sequence[tuple[float, str]] | None = None,
    logarithmic: bool = False,
    fill: bool = False,
) -> str:
    return "\n".join(
        _draw(series, x_end, y_format, title, size, x_labels, logarithmic, fill) for size in SIZES
    )


def _draw(
    series: Sequence[Series],
    x_end: float,
    y_format: Callable[[float], str],
    title: str,
    size: Size,
    x_labels: Sequence[tuple[float, str]] | None,
    logarithmic: bool,
    fill: bool,
) -> str:
    values = [y for line in series for _, y in line.points if y]
    if not values:
        return ""
    low, high, y_labels = _y_axis(values, y_format, logarithmic)
    if x_labels is None:
        ticks = even_ticks(x_end, size.labels)
        x_labels = [(tick, f"{tick:g} s") for tick in ticks if tick <= x_end * 1.001]
    x_labels = x_labels[:: math.ceil(len(x_labels) / (size.labels + 1))]
    chart = pygal.XY(
        style=_style([line.colour for line in series]),
        js=(),
        width=size.width,
        height=size.height,
        margin=4,
        margin_right=24,  # half of the last label of the axis
        spacing=8,
        show_dots=False,
        show_legend=sum(not line.is_limit for line in series) > 1,
        legend_at_bottom=True,
        legend_at_bottom_columns=len(series),
        legend_box_size=10,
        truncate_legend=-1,
        truncate_label=-1,
        show_x_guides=True,
        allow_interruptions=True,
        x_labels=[{"value": value, "label": text} for value, text in x_labels],
        xrange=(0, x_end),
        y_labels=y_labels,
        range=(low, high),
        fill=fill,
        stroke_style={"width": 2, "linejoin": "round"},
        disable_xml_declaration=True,
        classes=("chart", size.name),
        title=None,
    )
    for line in series:
        # pygal's own logarithmic axis takes the other axis with it.
        points = [(x, math.log10(y) if y and logarithmic else y) for x, y in line.points]
        style = {"width": 2, "dasharray": "6,5"} if line.is_limit else None
        # A limit is named in the text: a narrow drawing has no room for more.
        name = None if line.is_limit else line.name
        chart.add(name, points, stroke_style=style, fill=fill and not line.is_limit)
    chart.add_xml_filter(_still)
    svg: str = chart.render(is_unicode=True)
    return svg.replace("<title>Pygal</title>", f"<title>{title}</title>")


def _y_axis(
    values: Sequence[float], y_format: Callable[[float], str], logarithmic: bool
) -> tuple[float, float, list[dict[str, Any]]]:
    """Its lower and upper end and its labels, as pygal takes them; logarithms if it is one."""
    top = max(values)
    if logarithmic:
        ticks = log_ticks(min(values), top, 8)
        labels = [{"value": math.log10(tick), "label": _label(y_format(tick))} for tick in ticks]
        return math.log10(ticks[0]), math.log10(max(ticks[-1], top)), labels
    high = top * HEADROOM
    ticks = [tick for tick in even_ticks(top, 5) if tick <= high]
    labels = [{"value": tick, "label": _label(y_format(tick) if tick else "0")} for tick in ticks]
    return 0.0, high, labels


def _label(text: str) -> str:
    return text.rjust(LABEL_WIDTH, FIGURE_SPACE)


def _still(root: Any) -> Any:
    """The drawing without scripts: a page that is sent to others runs nothing."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == "script" or not isinstance(child.tag, str):
                parent.remove(child)
    return root


def _style(colours: Sequence[str]) -> Any:
    font = "system-ui, sans-serif"
    return Style(
        background="transparent",
        plot_background="transparent",
        foreground="var(--faint)",
        foreground_strong="var(--faint)",
        foreground_subtle="var(--line)",
        guide_stroke_color="var(--line)",
        major_guide_stroke_color="var(--line)",
        guide_stroke_dasharray="1,0",
        major_guide_stroke_dasharray="1,0",
        opacity=".15",
        opacity_hover=".15",
        transition="0s",
        font_family=font,
        label_font_family=font,
        major_label_font_family=font,
        legend_font_family=font,
        label_font_size=12,
        major_label_font_size=12,
        legend_font_size=13,
        colors=tuple(colours),
        value_colors=tuple(colours),
    )
