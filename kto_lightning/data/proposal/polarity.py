"""Columns that name something bad: in `is_toxic`, true judges an answer as undesirable."""

from collections.abc import Iterable

from kto_lightning.data.proposal.facts import number_of
from kto_lightning.data.proposal.labels import BAD, NEGATIONS, LabelGuess
from kto_lightning.data.proposal.names import parts_of, word_set

NAMES = BAD - word_set("f n minus low loss lose weak") | word_set(
    "bug bugs complaint complaints dislike downvote downvotes errors flagged harm hallucinations "
    "refusal refused toxicity violation violations dissatisfaction"
)
YES_OR_NO = word_set("true false yes no y n t f")


def names_something_bad(path: str) -> bool:
    """Whether a column's name says that what it holds more of is worse."""
    own, _ = parts_of(path)
    return bool(NAMES.intersection(own)) and not NEGATIONS.intersection(own)


def note_on_name(path: str) -> list[str]:
    """What to know of a label column that names something bad, and is read without settings."""
    if not names_something_bad(path):
        return []
    return [
        f"true in {path} is read as good: --data.labels.good '[false, 0]' --data.labels.bad "
        "'[true, 1]' turns it"
    ]


def turned(guess: LabelGuess, cells: Iterable[object]) -> LabelGuess | None:
    """What values mean in a column that names something bad; None if no setting can say it."""
    filled = [cell for cell in cells if cell is not None and str(cell).strip()]
    if guess.settings() or guess.unknown or guess.without_scale:
        return None
    if all(number_of(cell) is not None for cell in filled):
        low = min(number_of(cell) or 0 for cell in filled)
        guess.good, guess.bad = [-1 if low < 0 else 0], [1]
    elif {str(cell).strip().casefold() for cell in filled} <= YES_OR_NO:
        guess.good, guess.bad = [False], [True]
    return guess
