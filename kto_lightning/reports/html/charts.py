"""Charts as SVG that takes its colours from the page, so that it is legible in dark and in light.

Matplotlib draws with stand-in colours, which become CSS variables. Texts stay texts: they follow
the page's font, can be searched, and screen readers get a description of the whole.
"""

import io
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from markupsafe import Markup, escape

from kto_lightning.errors import KTOError

Colour = Literal["desirable", "undesirable", "third", "muted"]
Array = Float[np.ndarray, " _"]

WIDTH, HEIGHT = 4.9, 2.9
"""Inches, of 72 CSS pixels: narrow, so that letters are legible where a phone shrinks them."""
MOST_POINTS = 300
"""Of a line: more than this cannot be told apart at this width."""
SMOOTH_FROM = 60
"""Points from which on a running mean is drawn over what was measured."""
MOST_MARKERS = 40
"""Of points with error bars."""
_STAND_INS = {
    "desirable": "#0072b2",
    "undesirable": "#d55e00",
    "third": "#009e73",
    "muted": "#777777",
    "ink": "#111111",
    "grid": "#cccccc",
}
_DASHES: dict[str, Any] = {
    "desirable": "solid",
    "undesirable": (0, (5, 2)),
    "third": (0, (1.5, 1.5)),
    "muted": (0, (3, 2, 1, 2)),
}
"""Colour is never the only difference."""


@dataclass(kw_only=True, slots=True)
class Series:
    """One quantity; NaN where it was not measured."""

    name: str
    x: Array
    y: Array
    colour: Colour = "desirable"
    kind: Literal["line", "points", "bars", "steps"] = "line"
    """`bars` and `steps` stand on the edges `x`, which are one more than `y`."""
    spread: Array | None = None
    """Half the height of a band around a line, or of error bars at points."""


@dataclass(kw_only=True, slots=True)
class Chart:
    """What a figure shows. All texts are ours: none comes from a file."""

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    caption: str = ""
    log_x: bool = False
    log_y: bool = False
    percent: bool = False
    zero: bool = False
    """Whether a line marks 0, or the axis begins there where bars stand on it."""
    marks: list[tuple[str, float]] = field(default_factory=list)
    """Vertical lines with a name."""
    level: tuple[str, float] | None = None
    """A horizontal line with a name."""

    def description(self) -> str:
        """The chart in words, for those who do not see it."""
        parts = [f"{self.title}; {self.y_label} against {self.x_label}."]
        for one in self.series:
            known = one.y[np.isfinite(one.y)]
            if not len(known):
                continue
            show = (lambda value: f"{value:.0%}") if self.percent else (lambda v: f"{v:.4g}")
            parts.append(
                f"{one.name}: first {show(known[0])}, last {show(known[-1])}, "
                f"lowest {show(known.min())}, highest {show(known.max())}."
            )
        return " ".join(parts)


def draw(chart: Chart, number: int = 1) -> Markup:
    """The chart as an `<svg>` element for HTML.

    Args:
        chart: what to draw.
        number: another one for each chart of a page, which sets their ids apart.

    Raises:
        KTOError: if matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise KTOError(
            "charts are drawn by matplotlib, which is not installed. `pip install matplotlib`."
        ) from error
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "kto_lightning",  # the same page for the same numbers
        "text.parse_math": False,
        "font.size": 10.5,
        "axes.titlesize": 10.5,
        "text.color": _STAND_INS["ink"],
        "axes.edgecolor": _STAND_INS["ink"],
        "axes.labelcolor": _STAND_INS["ink"],
        "xtick.color": _STAND_INS["ink"],
        "ytick.color": _STAND_INS["ink"],
        "grid.color": _STAND_INS["grid"],
        "axes.unicode_minus": True,
        "axes.formatter.limits": (-4, 5),
    }
    with rc_context(settings):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained", facecolor="none")
        axes = figure.subplots()
        axes.set_facecolor("none")
        _plot(axes, chart)
        out = io.StringIO()
        figure.savefig(out, format="svg", facecolor="none", metadata={"Date": None})
    return _for_html(out.getvalue(), chart, number)


def _plot(axes: Any, chart: Chart) -> None:
    axes.grid(axis="y", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for series in chart.series:
        dashes = _DASHES[series.colour] if len(chart.series) > 1 else "solid"
        _PLOTTERS[series.kind](axes, series, dashes)
    if chart.log_x:
        axes.set_xscale("log")
        _name_ticks(axes.xaxis)
    if chart.log_y:
        axes.set_yscale("log")
        _name_ticks(axes.yaxis)
    if chart.percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if chart.zero:
        axes.axhline(0.0, color=_STAND_INS["ink"], linewidth=0.8)
    if chart.level is not None:
        name, at = chart.level
        axes.axhline(
            at, color=_STAND_INS["muted"], linestyle=_DASHES["muted"], linewidth=1.2, label=name
        )
    for name, at in chart.marks:
        axes.axvline(at, color=_STAND_INS["ink"], linestyle="dotted", linewidth=1.4, label=name)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    handles, names = axes.get_legend_handles_labels()
    if len(names) > 1:
        axes.figure.legend(
            *(handles, names),
            loc="outside upper left",
            ncols=2,
            frameon=False,
            fontsize=9.5,
            handlelength=1.8,
            columnspacing=1.2,
            borderpad=0.1,
        )


def _name_ticks(axis: Any) -> None:
    """Ticks of a logarithmic axis that read 100, 300, 1k."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=8))
    axis.set_major_formatter(lambda value, _: _short(value))
    axis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _line(axes: Any, series: Series, dashes: Any) -> None:
    colour = _STAND_INS[series.colour]
    x, y, low, high = thinned(series)
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    known = np.isfinite(y)
    if known.sum() == 1:
        axes.plot(x[known], y[known], "o", color=colour, markersize=5, label=series.name)
        return
    x, y = x[known], y[known]  # a batch that lacks a class leaves no gap in its line
    if len(y) >= SMOOTH_FROM:
        axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.35)
        y = running_mean(y, len(y) // 15)
    axes.plot(x, y, color=colour, linestyle=dashes, linewidth=1.8, label=series.name)


def _points(axes: Any, series: Series, dashes: Any) -> None:
    colour = _STAND_INS[series.colour]
    known = np.isfinite(series.y)
    measured = replace(
        series,
        x=series.x[known],
        y=series.y[known],
        spread=None if series.spread is None else np.nan_to_num(series.spread[known]),
    )
    x, y, low, _ = thinned(measured, MOST_MARKERS)
    axes.errorbar(
        *(x, y),
        yerr=None if series.spread is None else y - low,
        color=colour,
        linestyle=dashes,
        linewidth=1.2,
        elinewidth=1.0,
        marker="o" if series.colour != "undesirable" else "s",
        markersize=4,
        label=series.name,
    )


def _bars(axes: Any, series: Series, dashes: Any) -> None:
    widths = np.diff(series.x)
    axes.bar(
        *(series.x[:-1], series.y, widths),
        align="edge",
        color=_STAND_INS[series.colour],
        alpha=0.75,
        linewidth=0,
        label=series.name,
    )


def _steps(axes: Any, series: Series, dashes: Any) -> None:
    colour = _STAND_INS[series.colour]
    axes.stairs(series.y, series.x, color=colour, fill=True, alpha=0.18)
    axes.stairs(
        series.y,
        series.x,
        color=colour,
        linestyle=dashes,
        linewidth=1.6,
        label=series.name,
    )


_PLOTTERS: dict[str, Callable[[Any, Series, Any], None]] = {
    "line": _line,
    "points": _points,
    "bars": _bars,
    "steps": _steps,
}


def thinned(series: Series, most: int = MOST_POINTS) -> tuple[Array, Array, Array, Array]:
    """A line as at most `most` stretches: where each lies, its mean, its band's edges.

    The band is the series' own spread, or the lowest and highest values of each stretch. A stretch
    in which nothing was measured is NaN.
    """
    x, y = np.asarray(series.x, dtype=float), np.asarray(series.y, dtype=float)
    y = np.where(np.isfinite(y), y, np.nan)
    parts = list(_stretches(len(y), most))
    where = np.array([x[part].mean() for part in parts])
    mean = np.array([_over_known(np.mean, y[part]) for part in parts])
    if series.spread is None:
        low = np.array([_over_known(np.min, y[part]) for part in parts])
        high = np.array([_over_known(np.max, y[part]) for part in parts])
        return where, mean, low, high
    half = np.array([_over_known(np.mean, series.spread[part]) for part in parts])
    return where, mean, mean - half, mean + half


def _stretches(count: int, most: int) -> Iterator[slice]:
    edges = np.linspace(0, count, min(count, most) + 1).round().astype(int).tolist()
    yield from itertools.starmap(slice, itertools.pairwise(edges))


def _over_known(function: Callable[[Array], Any], values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(function(known)) if len(known) else float("nan")


def running_mean(values: Array, window: int) -> Array:
    """The mean over `window` values centred on each, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


_FONT = re.compile(r"(font: [^;\"]*?)'[^;\"]*")
_IDS = re.compile(r'(\bid="|href="#|url\(#)')


def _for_html(svg: str, chart: Chart, number: int) -> Markup:
    """Matplotlib's file as an element among others: no prologue, ids of its own, our colours."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->\n?", "", body, flags=re.DOTALL)
    body = body[body.index(">") + 1 :]
    body = _IDS.sub(rf"\g<1>c{number}-", body).replace("xlink:href", "href")
    body = _FONT.sub(r"\1var(--font)", body)
    for name, filler in _STAND_INS.items():
        body = body.replace(filler, f"var(--{name})")
    width, height = WIDTH * 72, HEIGHT * 72
    label = escape(chart.description())
    return Markup(
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {width:g} {height:g}">'
        f"<title>{escape(chart.title)}</title>{body}"
    )
