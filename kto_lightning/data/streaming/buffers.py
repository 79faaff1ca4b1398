"""Buffers of a stream of examples: partners and shuffling stay inside one; two are in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from kto_lightning.batches.sampler import StepPlan


@dataclass(kw_only=True, slots=True)
class StreamedExample:
    """One tokenized example of a stream, and its place in it."""

    index: int
    """Position of its record among the usable records of the epoch, from 0."""
    prompt_ids: Int32[np.ndarray, " prompt"]
    """Truncated at its start under `keep_end`, else whole."""
    completion_ids: Int32[np.ndarray, " completion"]
    """Never truncated, see `examples.Example`."""
    desirable: bool
    weight: float
    prompt_key: int
    """Equal where the untruncated prompts are equal."""
    location: str
    """`file:line`."""
    checksum: int
    """CRC-32 of all usable records before this one."""


class BufferedExamples:
    """Examples of a stream held in memory; implements `collate.TokenizedExamples`."""

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

    def take(self, positions: Int64[np.ndarray, " chosen"]) -> "BufferedExamples":
        return BufferedExamples([self._examples[position] for position in positions.tolist()])


@dataclass(kw_only=True, slots=True)
class Buffer:
    """Consecutive examples of a stream, which are paired with each other."""

    number: int
    """From 0."""
    examples: BufferedExamples
    is_last: bool

    @property
    def span(self) -> str:
        """First and last place in the files, as `file:line to file:line`."""
        return f"{self.examples[0].location} to {self.examples[len(self.examples) - 1].location}"


def cut_into_buffers(
    examples: Iterator[StreamedExample], size: int, *, first: int = 0
) -> Iterator[Buffer]:
    """Buffers of `size` consecutive examples; the last takes the rest, up to 2 · `size` − 1.

    So a buffer is smaller than `size` only if the whole stream is, and a single last example never
    lacks a partner. A buffer is yielded when the next one is complete; no more is held.

    Args:
        examples: starting with the first example of buffer `first`.
        size: of every buffer except the last.
        first: the number of the first buffer.
    """
    held: list[StreamedExample] = []
    number = first
    for example in examples:
        held.append(example)
        if len(held) == 2 * size:
            yield Buffer(number=number, examples=BufferedExamples(held[:size]), is_last=False)
            del held[:size]
            number += 1
    if held:
        yield Buffer(number=number, examples=BufferedExamples(held), is_last=True)


@dataclass(kw_only=True, slots=True)
class StreamedStep:
    """A step's plan with its examples and partners, which is all that a loader worker needs."""

    plan: StepPlan
    """Indexes `examples`."""
    examples: BufferedExamples


def attach_examples(plan: StepPlan, examples: BufferedExamples) -> StreamedStep:
    """A plan with the examples of its buffer that it uses, re-indexed to them."""
    num_examples = len(plan.examples)
    used = [plan.examples] if plan.partners is None else [plan.examples, plan.partners]
    positions, index = np.unique(np.concatenate(used), return_inverse=True)
    partners = None if plan.partners is None else index[num_examples:]
    return StreamedStep(
        plan=replace(plan, examples=index[:num_examples], partners=partners),
        examples=examples.take(positions),
    )
