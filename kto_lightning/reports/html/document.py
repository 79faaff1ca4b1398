"""HTML pages: dataclasses of plain values, rendered by one template that escapes all text."""

import itertools
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from kto_lightning.files import write_whole
from kto_lightning.reports.finding import Finding, capitalize_first
from kto_lightning.reports.html.charts import Chart, draw

if TYPE_CHECKING:
    from jinja2 import Template


@dataclass(kw_only=True, slots=True)
class Fact:
    """A number at the top of a page."""

    name: str
    value: str
    hint: str = ""


@dataclass(kw_only=True, slots=True)
class Table:
    """Rows under a header; the first cell of each is its name, and a row of one cell a heading."""

    header: list[str]
    rows: list[list[str]]


@dataclass(kw_only=True, slots=True)
class Sample:
    """A prompt and its completions, as pairs of a name and a text."""

    prompt: str
    answers: list[tuple[str, str]]


@dataclass(kw_only=True, slots=True)
class Section:
    """A section of a page; fields that are empty are omitted."""

    title: str
    text: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    table: Table | None = None
    collapsed: Table | None = None
    """A collapsed table."""
    samples: list[Sample] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    """Lines in monospace, unchanged."""
    listing: list[str] = field(default_factory=list)
    """Lines below them that keep their spaces and can be copied together."""


@dataclass(kw_only=True, slots=True)
class Page:
    """A whole page."""

    title: str
    subtitle: str
    headline: str
    facts: list[Fact]
    sections: list[Section]
    footer: str


def render(page: Page) -> str:
    """The page as self-contained HTML: no scripts, no other files.

    Raises:
        KTOError: if matplotlib is missing.
    """
    numbers = itertools.count(1)
    return _template().render(page=page, draw=lambda chart: draw(chart, next(numbers)))


@cache
def _template() -> "Template":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("kto_lightning.reports.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = with_code
    environment.filters["capitalize_first"] = lambda text: with_code(capitalize_first(text))
    return environment.get_template("page.html")


_CODE = re.compile(r"`([^`]+)`|(--[a-z][\w.]*\w)")


def with_code(text: str) -> Markup:
    """A text of ours, escaped, with options and backticks set as code."""
    return Markup(_CODE.sub(r"<code>\1\2</code>", str(escape(text))))


def write_page(page: Page, path: Path) -> None:
    """Write the page atomically.

    Raises:
        KTOError: if it cannot be written.
    """
    write_whole(path, render(page), what="the page")
