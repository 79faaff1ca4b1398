"""Output of the demo, 80 columns wide, on a terminal and in a pipe."""

import shlex
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kto_lightning.demo.answers import Answer
from kto_lightning.demo.curve import Curve, sparkline
from kto_lightning.demo.evaluate import Share
from kto_lightning.demo.task import Problem
from kto_lightning.errors import printable

WIDTH = 80
BAR_CELLS = 24
SPARK_CELLS = 44


def make_console() -> Console:
    """A console of at most WIDTH columns, without highlighted numbers."""
    return Console(highlight=False, width=min(WIDTH, Console().width))


def command_line(argv: list[str]) -> str:
    """The shell command for `argv`, one key with its value on each line."""
    command, *rest = argv
    keys = [shlex.join(rest[at : at + 2]) for at in range(0, len(rest), 2)]
    return " \\\n    ".join([f"python -m kto_lightning {command}", *keys])


def show_command(console: Console, argv: list[str]) -> None:
    """Print `argv` as a command to copy, not wrapped and without markup."""
    console.print(Text(printable(command_line(argv), keep="\n"), style="bold"), soft_wrap=True)


def shown(path: Path) -> str:
    """A path as rich markup."""
    return escape(printable(str(path)))


def show_shares(console: Console, before: Share, after: Share) -> None:
    """Both shares as bars, with their intervals."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("good answers", justify="right")
    table.add_column("95% interval")
    table.add_column("")
    for name, share in (("before", before), ("after", after)):
        low, high = share.interval
        filled = round(share.value * BAR_CELLS)
        table.add_row(
            name,
            f"{share.value:.1%}",
            f"{low:.1%} to {high:.1%}",
            "█" * filled + "·" * (BAR_CELLS - filled),
        )
    console.print(table)


def show_samples(
    console: Console, before: list[Answer[Problem]], after: list[Answer[Problem]]
) -> None:
    """Answers to the same problems side by side, each marked as good or bad."""
    table = Table(padding=(0, 1))
    for header in ("letters", "before", "after"):
        table.add_column(header, no_wrap=True)
    for old, new in zip(before, after, strict=True):
        table.add_row(" ".join(old.problem.letters), mark_answer(old), mark_answer(new))
    console.print(table)


def mark_answer(answer: Answer) -> str:
    """An answer with its mark, as rich markup; control characters are escaped."""
    text = answer.completion.strip()
    mark = "[green]✓[/green]" if answer.is_good else "[red]✗[/red]"
    return f"{mark} {escape(printable(text) or '(nothing)')}"


def show_rewards(console: Console, curves: dict[str, Curve]) -> None:
    """A sparkline per reward, each on its own scale, with its first and last value."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in ("reward", "over the steps", "first", "last"):
        table.add_column(header, justify="right" if header in ("first", "last") else "left")
    for name, curve in curves.items():
        values = curve.means(SPARK_CELLS)
        if values:
            spark = sparkline(values, min(values), max(values))
            table.add_row(name, spark, f"{values[0]:+.2f}", f"{values[-1]:+.2f}")
    console.print(table)
