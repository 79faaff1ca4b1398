"""Commands of `kto_lightning` in lines to copy from a message. Imports nothing heavy."""

from collections.abc import Iterable

PROG = "python -m kto_lightning"
WIDTH = 78


def command(name: str, arguments: Iterable[str]) -> list[str]:
    """A command with its arguments, in lines that a shell joins."""
    lines, line = [], f"  {PROG} {name}"
    for argument in arguments:
        if len(line) + len(argument) + 3 > WIDTH and line.strip():
            lines.append(f"{line} \\")
            line = f"      {argument}"
        else:
            line = f"{line} {argument}"
    return [*lines, line]
