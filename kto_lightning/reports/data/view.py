"""The data report on a terminal or in a pipe: a column per file, then the findings."""

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kto_lightning.errors import printable
from kto_lightning.reports.data.fields import DataReport
from kto_lightning.reports.data.guide_lines import guide_lines, tried_lines
from kto_lightning.reports.data.rows import NOTHING, details_of, sections_of, title_of
from kto_lightning.reports.terminal import strip_trailing_spaces

NAME_WIDTH = 27
MIN_WIDTH = 22
"""Of the column of one file; columns that do not fit side by side go below."""


def show_reports(console: Console, reports: list[DataReport]) -> None:
    """Print reports side by side, as many as fit, then the findings of each."""
    num_beside = max((console.width - NAME_WIDTH - 2) // (MIN_WIDTH + 2), 1)
    with strip_trailing_spaces(console):
        for start in range(0, len(reports), num_beside):
            console.print(_table(reports[start : start + num_beside]))
            console.print()
        for report in reports:
            _show_findings(console, report)


def _table(reports: list[DataReport]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=True, header_style="bold")
    table.add_column("", width=NAME_WIDTH)
    for report in reports:
        table.add_column(_text(title_of(report, reports)), overflow="fold", ratio=1)
    for section, rows in sections_of(reports).items():
        table.add_row(Text(""))
        table.add_row(Text(section, style="bold"))
        for name, cell in rows.items():
            cells = [cell(report) for report in reports]
            if set(cells) != {NOTHING}:
                table.add_row(Text(f"  {name}"), *map(_text, cells))
    return table


def _text(cell: str) -> Text:
    """A cell, which may have several lines."""
    return Text(printable(cell, keep="\n"))


def _show_findings(console: Console, report: DataReport) -> None:
    console.print(Text(printable(", ".join(report.sources)), style="bold"), soft_wrap=True)
    if not report.findings:
        console.print("  Nothing stands out.")
    for sentence in report.findings:
        console.print(Padding(_bullet(sentence), (0, 0, 0, 2)))
    for line in details_of(report):
        console.print(Text(printable(f"    {line}")), soft_wrap=True)
    console.print()
    for line in (*guide_lines(report), *tried_lines(report)):
        console.print(Text(printable(line)), soft_wrap=True)
    if report.guide is not None or report.tried:
        console.print()


def _bullet(sentence: str) -> Table:
    """A list item with a hanging indent, which rich lacks."""
    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_row("-", Text(printable(sentence)))
    return line
