"""Guesses what the values of a column judge: known words, other words, or numbers on a scale."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kto_lightning.data.labels import IGNORED, WORDS, Labels, Number, Word, is_unlabeled
from kto_lightning.data.proposal.facts import number_of
from kto_lightning.data.proposal.names import word_set

MAX_WORDS = 12
MAX_WORD_LENGTH = 60
MAX_IN_LABEL = 4
"""Words that labels have on average at most; what has more and differs from row to row is text."""
LOW, HIGH = 0.3, 0.7
"""Parts of a scale up to which a rating is taken for bad, and from which on for good."""
SCALES = ((0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 10), (0, 100), (-1, 1), (-2, 2), (-5, 5))
SCALES_FROM_1 = ((1, 3), (1, 5), (1, 7), (1, 10), (0, 100))
STAR = re.compile("[★⭐🌟]")
LEADING_NUMBER = re.compile(r"(\d+(?:[.,]\d+)?)(?:\s*stars?\b|\b)", re.I)
WORD = re.compile(r"[a-z]+|[^\W\d_]+|[^\w\s]|\d+", re.I)

GOOD = word_set(
    "accept accepted agree approve approved amazing awesome best better chosen correct desired "
    "excellent fantastic great happy harmless high keep liked love loved nice pass passed perfect "
    "preferred relevant resolved right safe satisfactory satisfied solved strong success "
    "successful superb true upvoted useful valid win winner wonderful accurate appropriate y t "
    "plus ok okay acceptable ❤ ♥ 😀 😃 😄 😁 🙂 😊 😍 ✅ ✔ 🎉 💯 👌 👏"
)
BAD = word_set(
    "awful disagree disapprove disapproved disliked disappointed discard downvoted error "
    "fail failed failure fake harmful hallucination hallucinated hate hated horrible incorrect "
    "undesired inaccurate inappropriate invalid irrelevant lose loser loss low offensive poor "
    "reject rejected sad spam terrible toxic unacceptable unhappy unresolved unsafe unsatisfactory "
    "unsatisfied dissatisfied unsolved useless weak worse worst wrong n f minus "
    "😞 😟 🙁 ☹ 😠 😡 🤮 ❌ ✖ 💩"
)
NEITHER = word_set(
    "average fair mediocre medium middling mixed na nan neither neutral none null partial "
    "partially pending skip skipped somewhat tie unclear unknown unrated unsure 😐 😑 🤷 ❓"
)
HALF_GOOD = frozenset(("ok", "okay", "acceptable"))
"""Good beside bad ones only; neither where something better occurs."""
NEGATIONS = frozenset(("not", "no", "non", "never", "un"))


@dataclass(kw_only=True, slots=True)
class LabelGuess:
    """What the values of a column mean as labels."""

    score: Number
    """How much they look like judgements, from 0 (only a name can tell) to 5."""
    both: bool = False
    """Whether both good and bad ones occur."""
    good: Sequence[Word] = ()
    """Words that need saying; empty where the reader knows them."""
    bad: Sequence[Word] = ()
    neither: Sequence[Word] = ()
    unknown: Sequence[Word] = ()
    """Words that nothing tells apart."""
    at_least: Number | None = None
    at_most: Number | None = None
    without_scale: bool = False
    """Whether they are numbers of no known scale, or many texts that begin with one."""
    blank: bool = False
    """Whether some are empty texts, which are no labels."""

    def settings(self) -> dict[str, list[Word] | Number]:
        """The words and thresholds that the reader has to be told."""
        words = {"good": self.good, "bad": self.bad, "neither": self.neither}
        numbers = {"at_least": self.at_least, "at_most": self.at_most}
        said: dict[str, list[Word] | Number] = {name: list(w) for name, w in words.items() if w}
        return said | {name: number for name, number in numbers.items() if number is not None}


def guess_labels(cells: Iterable[object], labels: Labels | None = None) -> LabelGuess | None:
    """What a column's values mean as labels; None if they cannot be labels.

    Args:
        cells: the values.
        labels: what is said of some of them already.
    """
    cells = list(cells)
    filled = [cell for cell in cells if not is_unlabeled(cell)]
    if not filled or any(isinstance(cell, dict | list) for cell in filled):
        return None
    guess = _guess(filled)
    if labels is not None:
        rest = [cell for cell in filled if not _is_explained(cell, labels)]
        score = 0 if guess is None else guess.score
        guess = _guess(rest) if rest else LabelGuess(score=score)
        if guess is not None:
            guess.score = max(guess.score, score)
    if guess is not None:
        guess.blank = len(filled) < len(cells)
    return guess


def _is_explained(cell: object, labels: Labels) -> bool:
    meanings, number = labels.meanings(), number_of(cell)
    if isinstance(cell, bool):
        return ("boolean", cell) in meanings
    if number is not None:
        return labels.has_thresholds or number in meanings
    return isinstance(cell, str) and _compared(cell) in meanings


def _compared(word: str) -> str:
    return word.casefold().translate(IGNORED).strip()


def _guess(cells: list[object]) -> LabelGuess | None:
    numbers = [number_of(cell) for cell in cells]
    if all(number is not None for number in numbers):
        return _guess_numbers([number for number in numbers if number is not None])
    words = dict.fromkeys(str(cell) for cell in cells)
    if all(_rating_of(word) is not None for word in words) and (
        len(words) > MAX_WORDS or all("%" in word for word in words)
    ):
        return LabelGuess(score=0, without_scale=True)
    meanings = {word: known_word(word) for word in words}
    if len(words) > MAX_WORDS or any(len(word) > MAX_WORD_LENGTH for word in words):
        return None
    if all(meaning is not None for meaning in meanings.values()):
        judged = not {word.casefold() for word in words} <= {"true", "false", "yes", "no"}
        both = len(set(meanings.values())) == 2
        return LabelGuess(score=2.5 + 1.5 * judged + both, both=both)
    return _guess_words(list(words), num_cells=len(cells))


def known_word(word: str) -> bool | None:
    """What a word means in every column, without any setting."""
    return WORDS.get(_compared(word))


def _guess_numbers(numbers: list[float]) -> LabelGuess:
    different = set(numbers)
    both = len(different) > 1
    if different <= {0, 1} or different == {1, -1}:
        return LabelGuess(score=2 + both + (-1 in different), both=both)
    scale = _scale_of(different)
    if scale is None or different == {1, 2}:  # the first or second of two, or ratings
        return LabelGuess(score=0, without_scale=True)
    at_least, at_most = _thresholds(different, *scale)
    few = len(different) <= MAX_WORDS and len(numbers) > len(different)
    both = max(different) >= at_least and min(different) <= at_most
    return LabelGuess(score=1.0 + 0.5 * few, both=both, at_least=at_least, at_most=at_most)


def _scale_of(different: set[float]) -> tuple[int, int] | None:
    """The smallest usual scale that holds all numbers; 1 to 5 for those that begin with 1."""
    low, high = min(different), max(different)
    if low >= 1 and high <= 5 and (high > 3 or len(different) < 3):
        return (1, 5)
    scales = SCALES_FROM_1 if low >= 1 else SCALES
    return next((scale for scale in scales if scale[0] <= low and high <= scale[1]), None)


def _thresholds(different: set[float], low: int, high: int) -> tuple[Number, Number]:
    """From which number on a rating is good, and up to which it is bad."""
    at_least, at_most = low + HIGH * (high - low), low + LOW * (high - low)
    if all(number == int(number) for number in different):
        return math.ceil(round(at_least, 6)), math.floor(round(at_most, 6))
    return round(at_least, 6), round(at_most, 6)


def _guess_words(words: list[str], *, num_cells: int) -> LabelGuess | None:
    """Words by a table, by their number of stars, or by the number they begin with."""
    ratings = {word: _rating_of(word) for word in words}
    rated = {word: rating for word, rating in ratings.items() if rating is not None}
    scale = _scale_of(set(rated.values())) if rated and len(rated) == len(words) else None
    if scale is not None:
        at_least, at_most = _thresholds(set(rated.values()), *scale)
        good = [word for word, rating in rated.items() if rating >= at_least]
        bad = [word for word, rating in rated.items() if rating <= at_most]
        rest = [word for word in words if word not in good and word not in bad]
        both = bool(good and bad)
        return LabelGuess(score=2.0, both=both, good=good, bad=bad, neither=rest)
    meanings = {word: _meaning_of(word) for word in words}
    better = any(m == "good" and not _parts(word) & HALF_GOOD for word, m in meanings.items())
    for word in words:
        if better and meanings[word] == "good" and _parts(word) <= HALF_GOOD:
            meanings[word] = "neither"
    groups = {
        kind: [word for word in words if meanings[word] == kind]
        for kind in ("good", "bad", "neither", "")
    }
    judged = len(groups["good"]) + len(groups["bad"])
    different = len(words) > num_cells / 2
    length = sum(len(word.split()) for word in words) / len(words)
    if (not judged and (different or len(words) < 2)) or (different and length > MAX_IN_LABEL):
        return None  # texts, or a constant
    score = 4.0 * judged / len(words) if judged else 0.0
    return LabelGuess(
        score=score,
        both=bool(groups["good"] and groups["bad"]),
        good=groups["good"],
        bad=groups["bad"],
        neither=groups["neither"],
        unknown=groups[""],
    )


def _rating_of(word: str) -> float | None:
    stars = len(STAR.findall(word))
    if stars:
        return float(stars)
    found = LEADING_NUMBER.match(word.strip())
    return float(found[1].replace(",", ".")) if found else None


def _parts(word: str) -> set[str]:
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", word.replace("n't", " not").replace("\ufe0f", ""))
    return {part.lower() for part in WORD.findall(spaced.replace("_", " "))}


def _meaning_of(word: str) -> str:
    """`good`, `bad`, `neither`, or nothing if the table does not tell."""
    known = known_word(word)
    if known is not None:
        return "good" if known else "bad"
    parts = _parts(word)
    negated = bool(parts & NEGATIONS)
    words = {part: known_word(part) for part in parts - NEGATIONS}
    good = bool(parts & GOOD) or True in words.values()
    bad = bool(parts & BAD) or False in words.values()
    if parts & NEITHER or (good and bad):
        return "neither" if parts & NEITHER else ""
    if good or bad:
        return "good" if good != negated else "bad"
    return ""
