"""A page from its parts: plain values in, one HTML file out. Whatever is text is escaped."""

import itertools
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from kto_lightning.files import write_whole
from kto_lightning.reports.finding import Finding, begun
from kto_lightning.reports.html.charts import Chart, draw

if TYPE_CHECKING:
    from jinja2 import Template


@dataclass(kw_only=True, slots=True)
class Fact:
    """A number worth reading first."""

    name: str
    value: str
    hint: str = ""


@dataclass(kw_only=True, slots=True)
class Table:
    """Rows under a header, each named by its first cell; a row of one cell is a heading."""

    header: list[str]
    rows: list[list[str]]


@dataclass(kw_only=True, slots=True)
class Sample:
    """A prompt and what was answered, each answer with its name."""

    prompt: str
    answers: list[tuple[str, str]]


@dataclass(kw_only=True, slots=True)
class Section:
    """A part of a page. Parts that are empty are left out."""

    title: str
    text: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    table: Table | None = None
    folded: Table | None = None
    """A table to be opened."""
    samples: list[Sample] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    """Lines as they stand in a file."""


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
    """The page as HTML that needs nothing beside itself.

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
    environment.filters["begun"] = lambda text: with_code(begun(text))
    return environment.get_template("page.html")


_CODE = re.compile(r"`([^`]+)`|(--[a-z][\w.]*\w)")


def with_code(text: str) -> Markup:
    """A text of ours, escaped, with options and what stands in backticks set as code."""
    return Markup(_CODE.sub(r"<code>\1\2</code>", str(escape(text))))


def write_page(page: Page, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        KTOError: if it cannot be written.
    """
    write_whole(path, render(page), what="the page")
