"""A stream of examples, cut into buffers of which no more than two are held at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from kto_lightning.batches.sampler import StepPlan


@dataclass(kw_only=True, slots=True)
class StreamedExample:
    """One example of a stream, as it is packed, and where it stood."""

    index: int
    """The place of its record among the usable ones of the epoch, from 0."""
    prompt_ids: Int32[np.ndarray, " prompt"]
    """Truncated at its start under `keep_end`, else whole."""
    completion_ids: Int32[np.ndarray, " completion"]
    """Never truncated, see `Example`."""
    desirable: bool
    weight: float
    prompt_key: int
    """Equal where the untruncated prompts are."""
    location: str
    """`file:line`."""
    checksum: int
    """Of all usable records before its own."""


class HeldExamples:
    """Some examples of a stream, in memory: `collate.TokenizedExamples`."""

    prompt_lengths: Int64[np.ndarray, " examples"]
    completion_lengths: Int64[np.ndarray, " examples"]
    desirable: Bool[np.ndarray, " examples"]
    weights: Float32[np.ndarray, " examples"]
    prompt_keys: Int64[np.ndarray, " examples"]

    def __init__(self, examples: list[StreamedExample]) -> None:
        self._examples = examples
        self.prompt_lengths = np.array([len(e.prompt_ids) for e in examples], dtype=np.int64)
        self.completion_lengths = np.array(
            [len(e.completion_ids) for e in examples], dtype=np.int64
        )
        self.desirable = np.array([e.desirable for e in examples], dtype=bool)
        self.weights = np.array([e.weight for e in examples], dtype=np.float32)
        self.prompt_keys = np.array([e.prompt_key for e in examples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, position: int, /) -> StreamedExample:
        return self._examples[position]

    def take(self, positions: Int64[np.ndarray, " chosen"]) -> "HeldExamples":
        return HeldExamples([self._examples[position] for position in positions.tolist()])


@dataclass(kw_only=True, slots=True)
class Buffer:
    """Neighbours in a stream, from among which partners are taken."""

    number: int
    """From 0."""
    examples: HeldExamples
    is_last: bool

    @property
    def span(self) -> str:
        """Where it begins and ends in the files."""
        return f"{self.examples[0].location} to {self.examples[len(self.examples) - 1].location}"


def cut_into_buffers(
    examples: Iterator[StreamedExample], size: int, *, first: int = 0
) -> Iterator[Buffer]:
    """Buffers of `size` neighbours; the last takes what is left, up to 2 · `size` − 1.

    So a buffer is small only where the whole stream is, and no leftover of one example is in want
    of a partner. A buffer is given out once the next one is whole, which is all that is held.

    Args:
        examples: from the first of buffer `first` on.
        size: of every buffer but the last.
        first: the number of the first buffer.
    """
    held: list[StreamedExample] = []
    number = first
    for example in examples:
        held.append(example)
        if len(held) == 2 * size:
            yield Buffer(number=number, examples=HeldExamples(held[:size]), is_last=False)
            del held[:size]
            number += 1
    if held:
        yield Buffer(number=number, examples=HeldExamples(held), is_last=True)


@dataclass(kw_only=True, slots=True)
class StreamedStep:
    """A step's plan with the examples it is about, so that its buffer need not be at hand."""

    plan: StepPlan
    """Its positions are those in `examples`."""
    examples: HeldExamples


def with_its_examples(plan: StepPlan, examples: HeldExamples) -> StreamedStep:
    """A plan of a buffer, with those of the buffer's examples that it names."""
    num_examples = len(plan.examples)
    named = [plan.examples] if plan.partners is None else [plan.examples, plan.partners]
    needed, place = np.unique(np.concatenate(named), return_inverse=True)
    partners = None if plan.partners is None else place[num_examples:]
    return StreamedStep(
        plan=replace(plan, examples=place[:num_examples], partners=partners),
        examples=examples.take(needed),
    )
