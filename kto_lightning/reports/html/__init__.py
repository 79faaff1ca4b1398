"""Self-contained HTML pages: one template with inline SVG charts."""

from kto_lightning.reports.html.charts import Chart, Colour, Series, draw
from kto_lightning.reports.html.document import (
    Fact,
    Page,
    Sample,
    Section,
    Table,
    render,
    write_page,
)

__all__ = [
    "Chart",
    "Colour",
    "Fact",
    "Page",
    "Sample",
    "Section",
    "Series",
    "Table",
    "draw",
    "render",
    "write_page",
]
