"""Charts as inline SVG: what is drawn, as which text, and that charts of one page do not clash."""

import re

import numpy as np
import pytest

from kto_lightning.reports.html import Chart, Series, draw
from kto_lightning.reports.html.charts import COLOURS, MAX_POINTS, running_mean
from tests.support.pages import read_page


def chart(y: list[float], **options) -> Chart:
    x = np.arange(len(y), dtype=float)
    series = Series(name="measured", x=x, y=np.array(y), **options)
    return Chart(title="A chart", x_label="step $x^2$", y_label="a < b", series=[series])


def test_running_mean_by_hand() -> None:
    values = np.array([1.0, 3.0, 5.0, 7.0, 9.0])
    assert running_mean(values, 3).tolist() == [2.0, 3.0, 5.0, 7.0, 8.0]


def test_texts_are_text_in_the_color_and_font_of_the_page() -> None:
    svg = draw(chart([1.0, 2.0]))
    page = read_page(svg)
    assert "step $x^2$" in page.text
    assert "a < b" in page.text
    assert not re.search(r"<text[^>]*(fill|color)", svg)


def test_the_same_chart_is_drawn_the_same_and_shares_no_id_with_another() -> None:
    both = [chart([1.0, 2.0]), chart([1.0, 2.0], kind="points", spread=np.array([0.1, 0.2]))]
    first, second = ([draw(one, number) for number, one in enumerate(both)] for _ in range(2))
    assert first == second
    ids = set(re.findall(r'id="([^"]+)"', draw(both[1], 1)))
    assert ids
    assert ids.isdisjoint(re.findall(r'id="([^"]+)"', draw(both[1], 2)))
    read_page("".join([*first, draw(both[1], 2)]))


@pytest.mark.parametrize("kind", ["line", "points"])
def test_missing_values_leave_no_gap(kind) -> None:
    gaps, none = chart([1.0, float("nan"), 3.0], kind=kind), chart([1.0, 2.0, 3.0], kind=kind)
    none.series[0].x, none.series[0].y = np.array([0.0, 2.0]), np.array([1.0, 3.0])
    assert draw(gaps) == draw(none)


def test_a_single_value_is_a_visible_point() -> None:
    assert re.search(f"<use[^>]*stroke: {COLOURS['desirable']}", draw(chart([1.0])))
    assert not re.search(f"<use[^>]*stroke: {COLOURS['desirable']}", draw(chart([1.0, 2.0])))


def test_a_long_line_is_thinned() -> None:
    rng = np.random.default_rng(0)
    short, long = (draw(chart(rng.normal(size=n).tolist())) for n in (MAX_POINTS, 40 * MAX_POINTS))
    assert len(long) < 1.1 * len(short)
