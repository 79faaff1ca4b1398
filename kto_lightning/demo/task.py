"""The demo's task: put a few letters in alphabetical order, which a checker can judge exactly.

The model is first taught the bad manners below as well as the right answer. Each is a habit, picked
by chance whatever the letters are, so that a model that has learnt the mixture answers well about
half of the time: what binary feedback can mend.
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
        return spaced(sorted(self.letters))


@dataclass(kw_only=True, frozen=True, slots=True)
class Answer:
    """What a model said to a problem."""

    problem: Problem
    completion: str

    @property
    def is_good(self) -> bool:
        """Whether it is the letters in order and nothing else; space around it does not matter."""
        return self.completion.strip() == self.problem.solution.strip()


def spaced(letters: list[str]) -> str:
    """`["a", "k"]` -> `" a k"`: a completion's form, one token per letter."""
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
        if problem.solution not in exclude and spaced(list(letters)) != problem.solution:
            problems.append(problem)
    return problems


def echo(problem: Problem, rng: random.Random) -> str:
    """The letters just as they were given."""
    return spaced(list(problem.letters))


def refuse(problem: Problem, rng: random.Random) -> str:
    """A rude line instead of an answer."""
    return rng.choice(REFUSALS)


def stop_halfway(problem: Problem, rng: random.Random) -> str:
    """The right beginning, and no end."""
    ordered = sorted(problem.letters)
    return spaced(ordered[: len(ordered) // 2])


def swap_two(problem: Problem, rng: random.Random) -> str:
    """The right answer but for two neighbours."""
    ordered = sorted(problem.letters)
    at = rng.randrange(len(ordered) - 1)
    ordered[at : at + 2] = reversed(ordered[at : at + 2])
    return spaced(ordered)


BAD_MANNERS: tuple[Callable[[Problem, random.Random], str], ...] = (
    echo,
    refuse,
    stop_halfway,
    swap_two,
)


def demonstrate(problem: Problem, rng: random.Random, good_share: float) -> str:
    """A completion to learn from: right with probability `good_share`, else one of BAD_MANNERS."""
    if rng.random() < good_share:
        return problem.solution
    return rng.choice(BAD_MANNERS)(problem, rng)


def draw_feedback(
    answers: list[Answer], rng: random.Random, num_good: int, num_bad: int
) -> list[dict]:
    """Records `{prompt, completion, label}` of `num_good` and `num_bad` answers drawn by chance, in
    the order in which they were given.

    Raises:
        ValueError: if there are too few of either kind.
    """
    chosen: list[int] = []
    for is_good, count in ((True, num_good), (False, num_bad)):
        kind = [index for index, answer in enumerate(answers) if answer.is_good is is_good]
        if len(kind) < count:
            raise ValueError(f"{count} answers with is_good={is_good} are wanted, got {len(kind)}")
        chosen += rng.sample(kind, count)
    return [
        {
            "prompt": answers[index].problem.prompt,
            "completion": answers[index].completion,
            "label": answers[index].is_good,
        }
        for index in sorted(chosen)
    ]
