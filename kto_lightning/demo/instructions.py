"""Instructions that a program can check: a form that the answer must have, or the one right answer.

Prompts are made by code. Three kinds are held out: no feedback is ever given on them, so that they
show whether following instructions carries over.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kto_lightning.demo import answer_checks

TOPICS = (
    "the sea", "bread", "winter", "a bicycle", "the moon", "coffee", "a library", "rain", "a tree",
    "a train", "the sun", "a horse", "music", "a kitchen", "glass", "paper", "the desert", "a bee",
    "a bridge", "wool", "a river", "salt", "a market", "chess", "a lighthouse", "tea", "a cloud",
    "a garden", "iron", "a mountain",
)  # fmt: skip
HELD_OUT_TOPICS = (
    "snow", "a clock", "a fish", "a school", "an apple", "the wind", "a hospital", "a sheep",
    "a castle", "honey", "a ship", "the night", "a stone", "a guitar", "milk",
)  # fmt: skip
THINGS = ("fruits", "colours", "animals", "countries", "jobs", "sports", "tools", "vegetables")
KEYS = ("name", "colour", "size", "age", "use", "place", "price", "shape")
ENDINGS = ("That is all.", "Have a nice day!", "I hope this helps.", "Good luck!", "The end.")
BEGINNINGS = ("Well,", "In short,", "Of course,", "As you know,")
WORDS = ("blue", "old", "water", "people", "often", "small", "hands", "world")
QUESTIONS = (
    "What is {topic}?",
    "Describe {topic}.",
    "Tell me something about {topic}.",
    "Why do people like {topic}?",
)


@dataclass(kw_only=True, frozen=True, slots=True)
class Instruction:
    """One prompt, with what its check needs."""

    kind: str
    prompt: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def accepts(self, completion: str) -> bool:
        """Whether the answer follows the instruction."""
        return _KINDS[self.kind].check(completion.strip(), **self.arguments)


@dataclass(kw_only=True, frozen=True, slots=True)
class Kind:
    """How prompts of one kind are made and their answers checked."""

    make: Callable[[random.Random, str], tuple[str, dict[str, Any]]]
    """From a topic: the prompt, and the arguments of `check`."""
    check: Callable[..., bool]


def _question(rng: random.Random, topic: str) -> str:
    return rng.choice(QUESTIONS).format(topic=topic)


def _at_most_words(rng: random.Random, topic: str) -> tuple[str, dict[str, Any]]:
    limit = rng.choice((5, 6, 8, 10, 12))
    return f"{_question(rng, topic)} Use at most {limit} words.", {"limit": limit}


def _lowercase(rng: random.Random, topic: str) -> tuple[str, dict[str, Any]]:
    return f"{_question(rng, topic)} Write one short sentence in lowercase letters only.", {}


def _json_keys(rng: random.Random, topic: str) -> tuple[str, dict[str, Any]]:
    keys = rng.sample(KEYS, 2)
    form = ", ".join(f'"{key}": ""' for key in keys)
    prompt = f"Fill in this JSON for {topic} and write nothing else: {{{form}}}"
    return prompt, {"keys": keys}


def _numbered_list(rng: random.Random, topic: str) -> tuple[str, dict[str, Any]]:
    count, things = rng.randint(2, 5), rng.choice(THINGS)
    how = rng.choice(("List", "Name", "Give me"))
    return f"{how} {count} {things} as a numbered list. Write nothing else.", {"count": count}


def _without_comma(rng: random.Random, topic: str) -> tuple[str, dict[str, Any]]:
    return f"{_question(rng, topic)} Answer in one sentence, without a comma.", {}


def _ends_with(rng: random.Random, topic: str) -> tuple[str, dict[str, Any]]:
    ending = rng.choice(ENDINGS)
    return f'{_question(rng, topic)} Be brief. End your answer with "{ending}"', {"ending": ending}


def _language(rng: random.Random, topic: str) -> tuple[str, dict[str, Any]]:
    language = rng.choice(sorted(answer_checks.FUNCTION_WORDS.keys() - {"English"}))
    return f"{_question(rng, topic)} Answer with one short sentence in {language}.", {
        "language": language
    }


def _sum_in_words(rng: random.Random, topic: str) -> tuple[str, dict[str, Any]]:
    left, right = rng.randint(1, 9), rng.randint(1, 9)
    numbers = answer_checks.NUMBERS
    asked = rng.choice(("What is", "How much is"))
    prompt = f"{asked} {numbers[left]} plus {numbers[right]}? Write the number as a word."
    return prompt, {"left": left, "right": right}


def _yes_or_no(rng: random.Random, topic: str) -> tuple[str, dict[str, Any]]:
    left, right = rng.sample(range(1, 100), 2)
    word, is_yes = rng.choice((("greater", left > right), ("less", left < right)))
    return f"Is {left} {word} than {right}? Answer only yes or no.", {"is_yes": is_yes}


def _with_word(rng: random.Random, topic: str) -> tuple[str, dict[str, Any]]:
    word = rng.choice(WORDS)
    return f'{_question(rng, topic)} Write one sentence that has the word "{word}" in it.', {
        "word": word
    }


def _capitals(rng: random.Random, topic: str) -> tuple[str, dict[str, Any]]:
    return f"{_question(rng, topic)} Write one short sentence in capital letters only.", {}


def _begins_with(rng: random.Random, topic: str) -> tuple[str, dict[str, Any]]:
    beginning = rng.choice(BEGINNINGS)
    return f'{_question(rng, topic)} Be brief. Begin your answer with "{beginning}"', {
        "beginning": beginning
    }


def _two_sentences(rng: random.Random, topic: str) -> tuple[str, dict[str, Any]]:
    return f"{_question(rng, topic)} Answer in exactly two short sentences.", {"count": 2}


_TRAINED = {
    "at most n words": Kind(make=_at_most_words, check=answer_checks.has_at_most_words),
    "lowercase": Kind(make=_lowercase, check=answer_checks.is_lowercase),
    "JSON with keys": Kind(make=_json_keys, check=answer_checks.is_json_with_keys),
    "numbered list": Kind(make=_numbered_list, check=answer_checks.is_numbered_list),
    "without a comma": Kind(make=_without_comma, check=answer_checks.has_no_comma),
    "ends with": Kind(make=_ends_with, check=answer_checks.ends_with),
    "language": Kind(make=_language, check=answer_checks.is_in_language),
    "sum in words": Kind(make=_sum_in_words, check=answer_checks.is_sum_in_words),
    "yes or no": Kind(make=_yes_or_no, check=answer_checks.is_yes_or_no),
    "with a word": Kind(make=_with_word, check=answer_checks.has_word),
}
_HELD_OUT = {
    "capitals": Kind(make=_capitals, check=answer_checks.is_uppercase),
    "begins with": Kind(make=_begins_with, check=answer_checks.begins_with),
    "two sentences": Kind(make=_two_sentences, check=answer_checks.has_sentences),
}
_KINDS = _TRAINED | _HELD_OUT
TRAINED_KINDS = tuple(_TRAINED)
HELD_OUT_KINDS = tuple(_HELD_OUT)


def draw_instructions(
    rng: random.Random,
    count: int,
    *,
    kinds: Sequence[str] = TRAINED_KINDS,
    topics: Sequence[str] = TOPICS,
    exclude: frozenset[str] = frozenset(),
) -> list[Instruction]:
    """`count` instructions, the kinds in turn, none with a prompt in `exclude`.

    Prompts may occur more than once: sampled answers to them differ.
    """
    drawn: list[Instruction] = []
    while len(drawn) < count:
        kind = kinds[len(drawn) % len(kinds)]
        prompt, arguments = _KINDS[kind].make(rng, rng.choice(topics))
        if prompt not in exclude:
            drawn.append(Instruction(kind=kind, prompt=prompt, arguments=arguments))
    return drawn


def draw_held_out(
    rng: random.Random, count: int, *, kinds: Sequence[str] = TRAINED_KINDS
) -> list[Instruction]:
    """`count` different instructions about topics on which no feedback is given."""
    seen: set[str] = set()
    drawn: list[Instruction] = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        [each] = draw_instructions(
            rng, 1, kinds=[kind], topics=HELD_OUT_TOPICS, exclude=frozenset(seen)
        )
        seen.add(each.prompt)
        drawn.append(each)
    return drawn
