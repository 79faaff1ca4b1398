"""HTML pages: well-formed, self-contained, with labelled charts; and pages without them."""

import re
from html.parser import HTMLParser

import pytest
from markupsafe import Markup

from kto_lightning.reports.html import Chart, document

VOID = {"meta", "link", "br", "hr", "img", "input", "path", "use", "rect"}
"""Elements without an end tag; SVG's may also close themselves."""


class Reader(HTMLParser):
    """Collects elements, attributes and text; fails on an end tag without its start."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> within <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read_page(html: str) -> Reader:
    """Parse a page and check what holds for every page."""
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(reader.tags)
    assert not re.search(r"(https?:)?//[\w.]", html), "a page must not load anything"
    assert "@import" not in html
    for _, name, value in reader.attributes:
        assert not name.startswith("on")
        if name in ("href", "src"):
            assert value.startswith("#")
    ids = [value for _, name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:href="|url\()#([\w-]+)', html)
    assert set(references) <= set(ids)
    charts = [
        value for tag, name, value in reader.attributes if (tag, name) == ("svg", "aria-label")
    ]
    assert len(charts) == reader.tags.count("svg")
    assert all(charts)
    return reader


def undraw(patch: pytest.MonkeyPatch) -> None:
    """Let reports describe their charts in words alone, until the patch is undone."""

    def description(chart: Chart, number: int) -> Markup:
        return Markup("<p>{}</p>").format(chart.description())

    patch.setattr(document, "draw", description)
