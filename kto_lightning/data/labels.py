"""Labels: words and numbers of a column -> desirable, undesirable, or a message.

A word says the same in every column. A number does not: 1 is good beside 0 or -1, and the worst
beside 2 to 5. So numbers are decided by all the values that the column holds.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kto_lightning.data.rows import BadRecord
from kto_lightning.data.sources import read_rows
from kto_lightning.data.strict_json import RecordError, quote
from kto_lightning.errors import DataError

Number = int | float

PAIRS = (
    *(("true", "false"), ("yes", "no"), ("good", "bad"), ("like", "dislike"), ("up", "down")),
    *(("upvote", "downvote"), ("thumbsup", "thumbsdown"), ("positive", "negative")),
    *(("helpful", "unhelpful"), ("desirable", "undesirable"), ("👍", "👎")),
)
"""Words for desirable and undesirable, in lower case, without spaces, hyphens and underscores."""
WORDS = {good: True for good, _ in PAIRS} | {bad: False for _, bad in PAIRS}
SCALES: tuple[dict[Number, bool], ...] = ({1: True, 0: False}, {1: True, -1: False})
IGNORED = {ord(char): None for char in " -_\ufe0f"} | dict.fromkeys(range(0x1F3FB, 0x1F400))
"""Besides separators, what gives an emoji its style and the color of its skin."""
MAX_VALUES = 10
"""So many different numbers are shown; reading stops there, because they are no labels."""
STREAM_SAMPLE = 10_000
"""Records of a streamed hub data set whose numbers decide: reading all would download all."""

LabelColumn = Callable[[], Iterable[tuple[str, object]]]
"""Reads all values of a label column, each with its place, `file:line`."""


class LabelReader:
    """Reads the labels of one source: words at once, numbers once it has seen the whole column.

    Args:
        column: read once, when the first number is met.
        optional: whether a record without a label can be used.
    """

    def __init__(self, column: LabelColumn, *, optional: bool = False) -> None:
        self._column = column
        self.optional = optional
        self._seen: dict[Number, str] | None = None
        """The numbers of the column, each with its first place."""
        self._scale: dict[Number, bool] | None = None

    def read(self, label: object) -> bool:
        """Whether a label means desirable.

        Raises:
            RecordError: if it means neither.
            DataError: for a number that the column did not have when its numbers were decided.
        """
        if isinstance(label, bool):
            return label
        known = WORDS.get(_as_word(label)) if isinstance(label, str) else None
        if known is not None:
            return known
        number = _as_number(label)
        if number is None:
            raise RecordError(
                f"'label' must be true or false, got {quote(label)}. Drop the line or give it a "
                "label.",
                kind="'label' is not understood",
            )
        return self._read_number(number)

    def _read_number(self, number: Number) -> bool:
        if self._seen is None:
            self._seen = _numbers_of(self._column())
            self._scale = _scale_of(self._seen)
        if self._scale is None:
            message = _unknown_scale(number, self._seen)
            raise RecordError(message, kind="'label' holds ratings")
        if number not in self._seen:
            values = _shown(self._seen)
            raise DataError(
                f"a 'label' is {_text(number)}, but the column was taken for one of {values}, the "
                "numbers found in it at first. If the file changed while it was read, start again; "
                "a streamed data set needs labels that are true and false."
            )
        return self._scale[number]


def label_reader(
    names: list[str], *, streaming: bool = False, optional: bool = False
) -> LabelReader:
    """The reader of the labels in the files and hub data sets of a source.

    Args:
        names: from `sources.expand`; their label columns are one column.
        streaming: whether hub data sets are streamed; then their first `STREAM_SAMPLE` records
            decide what a number means, and a later number that is not among theirs is an error.
        optional: whether records without a label can be used, as `predict` can.
    """

    def column() -> Iterator[tuple[str, object]]:
        for name in names:
            for num_read, row in enumerate(read_rows(name, streaming=streaming, only=["label"])):
                if streaming and num_read == STREAM_SAMPLE and not Path(name).is_file():
                    break
                if not isinstance(row, BadRecord) and isinstance(row.value, dict):
                    yield f"{row.file}:{row.line}", row.value.get("label")

    return LabelReader(column, optional=optional)


def _as_word(label: str) -> str:
    return label.casefold().translate(IGNORED).strip()


def _as_number(label: object) -> Number | None:
    """The number that a label is, or is the text of; None for what is none."""
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        return None
    try:
        number: Number = float(label) if isinstance(label, str) else label
    except ValueError:
        return None
    return number if isinstance(number, int) or math.isfinite(number) else None


def _numbers_of(column: Iterable[tuple[str, object]]) -> dict[Number, str]:
    """The different numbers of a column, at most one more than are shown, with their places."""
    seen: dict[Number, str] = {}
    for place, label in column:
        known = isinstance(label, str) and _as_word(label) in WORDS
        number = None if known else _as_number(label)
        if number is not None and number not in seen:
            seen[number] = place
            if len(seen) > MAX_VALUES:
                break
    return seen


def _scale_of(seen: dict[Number, str]) -> dict[Number, bool] | None:
    """What the numbers mean; None if they are no labels. -1 needs a 1 beside it."""
    if seen.keys() <= {0, 1}:
        return SCALES[0]
    return SCALES[1] if seen.keys() == {1, -1} else None


def _unknown_scale(number: Number, seen: dict[Number, str]) -> str:
    other = next(value for value in seen if value not in (0, 1))
    return (
        f"'label' must be true or false, got {_text(number)} in a column with the numbers "
        f"{_shown(seen)} ({_text(other)} first at {seen[other]}): which of them are good is "
        "unknown. Write true or false instead."
    )


def _shown(seen: dict[Number, str]) -> str:
    values = sorted(seen)
    return ", ".join(map(_text, values[:MAX_VALUES])) + (", …" if len(values) > MAX_VALUES else "")


def _text(number: Number) -> str:
    return quote(int(number) if number == int(number) else number)
