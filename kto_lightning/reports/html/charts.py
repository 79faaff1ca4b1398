"""Charts: Matplotlib figures as inline SVG, legible on a light and on a dark page.

Lines and areas have colours that stand out against both backgrounds. Texts stay text, which can be
searched, and are black, for which Matplotlib writes no colour: `style.css` gives them the page's.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from kto_lightning.errors import KTOError

Colour = Literal["desirable", "undesirable", "third", "muted"]
Array = Float[np.ndarray, " _"]

MAX_POINTS = 300
"""Of a line: more cannot be told apart at this width."""
SMOOTH_FROM = 60
"""Points from which on a running mean is drawn over the measured values."""
MAX_MARKERS = 40
"""Of points with error bars."""
COLOURS = {"desirable": "#0072b2", "undesirable": "#c25100", "third": "#00805c", "muted": "#777777"}
DASHES: dict[str, Any] = {
    "desirable": "solid",
    "undesirable": (0, (5, 2)),
    "third": (0, (1.5, 1.5)),
    "muted": (0, (3, 2, 1, 2)),
}
"""Colour is never the only difference."""
STYLE: dict[str, Any] = {
    "figure.figsize": (4.9, 2.9),  # inches of 72 px, narrow: phones shrink what is wider
    "lines.linewidth": 1.2,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.5,
    "axes.facecolor": "none",
    "axes.edgecolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-4, 5),
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": COLOURS["muted"],
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["muted"],
    "xtick.labelcolor": "black",
    "ytick.color": COLOURS["muted"],
    "ytick.labelcolor": "black",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.2,
    "legend.borderpad": 0.1,
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(kw_only=True, slots=True)
class Series:
    """One quantity; NaN where it was not measured, but not everywhere."""

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
        form = ".0%" if self.percent else ".4g"
        parts = [f"{self.title}; {self.y_label} against {self.x_label}."]
        for one in self.series:
            y = one.y[np.isfinite(one.y)]
            parts.append(
                f"{one.name}: first {y[0]:{form}}, last {y[-1]:{form}}, "
                f"lowest {y.min():{form}}, highest {y.max():{form}}."
            )
        return " ".join(parts)


def draw(chart: Chart, number: int = 1) -> Markup:
    """The chart as an `<svg>` element.

    Args:
        chart: what to draw.
        number: different for each chart of a page, so that no two share an id.

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
    # Ids are salted hashes: the same for the same numbers, different in every chart of a page.
    style: Any = STYLE | {"svg.hashsalt": f"chart {number}"}  # Matplotlib wants Literal keys
    with rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no room for the labels of odd numbers
        figure = Figure()
        _plot(figure.subplots(), chart)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=NO_METADATA)
    return _inline(file.getvalue(), chart.description())


def _inline(document: str, description: str) -> Markup:
    """Matplotlib's SVG document as an element of an HTML page, where names have no namespace."""
    svg = ElementTree.fromstring(document)
    for element in svg.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {
            name.rpartition("}")[2]: value
            for name, value in element.attrib.items()
            if (element.tag, name) != ("g", "id")  # such as axes_1, in every chart; never used
        }
    svg.attrib |= {"role": "img", "aria-label": description}
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def _plot(axes: Any, chart: Chart) -> None:
    for series in chart.series:
        dashes = DASHES[series.colour] if len(chart.series) > 1 else "solid"
        _PLOTTERS[series.kind](axes, series, dashes)
    if chart.log_x:
        axes.set_xscale("log")
        _set_log_ticks(axes.xaxis)
    if chart.log_y:
        axes.set_yscale("log")
        _set_log_ticks(axes.yaxis)
    if chart.percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if chart.zero:
        axes.axhline(0.0, color=COLOURS["muted"], linewidth=0.8)
    if chart.level is not None:
        name, at = chart.level
        axes.axhline(at, color=COLOURS["muted"], linestyle=DASHES["muted"], label=name)
    for name, at in chart.marks:
        axes.axvline(at, color=COLOURS["muted"], linestyle="dotted", label=name)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    handles, names = axes.get_legend_handles_labels()
    if len(names) > 1:
        axes.figure.legend(handles, names, loc="outside upper left", ncols=2)


def _set_log_ticks(axis: Any) -> None:
    """Ticks that read 100, 300, 1000."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=8))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _line(axes: Any, series: Series, dashes: Any) -> None:
    colour = COLOURS[series.colour]
    x, y, low, high = _thinned(series, MAX_POINTS)
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    if len(y) >= SMOOTH_FROM:
        axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.35)
        y = running_mean(y, len(y) // 15)
    marker = "o" if len(y) == 1 else ""
    axes.plot(
        *(x, y), color=colour, linestyle=dashes, linewidth=1.8, marker=marker, label=series.name
    )


def _points(axes: Any, series: Series, dashes: Any) -> None:
    x, y, low, _ = _thinned(series, MAX_MARKERS)
    axes.errorbar(
        *(x, y),
        yerr=None if series.spread is None else y - low,
        color=COLOURS[series.colour],
        linestyle=dashes,
        elinewidth=1.0,
        marker="s" if series.colour == "undesirable" else "o",
        markersize=4,
        label=series.name,
    )


def _bars(axes: Any, series: Series, dashes: Any) -> None:
    colour = COLOURS[series.colour]
    axes.stairs(series.y, series.x, color=colour, fill=True, alpha=0.75, label=series.name)


def _steps(axes: Any, series: Series, dashes: Any) -> None:
    colour = COLOURS[series.colour]
    axes.stairs(series.y, series.x, color=colour, fill=True, alpha=0.18)
    axes.stairs(
        *(series.y, series.x), color=colour, linestyle=dashes, linewidth=1.6, label=series.name
    )


_PLOTTERS: dict[str, Callable[[Any, Series, Any], None]] = {
    "line": _line,
    "points": _points,
    "bars": _bars,
    "steps": _steps,
}


def _thinned(series: Series, max_points: int) -> tuple[Array, Array, Array, Array]:
    """The measured values as means over at most `max_points` stretches.

    Returns:
        x, y, and the lower and upper edge of a band: y ± the spread, or the lowest and the highest
        value of each stretch.
    """
    measured = np.flatnonzero(np.isfinite(series.y))
    parts = np.array_split(measured, min(len(measured), max_points))

    def reduce(function: Callable[[Array], Any], values: Array) -> Array:
        return np.array([function(values[part]) for part in parts])

    x, y = reduce(np.mean, series.x), reduce(np.mean, series.y)
    if series.spread is None:
        return x, y, reduce(np.min, series.y), reduce(np.max, series.y)
    spread = reduce(np.mean, np.nan_to_num(series.spread))
    return x, y, y - spread, y + spread


def running_mean(values: Array, window: int) -> Array:
    """The mean over `window` values centred on each, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
