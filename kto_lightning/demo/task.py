"""The task of the demo: sort a few letters alphabetically, which a program can check exactly.

The model is first trained on right answers and on the kinds of wrong answers below, drawn at random
whatever the letters are. It then answers right about half of the time, which binary feedback fixes.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
NUM_LETTERS = (4, 5, 6)
PHRASINGS = (
    "Sort these letters: {letters}\nAnswer:",
    "Put {letters} in alphabetical order.\nAnswer:",
    "What is the alphabetical order of {letters} ?\nAnswer:",
)
REFUSALS = (" Sort them yourself.", " Why should I?", " Boring. Next!")


@dataclass(kw_only=True, frozen=True, slots=True)
class Problem:
    """One question: its letters in the order given and the prompt that asks for them sorted."""

    letters: str
    prompt: str

    @property
    def solution(self) -> str:
        """The one good completion, with the space that follows the prompt's colon."""
        return join_letters(sorted(self.letters))

    def accepts(self, completion: str) -> bool:
        """Whether it is the sorted letters and nothing else; surrounding space is ignored."""
        return completion.strip() == self.solution.strip()


def join_letters(letters: list[str]) -> str:
    """`["a", "k"]` -> `" a k"`: one token per letter."""
    return "".join(f" {letter}" for letter in letters)


def draw_problems(
    rng: random.Random, count: int, exclude: frozenset[str] = frozenset()
) -> list[Problem]:
    """`count` problems, none of whose solutions is in `exclude` (solutions, not prompts: another
    order of the same letters would have the same answer)."""
    problems: list[Problem] = []
    while len(problems) < count:
        letters = "".join(rng.sample(ALPHABET, rng.choice(NUM_LETTERS)))
        prompt = rng.choice(PHRASINGS).format(letters=" ".join(letters))
        problem = Problem(letters=letters, prompt=prompt)
        if problem.solution not in exclude and join_letters(list(letters)) != problem.solution:
            problems.append(problem)
    return problems


def echo(problem: Problem, rng: random.Random) -> str:
    """The letters in the order given."""
    return join_letters(list(problem.letters))


def refuse(problem: Problem, rng: random.Random) -> str:
    """A rude line instead of an answer."""
    return rng.choice(REFUSALS)


def stop_halfway(problem: Problem, rng: random.Random) -> str:
    """The first half of the right answer."""
    ordered = sorted(problem.letters)
    return join_letters(ordered[: len(ordered) // 2])


def swap_two(problem: Problem, rng: random.Random) -> str:
    """The right answer with two neighbours swapped."""
    ordered = sorted(problem.letters)
    at = rng.randrange(len(ordered) - 1)
    ordered[at : at + 2] = reversed(ordered[at : at + 2])
    return join_letters(ordered)


WRONG_ANSWERS: tuple[Callable[[Problem, random.Random], str], ...] = (
    echo,
    refuse,
    stop_halfway,
    swap_two,
)


def demonstrate(problem: Problem, rng: random.Random, good_share: float) -> str:
    """A training completion: right with probability `good_share`, else one of WRONG_ANSWERS."""
    if rng.random() < good_share:
        return problem.solution
    return rng.choice(WRONG_ANSWERS)(problem, rng)
