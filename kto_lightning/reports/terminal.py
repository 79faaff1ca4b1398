"""Printing to a terminal or a pipe without trailing spaces."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def strip_trailing_spaces(console: Console) -> Iterator[None]:
    """Strip trailing spaces from what is printed inside: rich fills the lines of a table with them,
    and they wrap in a narrower window."""
    with console.capture() as captured:
        yield
    lines = [line.rstrip() for line in captured.get().rstrip().splitlines()]
    console.file.write("\n".join(lines) + "\n")
