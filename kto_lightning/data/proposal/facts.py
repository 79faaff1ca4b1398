"""Columns and nested paths of rows of JSON values: types, examples, and values of few kinds."""

import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kto_lightning.data.messages import is_message
from kto_lightning.data.strict_json import parse_json_or_text, quote
from kto_lightning.errors import printable

MAX_VALUES = 12
"""A column with more different values than this has none worth listing."""
MAX_VALUE_LENGTH = 60
MAX_COLUMNS = 1000
MAX_DEPTH = 12
MAX_KEYS = 60
"""An object with more keys is a table of ids, not a record; its keys are not named."""
MAX_ITEMS = 50
MAX_JSON = 200_000
"""Longer texts are not looked into."""
KINDS = {bool: "boolean", int: "number", float: "number", str: "string", dict: "object"}
ALL = "*"
"""The part of a path that means all elements of a list."""


@dataclass(kw_only=True, slots=True)
class ColumnFacts:
    """What the rows hold under one path, nulls left out."""

    path: str
    """A column's name, or names and list positions joined by dots; `*`: all elements of a list."""
    cells: list[object] = field(default_factory=list, repr=False)
    """The values in the order of the rows; several of one row under a path with `*`."""
    filled: int = 0
    """Rows that have a value other than null."""
    in_text: bool = False
    """Whether it was found in a JSON text."""
    last_row: int = field(default=-1, repr=False)

    @property
    def kind(self) -> str:
        """The type: `string`, `boolean`, `number`, `messages`, `list`, …; several joined by ` | `;
        `null` if nothing is filled."""
        return " | ".join(dict.fromkeys(map(kind_of, self.cells))) or "null"

    @property
    def example(self) -> str:
        """The first value that is not blank, as JSON, shortened and printable."""
        filled = (cell for cell in self.cells if cell not in ("", [], {}))
        return printable(quote(_first_text(next(filled, None))))

    @property
    def values(self) -> dict[str, int] | None:
        """The different values with their counts, the most frequent first; None if they are many,
        long or no single values, or each occurs only once."""
        if any(isinstance(cell, dict | list) for cell in self.cells):
            return None
        counts: Counter[str] = Counter(map(quote, self.cells))
        is_short = not any(len(str(cell)) > MAX_VALUE_LENGTH for cell in self.cells)
        words = len(counts) <= 2 and not any(re.search(r"\s|.{20}", value) for value in counts)
        repeats = words or len(counts) < len(self.cells)
        if not counts or len(counts) > MAX_VALUES or not is_short or not repeats:
            return None
        return {printable(value): count for value, count in counts.most_common()}

    @property
    def texts(self) -> list[str]:
        """The cells that are texts and not blank."""
        return [cell for cell in self.cells if isinstance(cell, str) and cell.strip()]

    def describe_numbers(self) -> str:
        """Smallest, middle and largest number, for a column that holds some."""
        numbers = [n for n in map(number_of, self.cells) if n is not None]
        low, middle, high = min(numbers), statistics.median(numbers), max(numbers)
        return f"from {low:g} to {high:g}, median {middle:g}"

    def to_dict(self) -> dict[str, object]:
        """As plain values, for a report."""
        return {
            "path": self.path,
            "type": self.kind,
            "filled": self.filled,
            "example": self.example,
            "values": self.values,
        }


def kind_of(value: object) -> str:
    """The name of a value's type; a list of messages and its JSON text are `messages`."""
    if messages_of(value):
        return "messages"
    if isinstance(value, list):
        return "list"
    return KINDS.get(type(value), type(value).__name__)


def messages_of(value: object) -> list[dict]:
    """The chat messages in a list or its JSON text; none if it holds anything else."""
    value = _parsed(value) if isinstance(value, str) else value
    if isinstance(value, list) and value and all(map(is_message, value)):
        return value
    return []


def number_of(value: object) -> float | None:
    """The finite number that a value is, or is the text of."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None


def columns_of(rows: Sequence[object]) -> list[ColumnFacts]:
    """Every column of the rows, and every nested path to a value, in the order of occurrence.

    Objects and lists are named by what they hold: `fields.prompt`, `ratings.0`, `ratings.*`. A list
    of chat messages is one value. JSON text is looked into as well.
    """
    found: dict[str, ColumnFacts] = {}
    for index, row in enumerate(rows):
        for key, value in row.items() if isinstance(row, dict) else ():
            for path, cell, in_text in _walk(str(key), value, MAX_DEPTH):
                if path not in found and len(found) >= MAX_COLUMNS:
                    continue
                _add(found.setdefault(path, ColumnFacts(path=path)), index, cell, in_text)
    named = list(found)
    return [
        facts
        for path, facts in found.items()
        if facts.cells or not any(other.startswith(f"{path}.") for other in named)
        if not _is_first_only(path, found)
    ]


def _is_first_only(path: str, found: dict[str, ColumnFacts]) -> bool:
    """Whether the path with a `0` for one of its `*` leads to as many values: no list has more."""
    parts = path.split(".")
    others = (
        ".".join([*parts[:index], "0", *parts[index + 1 :]])
        for index, part in enumerate(parts)
        if part == ALL
    )
    num_cells = len(found[path].cells)
    return any(other in found and len(found[other].cells) == num_cells for other in others)


def _add(facts: ColumnFacts, row: int, cell: object, in_text: bool) -> None:
    if cell is None:
        return
    facts.cells.append(cell)
    facts.in_text = facts.in_text or in_text
    if facts.last_row != row:
        facts.filled, facts.last_row = facts.filled + 1, row


def _walk(
    path: str, value: object, depth: int, in_text: bool = False
) -> Iterator[tuple[str, object, bool]]:
    """The paths to the values below `path`, each with its value and whether it is in JSON text."""
    inner = _parsed(value) if isinstance(value, str) else value
    is_text = inner is not value
    if not isinstance(inner, dict | list) or is_text or messages_of(inner):
        yield path, value, in_text
    if not isinstance(inner, dict | list) or messages_of(inner):
        return
    in_text = in_text or is_text
    if not inner or not depth or len(inner) > (MAX_KEYS if isinstance(inner, dict) else MAX_ITEMS):
        if not is_text:
            yield path, inner or None, in_text
        return
    yield path, None, in_text  # so that a column is named, if nothing in it is
    if isinstance(inner, dict):
        for key, item in inner.items():
            yield from _walk(f"{path}.{key}", item, depth - 1, in_text)
        return
    yield from _walk(f"{path}.0", inner[0], depth - 1, in_text)
    for item in inner:
        yield from _walk(f"{path}.{ALL}", item, depth - 1, in_text)


def _parsed(text: str) -> object:
    """The object or list that a JSON text holds; any other text is returned as it is."""
    if text[:1] not in ("{", "[") or text[-1:] not in ("}", "]") or len(text) > MAX_JSON:
        return text
    value = parse_json_or_text(text)
    return value if isinstance(value, dict | list) else text


def _first_text(value: object) -> object:
    """The text of the first message, for a list of messages."""
    messages = messages_of(value)
    if not messages:
        return value
    return messages[0].get("content", messages[0].get("value"))
