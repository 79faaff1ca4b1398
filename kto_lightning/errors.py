"""Errors that the command line prints as a message without a traceback, and checks of settings.

Every message says what is wrong, where, what was got and what to do. The exit status is 1; 2 for
`ConfigError`; 128 + the signal for a run that a signal stopped.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar
from unicodedata import category

T = TypeVar("T")
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories of controls, format characters, surrogates and line separators."""
_JOINERS = "\u200c\u200d"
"""Format characters that words of some scripts, and emoji, are written with."""


def printable(text: str, *, keep: str = "") -> str:
    r"""Text from outside (data, templates, names of files, exceptions) as a terminal may show it.

    Escape sequences could otherwise clear the screen or fake a line, and bidirectional controls
    reorder one. Such characters are shown as in Python: `\x1b`, `\n`, `\u202e`.

    Args:
        keep: characters to leave as they are, such as the line breaks of a text of several lines.
    """
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if category(character) in _INVISIBLE and character not in keep + _JOINERS
        else character
        for character in text
    )


def error_message(error: BaseException) -> str:
    """An error as a terminal may show it, on one line; a `DataError` may list several records."""
    return printable(str(error), keep="\n" if isinstance(error, DataError) else "")


def os_error_message(error: OSError) -> str:
    """What the disk refused: a directory that cannot be created, a file without permission."""
    where = f"{error.filename}: " if error.filename else ""
    reason = printable(f"{where}{error.strerror or error}")
    return f"{reason}. Check the path, its permissions and free disk space."


class KTOError(Exception):
    """Base of every error that the command line prints as a message instead of a traceback."""


class DataError(KTOError):
    """The given records, files or tokens cannot be trained on."""


class ModelError(KTOError):
    """A model, tokenizer or adapter cannot be loaded, or does not fit the data."""


class ConfigError(KTOError):
    """A setting is out of range, or two settings contradict each other."""


class StoppedRun(KTOError):
    """A run stops between two optimizer steps, on all ranks alike, so that it can be saved.

    Attributes:
        status: the exit status.
    """

    status = 1


class OtherRankError(KTOError):
    """Another rank has failed and says why; this one ends with it.

    Attributes:
        status: the exit status of that rank.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def pick_settings(kind: type[T], settings: Mapping[str, Any]) -> T:
    """A dataclass of settings, its fields taken by name from all arguments of a constructor."""
    assert is_dataclass(kind)
    names = (field.name for field in fields(kind))
    return kind(**{name: settings[name] for name in names if name in settings})


LARGEST_COUNT = 2**31 - 1
MOST_PROCESSES = 1024


def check_count(
    option: str,
    value: Any,
    *,
    least: int = 1,
    most: int = LARGEST_COUNT,
    or_null: bool = False,
) -> None:
    """Raise ConfigError unless `value` is a whole number from `least` to `most`.

    Args:
        option: its name on the command line, such as --data.batch_size.
        or_null: whether None is allowed too.
    """
    if value is None and or_null:
        return
    null = " or null" if or_null else ""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{option} must be a whole number{null}, got {value!r}.")
    if value < least:
        raise ConfigError(f"{option} must be at least {least}{null}, got {value}.")
    if value > most:
        raise ConfigError(f"{option} must be at most {most}{null}, got {value}.")


def check_number(
    name: str,
    value: Any,
    *,
    least: float = 0.0,
    above: float | None = None,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Raise ConfigError unless `value` is finite and within limits.

    Args:
        name: of the option, without `--model.`.
        least: the smallest value, unless `above` is given, which is excluded.
        most: the largest value.
        below: excluded, as all above it.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"--model.{name} must be a number, got {value!r}.")
    enough = value >= least if above is None else value > above
    if enough and value <= most and value < below:
        return
    limits = f"at least {least:g}" if above is None else f"above {above:g}"
    if most < math.inf:
        limits = f"{limits} and at most {most:g}"
    elif below < math.inf:
        limits = f"{limits} and below {below:g}"
    elif above is not None:
        limits = f"a number {limits}"
    raise ConfigError(f"--model.{name} must be {limits}, got {value:g}.")


def check_one_of(name: str, value: str, known: Iterable[str]) -> None:
    """Raise ConfigError unless `value` of the option `name` is one of `known`."""
    known = list(known)
    if value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value}.")
