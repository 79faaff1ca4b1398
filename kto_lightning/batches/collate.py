"""From a step's plan to tensors: sequences packed end to end, and the rows that are scored.

Everything that is an index is computed here, on the host, in the loader's workers, so that the
device is never asked where a prompt ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch.utils.data import Dataset

from kto_lightning.batches.packing import MicroBatch
from kto_lightning.batches.sampler import StepPlan
from kto_lightning.batches.types import PackedBatch, Scored, Sequences, StepBatch

KEY_BYTES = 16


@runtime_checkable
class TokenizedExample(Protocol):
    """What is packed of an example; `data/tokenize.py` makes them."""

    @property
    def index(self) -> int: ...
    @property
    def prompt_ids(self) -> Int[np.ndarray, " prompt"]: ...
    @property
    def completion_ids(self) -> Int[np.ndarray, " completion"]: ...
    @property
    def desirable(self) -> bool: ...


@runtime_checkable
class TokenizedExamples(Protocol):
    """A data set of them: arrays of all examples are in memory, token ids come one by one."""

    @property
    def prompt_lengths(self) -> Int[np.ndarray, " examples"]: ...
    @property
    def completion_lengths(self) -> Int[np.ndarray, " examples"]: ...
    @property
    def desirable(self) -> Bool[np.ndarray, " examples"]: ...
    @property
    def weights(self) -> Float[np.ndarray, " examples"]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> TokenizedExample: ...


@dataclass(kw_only=True)
class StepBatches(Dataset[StepBatch]):
    """`batches[plan]` is the step's batch for the rank whose plan it is.

    For `DataLoader(batches, batch_size=None, sampler=PlanSampler(…))`. Mismatched completions are
    packed where the plan has partners.
    """

    examples: TokenizedExamples
    desirable_weight: float
    """λ_D; an example's weight is that of its class times the record's own."""
    undesirable_weight: float
    """λ_U"""
    max_length: int | None
    """Tokens at which prompt + completion are cut at the end; None: nowhere."""
    can_share_prompts: bool
    """Whether the model's second run can attend to the prompts of its first."""
    with_keys: bool = False
    """Whether a reference cache asks under which keys the log-probs are filed."""

    def __len__(self) -> int:
        """The number of examples: there are as many batches as ways to plan them."""
        return len(self.examples)

    def __getitem__(self, plan: StepPlan) -> StepBatch:
        chosen = plan.examples
        lengths = self.examples.prompt_lengths[chosen] + self.examples.completion_lengths[chosen]
        if self.max_length is not None:
            lengths = np.minimum(lengths, self.max_length)
        num_desirable = int(np.count_nonzero(self.examples.desirable[chosen]))
        return StepBatch(
            micro_batches=[self._packed(plan, micro_batch) for micro_batch in plan.micro_batches],
            num_examples=len(chosen),
            num_tokens=int(lengths.sum()),
            num_desirable=num_desirable,
            num_undesirable=len(chosen) - num_desirable,
        )

    def _packed(self, plan: StepPlan, micro_batch: MicroBatch) -> PackedBatch:
        chosen = plan.examples[micro_batch.positions]
        mismatched = None
        if plan.partners is not None:
            partners = plan.partners[micro_batch.positions].tolist()
            mismatched = [self.examples[partner].completion_ids for partner in partners]
        class_weights = np.where(
            self.examples.desirable[chosen], self.desirable_weight, self.undesirable_weight
        )
        weights = (class_weights * self.examples.weights[chosen]).astype(np.float32)
        return pack(
            [self.examples[index] for index in chosen.tolist()],
            mismatched,
            max_length=self.max_length,
            shares_prompts=self.can_share_prompts,
            weights=np.zeros_like(weights) if micro_batch.is_filler else weights,
            is_filler=micro_batch.is_filler,
            with_keys=self.with_keys,
        )


def all_keys(
    examples: TokenizedExamples,
    partner: Int64[np.ndarray, " examples"] | None,
    *,
    max_length: int | None,
) -> set[bytes]:
    """The keys of all matched and, with partners, all mismatched log-probs of a set."""
    keys = set()
    for index in range(len(examples)):
        example = examples[index]
        prompts = [example.prompt_ids[:max_length]]
        completions = [example.completion_ids]
        if partner is not None:
            completions.append(examples[int(partner[index])].completion_ids)
        prompts *= len(completions)
        keys.update(_keys(prompts, _cut(completions, prompts, max_length)))
    return keys


def pack(
    examples: Sequence[TokenizedExample],
    mismatched_completions: Sequence[Int[np.ndarray, " _"]] | None,
    *,
    max_length: int | None,
    shares_prompts: bool,
    weights: Float32[np.ndarray, " batch"],
    is_filler: bool = False,
    with_keys: bool = False,
) -> PackedBatch:
    """Pack examples with their mismatched completions into one micro-batch.

    A sequence is prompt + completion, cut at its end to `max_length`; one whose prompt fills it has
    no scored token and a log-prob of 0. The first token of a sequence is predicted by nothing, so
    with an empty prompt the completion's first token is not scored.

    Args:
        examples: at least one.
        mismatched_completions: token ids, uncut, one for each example; None: none are needed.
        max_length: in tokens; None: no cut.
        shares_prompts: the layout of the mismatched completions, see `PackedBatch`.
        weights: λ of each example.
        is_filler: True for a filler (see `PackedBatch`).
        with_keys: say under which keys a reference cache files the log-probs.
    """
    prompts = [example.prompt_ids[:max_length] for example in examples]
    prompt_lengths = _lengths(prompts)
    completions = _cut([example.completion_ids for example in examples], prompts, max_length)
    matched = _whole_sequences(prompts, completions)
    mismatched = others = None
    if mismatched_completions is not None:
        others = _cut(mismatched_completions, prompts, max_length)
        if shares_prompts:
            mismatched = _continuations(prompt_lengths, matched, others)
        else:
            mismatched = _whole_sequences(prompts, others)
    return PackedBatch(
        matched=matched,
        mismatched=mismatched,
        shares_prompts=shares_prompts,
        prompt_lengths=prompt_lengths.tolist(),
        desirable=torch.tensor([example.desirable for example in examples], dtype=torch.bool),
        weight=torch.from_numpy(weights),
        is_filler=torch.full((len(examples),), is_filler),
        indices=[example.index for example in examples],
        matched_keys=_keys(prompts, completions) if with_keys else None,
        mismatched_keys=_keys(prompts, others) if with_keys and others is not None else None,
    )


def _cut(
    completions: Sequence[np.ndarray], prompts: list[np.ndarray], max_length: int | None
) -> list[np.ndarray]:
    """What `max_length` leaves of each completion behind its prompt."""
    if max_length is None:
        return list(completions)
    return [
        completion[: max_length - len(prompt)]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _keys(prompts: list[np.ndarray], completions: list[np.ndarray]) -> list[bytes]:
    return [pair_key(*pair) for pair in zip(prompts, completions, strict=True)]


def _whole_sequences(prompts: list[np.ndarray], completions: list[np.ndarray]) -> Sequences:
    """`[x1 y1 | x2 y2 | …]`; the row of the token before predicts each completion token."""
    pieces = [piece for pair in zip(prompts, completions, strict=True) for piece in pair]
    prompt_lengths, completion_lengths = _lengths(prompts), _lengths(completions)
    lengths = prompt_lengths + completion_lengths
    starts = np.cumsum(lengths) - lengths
    in_completion = _counts_within(completion_lengths)  # j of each completion token, from 0
    in_sequence = np.repeat(prompt_lengths, completion_lengths) + in_completion
    token = np.repeat(starts, completion_lengths) + in_sequence
    return _sequences(
        pieces,
        lengths,
        position_ids=_counts_within(lengths),
        targets=token,
        rows=token - 1,
        owners=np.repeat(np.arange(len(lengths)), completion_lengths),
        scored=in_sequence > 0,
    )


def _continuations(
    prompt_lengths: Int64[np.ndarray, " batch"], matched: Sequences, others: list[np.ndarray]
) -> Sequences:
    """`[y'1 | y'2 | …]`, whose first tokens are predicted by their prompts' last rows in `matched`.

    Rows index `cat([matched rows, mismatched rows])`.
    """
    lengths = _lengths(others)
    matched_starts = np.cumsum(matched.lengths) - matched.lengths
    in_completion = _counts_within(lengths)
    token = np.arange(len(in_completion))
    last_of_prompt = np.repeat(matched_starts + prompt_lengths - 1, lengths)
    row_before = len(matched.input_ids) + token - 1
    position_ids = np.repeat(prompt_lengths, lengths) + in_completion
    return _sequences(
        others,
        lengths,
        position_ids=position_ids,
        targets=token,
        rows=np.where(in_completion == 0, last_of_prompt, row_before),
        owners=np.repeat(np.arange(len(lengths)), lengths),
        scored=position_ids > 0,
    )


def _sequences(
    pieces: list[np.ndarray],
    lengths: Int64[np.ndarray, " sequences"],
    *,
    position_ids: Int64[np.ndarray, " tokens"],
    targets: Int64[np.ndarray, " completion_tokens"],
    rows: Int64[np.ndarray, " completion_tokens"],
    owners: Int64[np.ndarray, " completion_tokens"],
    scored: Bool[np.ndarray, " completion_tokens"],
) -> Sequences:
    """Tensors of one packed run. `targets` are the places of the completion tokens in it."""
    input_ids = np.concatenate(pieces).astype(np.int64)
    boundaries = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=boundaries[1:])
    return Sequences(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        boundaries=torch.from_numpy(boundaries),
        lengths=lengths.tolist(),
        scored=Scored(
            rows=torch.from_numpy(rows[scored]),
            targets=torch.from_numpy(input_ids[targets[scored]]),
            owners=torch.from_numpy(owners[scored]),
        ),
    )


def _lengths(pieces: Sequence[np.ndarray]) -> Int64[np.ndarray, " pieces"]:
    return np.array([len(piece) for piece in pieces], dtype=np.int64)


def _counts_within(lengths: Int64[np.ndarray, " sequences"]) -> Int64[np.ndarray, " tokens"]:
    """`[0 … l1-1, 0 … l2-1, …]`."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(starts, lengths)


def pair_key(
    prompt_ids: Int[np.ndarray, " prompt"], completion_ids: Int[np.ndarray, " completion"]
) -> bytes:
    """128 bits of BLAKE2b over a prompt's and a completion's token ids, as they are run.

    The prompt's length stands before both, so that no other cut of the same tokens has this key.
    """
    digest = blake2b(np.int64(len(prompt_ids)).tobytes(), digest_size=KEY_BYTES)
    digest.update(np.ascontiguousarray(prompt_ids, dtype=np.int64).tobytes())
    digest.update(np.ascontiguousarray(completion_ids, dtype=np.int64).tobytes())
    return digest.digest()
