"""Checks of an answer, each a pure function of its text; surrounding space is already removed."""

import json
import re
from collections.abc import Sequence

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip

FUNCTION_WORDS = {
    "English": "the of and to in is are that it for with as on by this was be or from which",
    "French": "le la les des et est une un dans que qui pour sur avec du au ce il elle sont en",
    "German": "der die das und ist ein eine in zu den mit für auf nicht von sind im es sie des",
    "Italian": "il la le di e è un una che per con del della in si sono nel al gli lo dei come",
    "Spanish": "el la los las de y es un una que en por con del se para su al son como más",
}
"""The most common words of a language, by which a short sentence is told from the others."""


def words_of(text: str) -> list[str]:
    """Words in lower case; apostrophes part them, as in the French `l'eau`."""
    return re.findall(r"[^\W\d_]+", text.lower())


def has_at_most_words(answer: str, limit: int) -> bool:
    """Between one and `limit` words, as parted by space."""
    return 0 < len(answer.split()) <= limit


def is_lowercase(answer: str) -> bool:
    """Letters, and no capital among them."""
    return any(each.isalpha() for each in answer) and answer == answer.lower()


def is_uppercase(answer: str) -> bool:
    """Letters, and all of them capital."""
    return any(each.isalpha() for each in answer) and answer == answer.upper()


def is_json_with_keys(answer: str, keys: Sequence[str]) -> bool:
    """A JSON object with exactly these keys, and nothing around it."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and sorted(value) == sorted(keys)


def is_numbered_list(answer: str, count: int) -> bool:
    """`count` different items on lines that begin with 1., 2., …, and no other line but empty
    ones."""
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    items = {line.partition(".")[2].strip().lower() for line in lines}
    numbers = [line.partition(".")[0] for line in lines]
    return numbers == [str(n + 1) for n in range(count)] and len(items) == count and all(items)


def has_no_comma(answer: str) -> bool:
    """One sentence without a comma."""
    return "," not in answer and has_sentences(answer, 1)


def ends_with(answer: str, ending: str) -> bool:
    """Something, then the ending as it was asked for."""
    return answer.endswith(ending) and len(answer) > len(ending)


def begins_with(answer: str, beginning: str) -> bool:
    """The beginning as it was asked for, then something."""
    return answer.startswith(beginning) and len(answer) > len(beginning)


def is_in_language(answer: str, language: str) -> bool:
    """Three words or more, at least a fifth of them common words of the language, and more of these
    than of any other language."""
    words = words_of(answer)
    counts = {
        name: sum(map(set(common.split()).__contains__, words))
        for name, common in FUNCTION_WORDS.items()
    }
    others = max(count for name, count in counts.items() if name != language)
    return len(words) >= 3 and counts[language] >= len(words) / 5 and counts[language] > others


def is_sum_in_words(answer: str, left: int, right: int) -> bool:
    """The sum as a word; no digit, and no other number than the two that were given."""
    found = {word for word in words_of(answer) if word in NUMBERS}
    total = NUMBERS[left + right]
    given = {NUMBERS[left], NUMBERS[right]}
    return total in found and found <= given | {total} and not re.search(r"\d", answer)


def is_yes_or_no(answer: str, is_yes: bool) -> bool:
    """The right one of the two words, perhaps with a full stop."""
    return answer.lower().rstrip(".!") == ("yes" if is_yes else "no")


def has_word(answer: str, word: str) -> bool:
    """One sentence with the word in it."""
    return word in words_of(answer) and has_sentences(answer, 1)


def has_sentences(answer: str, count: int) -> bool:
    """Exactly `count` sentences: each ends with a mark, before a space or the answer's end."""
    ends = re.findall(r"[.!?]+(?=\s|$)", answer)
    return len(ends) == count and answer[-1:] in ".!?"
