"""What is printed, on a terminal of any width and into a pipe."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def trimmed(console: Console) -> Iterator[None]:
    """What is printed meanwhile, without the spaces that tables fill their lines with: they wrap in
    a narrower window and litter a pipe."""
    with console.capture() as captured:
        yield
    lines = [line.rstrip() for line in captured.get().rstrip().splitlines()]
    console.file.write("\n".join(lines) + "\n")
