"""Lines of a report on a file that cannot be read as it stands, and on its first records."""

import shlex
from collections.abc import Iterator
from textwrap import wrap

from rich.cells import cell_len, set_cell_size

from kto_lightning.data.commands import command
from kto_lightning.errors import printable
from kto_lightning.reports.data.fields import DataReport
from kto_lightning.reports.data.guide_fields import Guide, SeenColumn

MAX_COLUMNS = 40
MAX_PATH = 34
"""A longer path has a line of its own."""
MAX_TEXT = 1500
"""Characters of a prompt or completion that are shown."""


def guide_lines(report: DataReport, width: int = 78) -> Iterator[str]:
    """The columns, what is missing, and commands to copy; nothing for a file that can be read."""
    guide = report.guide
    if guide is None:
        return
    yield f"The columns, by the first {guide.rows:,} row{'' if guide.rows == 1 else 's'}:"
    for column in guide.columns[:MAX_COLUMNS]:
        yield from _column_lines(column, guide, width)
    if len(guide.columns) > MAX_COLUMNS:
        yield f"  and {len(guide.columns) - MAX_COLUMNS} more"
    if guide.missing:
        yield ""
        yield "What is missing:"
        yield from _wrapped(guide.missing, width)
    if guide.notes:
        yield ""
        yield "To consider:"
        yield from _wrapped(guide.notes, width)
    if guide.flags:
        files = [shlex.quote(source) for source in report.sources]
        tokenizer = [f"--tokenizer {shlex.quote(report.tokenizer)}"] if report.tokenizer else []
        yield ""
        yield "As far as it can be told:" if guide.missing else "The mapping that fits best:"
        yield from command("inspect", [*files, *tokenizer, *guide.flags, "--try"])
        if not guide.missing:
            yield from command(
                "fit", ["--model.policy MODEL", f"--data.train {files[0]}", *guide.fit_flags]
            )


def _wrapped(sentences: list[str], width: int) -> Iterator[str]:
    for sentence in sentences:
        yield from wrap(
            printable(sentence),
            width,
            initial_indent="  ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )


def _column_lines(column: SeenColumn, guide: Guide, width: int) -> Iterator[str]:
    values = column.values
    shown = "" if not column.filled else column.example
    if values is not None:
        shown = ", ".join(f"{value} ({count:,})" for value, count in values.items())
    if column.filled < guide.rows:
        shown = f"in {column.filled:,} of {guide.rows:,}{': ' if shown else ''}{shown}"
    longest = max(len(c.path) for c in guide.columns[:MAX_COLUMNS])
    path_width = min(longest, MAX_PATH)
    kind_width = max(len(c.type) for c in guide.columns[:MAX_COLUMNS])
    path = printable(column.path)
    if len(path) > path_width:
        yield f"  {path}"
        path = ""
    line = f"  {path:<{path_width}}  {column.type:<{kind_width}}  {printable(shown)}".rstrip()
    yield line if cell_len(line) <= width else f"{set_cell_size(line, width - 1).rstrip()}…"


def tried_lines(report: DataReport) -> Iterator[str]:
    """The first records, as they would be trained."""
    if not report.tried:
        return
    yield f"The first {len(report.tried)} as they would be trained:"
    for tried in report.tried:
        weight = "" if tried.weight == 1 else f", weight {tried.weight:g}"
        yield ""
        yield f"{tried.place}: {'desirable' if tried.desirable else 'undesirable'}{weight}"
        if tried.fault is not None:
            yield f"  cannot be rendered by the tokenizer: {tried.fault}"
        yield from _text_lines("prompt", tried.prompt)
        yield from _text_lines("completion", tried.completion)


def _text_lines(name: str, text: str) -> Iterator[str]:
    """A text in lines, with its spaces at both ends to be seen, the middle of a long one cut."""
    if len(text) > MAX_TEXT:
        half, left = MAX_TEXT // 2, len(text) - MAX_TEXT // 2 * 2
        text = f"{text[:half]} … ({left:,} characters are not shown) … {text[-half:]}"
    inner = text.strip(" ")
    before, after = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    shown = "␣" * before + inner + "␣" * (after if inner else 0)
    for index, line in enumerate(shown.split("\n")):
        yield f"  {name if index == 0 else '':<10} | {printable(line)}".rstrip(" ")
