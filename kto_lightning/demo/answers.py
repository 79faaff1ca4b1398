"""Answers to prompts that a program can check, and the feedback records made of them."""

import random
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable


@runtime_checkable
class CheckedPrompt(Protocol):
    """A prompt whose answers can be checked."""

    @property
    def prompt(self) -> str: ...

    def accepts(self, completion: str) -> bool:
        """Whether a completion is good."""
        ...


P = TypeVar("P", bound=CheckedPrompt)


@dataclass(kw_only=True, frozen=True, slots=True)
class Answer(Generic[P]):
    """A completion of a model for a problem."""

    problem: P
    completion: str
    is_whole: bool = True
    """Whether the model ended it, within the tokens that it was given."""

    @property
    def is_good(self) -> bool:
        """Whether it is whole and its prompt accepts it."""
        return self.is_whole and self.problem.accepts(self.completion)

    def as_record(self, *, is_chat: bool) -> dict[str, Any]:
        """A training record: plain text, or messages for a model with a chat template."""
        prompt: Any = self.problem.prompt
        completion: Any = self.completion
        if is_chat:
            prompt = [{"role": "user", "content": prompt}]
            completion = [{"role": "assistant", "content": completion}]
        return {"prompt": prompt, "completion": completion, "label": self.is_good}


def draw_feedback(
    answers: list[Answer[P]], rng: random.Random, num_good: int, num_bad: int
) -> list[Answer[P]]:
    """`num_good` good and `num_bad` bad answers, drawn at random, in their order.

    Raises:
        ValueError: if there are too few of either kind.
    """
    chosen: list[int] = []
    for is_good, count in ((True, num_good), (False, num_bad)):
        kind = [index for index, answer in enumerate(answers) if answer.is_good is is_good]
        if len(kind) < count:
            raise ValueError(f"{count} answers with is_good={is_good} are needed, got {len(kind)}")
        chosen += rng.sample(kind, count)
    return [answers[index] for index in sorted(chosen)]
