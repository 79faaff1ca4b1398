"""Labels: words and numbers of a column -> desirable, undesirable, left out, or a message.

A word says the same in every column. A number does not: 1 is good beside 0 or -1, and the worst
beside 2 to 5. So numbers are decided by thresholds, if they are given, else by all the values that
the column holds.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kto_lightning.data.strict_json import RecordError, parse_json_or_text, quote
from kto_lightning.errors import ConfigError, DataError

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
YAML_WORDS = {True: ("true", "yes", "on"), False: ("false", "no", "off")}
"""What may have been written where YAML read true or false."""

Word = str | int | float | bool
Words = list[Word] | Word
LabelColumn = Callable[[], Iterable[tuple[str, object]]]
"""Reads all values of a label column, each with its place, `file:line`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """What the values of the label column mean.

    Args:
        good: words or numbers that mean desirable, beside those that are understood anyway.
        bad: words or numbers that mean undesirable.
        neither: words or numbers whose records are left out and counted.
        at_least: ratings from which a record is desirable.
        at_most: ratings up to which it is undesirable; what lies between the two is left out and
            counted. With one of the two only, all other ratings are of the other class, unless
            numbers are named in the lists above.
    """

    good: Words | None = None
    bad: Words | None = None
    neither: Words | None = None
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        meanings: dict[object, str] = {}
        for name in ("good", "bad", "neither"):
            for word in _as_list(getattr(self, name)):
                for key in _keys_of(word, f"--data.labels.{name}"):
                    if meanings.setdefault(key, name) != name:
                        raise ConfigError(
                            f"{quote(word)} is in --data.labels.{meanings[key]} and in "
                            f"--data.labels.{name}. Keep one of the two."
                        )
        for name in ("at_least", "at_most"):
            limit = getattr(self, name)
            if limit is not None and not math.isfinite(limit):
                raise ConfigError(f"--data.labels.{name} must be a finite number, got {limit}.")
        if None not in (self.at_least, self.at_most) and self.of_rating(self.at_most or 0.0):
            raise ConfigError(
                f"--data.labels.at_most {self.at_most:g} must be below --data.labels.at_least "
                f"{self.at_least:g}: a rating cannot be bad and good."
            )

    def meanings(self) -> dict[object, bool | None]:
        """What each word (in its compared form) and each number means; None: left out."""
        sides: tuple[tuple[Words | None, bool | None], ...]
        sides = ((self.good, True), (self.bad, False), (self.neither, None))
        return {
            key: meaning
            for words, meaning in sides
            for word in _as_list(words)
            for key in _keys_of(word, "--data.labels")
        }

    @property
    def has_thresholds(self) -> bool:
        return self.at_least is not None or self.at_most is not None

    def of_rating(self, rating: Number) -> bool | None:
        """Whether a rating is good, by the thresholds; None: it lies between them."""
        if self.at_least is not None and rating >= self.at_least:
            return True
        if self.at_most is not None and rating <= self.at_most:
            return False
        if self.at_least is None or self.at_most is None:
            return self.at_least is None
        return None

    def __str__(self) -> str:
        parts = [
            *([f"at least {self.at_least:g} good"] if self.at_least is not None else []),
            *([f"at most {self.at_most:g} bad"] if self.at_most is not None else []),
            *(
                f"{', '.join(map(_shown_word, _as_list(words)))}: {name}"
                for name, words in (
                    ("good", self.good),
                    ("bad", self.bad),
                    ("left out", self.neither),
                )
                if words is not None
            ),
        ]
        return "; ".join(parts)


class LabelReader:
    """Reads the labels of one source: words at once, numbers once it has seen the whole column.

    Args:
        column: read once, when the first number is met that no setting explains.
        optional: whether a record without a label can be used.
        labels: what values mean, beside the words that are understood anyway.
    """

    def __init__(
        self, column: LabelColumn, *, optional: bool = False, labels: Labels | None = None
    ) -> None:
        self._column = column
        self.optional = optional
        self._labels = labels or Labels()
        self._given = self._labels.meanings()
        named = [key for key, meaning in self._given.items() if meaning is not None]
        self._names_numbers = any(isinstance(key, int | float) for key in named)
        self._meanings: dict[object, bool | None] = {**WORDS, **self._given}
        self._seen: dict[Number, str] | None = None
        """The numbers of the column, each with its first place."""
        self._scale: dict[Number, bool] | None = None

    def read(self, label: object) -> bool | None:
        """Whether a label means desirable; None: neither, its record is left out.

        Raises:
            RecordError: if it is unknown what it means.
            DataError: for a number that the column did not have when its numbers were decided.
        """
        if isinstance(label, bool):
            return self._meanings.get(("boolean", label), label)
        word = _as_word(label) if isinstance(label, str) else None
        if word in self._meanings:
            return self._meanings[word]
        number = _as_number(label)
        if number is None:
            raise RecordError(
                f"'label' must be true or false, got {quote(label)}. {self._advice(label)}",
                kind="'label' is not understood",
            )
        if number in self._given:
            return self._given[number]
        if self._decides(number):
            return self._labels.of_rating(number)
        if any(isinstance(key, int | float) for key in self._given):
            raise RecordError(
                f"'label' is {_text(number)}. {self._advice(number)}",
                kind="'label' is not understood",
            )
        return self._read_number(number)

    def _decides(self, rating: Number) -> bool:
        """Whether the thresholds say what a rating means. A single one does not for those that it
        leaves where the lists name other numbers as good or bad."""
        low, high = self._labels.at_most, self._labels.at_least
        if self._names_numbers and (low is None or high is None):
            return (high is not None and rating >= high) or (low is not None and rating <= low)
        return self._labels.has_thresholds

    def _advice(self, label: object) -> str:
        if is_unlabeled(label):
            return "Drop the line or give it a label; --data.unlabeled skip leaves such lines out."
        if self._labels.has_thresholds and isinstance(label, str):
            return (
                "Thresholds compare numbers: write it as one, or add it to --data.labels.good, "
                "--data.labels.bad or --data.labels.neither."
            )
        if self._given:
            return (
                "It is in neither --data.labels.good nor --data.labels.bad: add it to one of them, "
                "or to --data.labels.neither to leave such records out."
            )
        return (
            "Drop the line or give it a label, or name such words with --data.labels.good and "
            "--data.labels.bad."
        )

    def _read_number(self, number: Number) -> bool:
        if self._seen is None:
            self._seen = _numbers_of(self._column(), self._meanings)
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


def judgements_of(label: object) -> list[object]:
    """The judgements in a label: itself, or the elements of a list or its JSON text, one for each
    judge."""
    label = _listed(label)
    return (
        [item for item in label if not is_unlabeled(item)] if isinstance(label, list) else [label]
    )


def is_unlabeled(label: object) -> bool:
    """Whether a label is missing: null, NaN, a blank text, or a list of nothing else."""
    label = _listed(label)
    if isinstance(label, list):
        return all(map(is_unlabeled, label))
    if isinstance(label, float):
        return math.isnan(label)
    if isinstance(label, str):
        return not label.strip()
    return label is None


def _listed(label: object) -> object:
    """The list whose JSON text a label is, as tables have it; any other label as it is."""
    if not isinstance(label, str) or not label.lstrip().startswith("["):
        return label
    value = parse_json_or_text(label)
    return value if isinstance(value, list) else label


def _as_list(words: Words | None) -> list[Word]:
    if words is None:
        return []
    return words if isinstance(words, list) else [words]


def _shown_word(word: Word) -> str:
    """A word as it may have been written: YAML reads yes and on as true."""
    return (
        f"{str(word).lower()} ({', '.join(YAML_WORDS[word][1:])})"
        if isinstance(word, bool)
        else str(word)
    )


def _keys_of(word: Word, option: str) -> list[object]:
    """The forms in which a value of a column is compared with a word that a setting names."""
    if isinstance(word, bool):
        return [("boolean", word), *YAML_WORDS[word]]
    number = _as_number(word)
    if number is not None:
        return [number]
    key = _as_word(word) if isinstance(word, str) else ""
    if not key:
        raise ConfigError(f"{option} must hold words or numbers, got {quote(word)}.")
    return [key]


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


def _numbers_of(
    column: Iterable[tuple[str, object]], meanings: dict[object, bool | None]
) -> dict[Number, str]:
    """The different numbers of a column that mean nothing yet, at most one more than are shown,
    with their places."""
    seen: dict[Number, str] = {}
    for place, label in column:
        known = isinstance(label, str) and _as_word(label) in meanings
        number = None if known else _as_number(label)
        if number is not None and number not in seen and number not in meanings:
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
        f"unknown. {_advice_on(seen)}"
    )


def _advice_on(seen: dict[Number, str]) -> str:
    if len(seen) > 2:
        low, high = sorted(seen)[0], sorted(seen)[-1]
        good, bad = low + 0.75 * (high - low), low + 0.25 * (high - low)
        return (
            "Say from which number on a record is good, and up to which it is bad, such as "
            f"--data.labels.at_least {good:.4g} --data.labels.at_most {bad:.4g}."
        )
    return "Say so with --data.labels.good and --data.labels.bad, or write true or false instead."


def _shown(seen: dict[Number, str]) -> str:
    values = sorted(seen)
    return ", ".join(map(_text, values[:MAX_VALUES])) + (", …" if len(values) > MAX_VALUES else "")


def _text(number: Number) -> str:
    return quote(int(number) if number == int(number) else number)
