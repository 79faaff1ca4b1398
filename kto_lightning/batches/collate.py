"""Collation: the packed sequences of a step's plan, and the indices of the rows that are scored.

All indices are computed here, on the host, in the loader's workers. Computed on the device, they
would need a synchronisation in every step to read lengths.
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
    """One example; implemented by `data/examples.py` and `data/streaming/buffers.py`."""

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
    """A data set: lengths, labels and weights as arrays, token ids example by example."""

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
    """A map-style data set whose key is a `StepPlan` and whose item is the `StepBatch` for it.

    For `DataLoader(batches, batch_size=None, sampler=PlanSampler(…))`. A `DataLoader` item is
    normally one example, or a batch of a fixed number of them. Here it is one optimizer step: how
    many micro-batches it has, and which examples are in them, depends on the lengths of the whole
    batch over all ranks. So the sampler plans and the workers collate, each a whole step.

    Mismatched completions are packed if the plan has partners.
    """

    examples: TokenizedExamples
    desirable_weight: float
    """λ_D; the weight of an example is its class weight times the record's own weight."""
    undesirable_weight: float
    """λ_U."""
    max_length: int | None
    """Tokens after which prompt + completion is truncated; None: never."""
    can_share_prompts: bool
    """Whether the mismatched run can attend to the prompts of the matched run."""
    with_keys: bool = False
    """Whether to add the keys of a reference cache."""

    def __len__(self) -> int:
        """The number of examples; required by `DataLoader`, although the keys are plans."""
        return len(self.examples)

    def __getitem__(self, plan: StepPlan) -> StepBatch:
        chosen = plan.examples
        lengths = self.examples.prompt_lengths[chosen] + self.examples.completion_lengths[chosen]
        if self.max_length is not None:
            lengths = np.minimum(lengths, self.max_length)
        num_desirable = int(np.count_nonzero(self.examples.desirable[chosen]))
        return StepBatch(
            micro_batches=[self._pack(plan, micro_batch) for micro_batch in plan.micro_batches],
            num_examples=len(chosen),
            num_tokens=int(lengths.sum()),
            num_desirable=num_desirable,
            num_undesirable=len(chosen) - num_desirable,
        )

    def _pack(self, plan: StepPlan, micro_batch: MicroBatch) -> PackedBatch:
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


def all_pair_keys(
    examples: TokenizedExamples,
    partner: Int64[np.ndarray, " examples"] | None,
    *,
    max_length: int | None,
) -> set[bytes]:
    """The `pair_key` of every matched and, with partners, mismatched sequence of a data set."""
    keys = set()
    for index in range(len(examples)):
        example = examples[index]
        prompts = [example.prompt_ids[:max_length]]
        completions = [example.completion_ids]
        if partner is not None:
            completions.append(examples[int(partner[index])].completion_ids)
        prompts *= len(completions)
        keys.update(_pair_keys(prompts, _truncate(completions, prompts, max_length)))
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

    A sequence is prompt + completion, truncated at its end to `max_length`; if the prompt fills it,
    no token is scored and its log-prob is 0. No row predicts the first token of a sequence, so with
    an empty prompt the completion's first token is not scored.

    Args:
        examples: at least one.
        mismatched_completions: token ids before truncation, one for each example; None: none.
        max_length: in tokens; None: no truncation.
        shares_prompts: the layout of the mismatched completions, see `PackedBatch`.
        weights: λ of each example.
        is_filler: True for a filler (see `PackedBatch`).
        with_keys: whether to add the keys of a reference cache.
    """
    prompts = [example.prompt_ids[:max_length] for example in examples]
    prompt_lengths = _lengths(prompts)
    completions = _truncate([example.completion_ids for example in examples], prompts, max_length)
    matched = _whole_sequences(prompts, completions)
    mismatched = others = None
    if mismatched_completions is not None:
        others = _truncate(mismatched_completions, prompts, max_length)
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
        matched_keys=_pair_keys(prompts, completions) if with_keys else None,
        mismatched_keys=_pair_keys(prompts, others) if with_keys and others is not None else None,
    )


def _truncate(
    completions: Sequence[np.ndarray], prompts: list[np.ndarray], max_length: int | None
) -> list[np.ndarray]:
    """Truncate each completion to the tokens that `max_length` leaves after its prompt."""
    if max_length is None:
        return list(completions)
    return [
        completion[: max_length - len(prompt)]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _pair_keys(prompts: list[np.ndarray], completions: list[np.ndarray]) -> list[bytes]:
    return [pair_key(*pair) for pair in zip(prompts, completions, strict=True)]


def _whole_sequences(prompts: list[np.ndarray], completions: list[np.ndarray]) -> Sequences:
    """`[x1 y1 | x2 y2 | …]`; the row of the preceding token predicts each completion token."""
    pieces = [piece for pair in zip(prompts, completions, strict=True) for piece in pair]
    prompt_lengths, completion_lengths = _lengths(prompts), _lengths(completions)
    lengths = prompt_lengths + completion_lengths
    starts = np.cumsum(lengths) - lengths
    in_completion = _positions_within(completion_lengths)  # j of each completion token, from 0
    in_sequence = np.repeat(prompt_lengths, completion_lengths) + in_completion
    token = np.repeat(starts, completion_lengths) + in_sequence
    return _build_sequences(
        pieces,
        lengths,
        position_ids=_positions_within(lengths),
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
    in_completion = _positions_within(lengths)
    token = np.arange(len(in_completion))
    last_of_prompt = np.repeat(matched_starts + prompt_lengths - 1, lengths)
    row_before = len(matched.input_ids) + token - 1
    position_ids = np.repeat(prompt_lengths, lengths) + in_completion
    return _build_sequences(
        others,
        lengths,
        position_ids=position_ids,
        targets=token,
        rows=np.where(in_completion == 0, last_of_prompt, row_before),
        owners=np.repeat(np.arange(len(lengths)), lengths),
        scored=position_ids > 0,
    )


def _build_sequences(
    pieces: list[np.ndarray],
    lengths: Int64[np.ndarray, " sequences"],
    *,
    position_ids: Int64[np.ndarray, " tokens"],
    targets: Int64[np.ndarray, " completion_tokens"],
    rows: Int64[np.ndarray, " completion_tokens"],
    owners: Int64[np.ndarray, " completion_tokens"],
    scored: Bool[np.ndarray, " completion_tokens"],
) -> Sequences:
    """Tensors of one packed run. `targets` are the positions of the completion tokens in it."""
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


def _positions_within(lengths: Int64[np.ndarray, " sequences"]) -> Int64[np.ndarray, " tokens"]:
    """`[0 … l1-1, 0 … l2-1, …]`."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(starts, lengths)


def pair_key(
    prompt_ids: Int[np.ndarray, " prompt"], completion_ids: Int[np.ndarray, " completion"]
) -> bytes:
    """The key of a sequence in a reference cache: 128 bits of BLAKE2b over its token ids.

    The prompt's length is hashed first, so that the same tokens divided elsewhere into prompt and
    completion, which have another log-prob, have another key.

    Args:
        prompt_ids: after truncation.
        completion_ids: after truncation.
    """
    digest = blake2b(np.int64(len(prompt_ids)).tobytes(), digest_size=KEY_BYTES)
    digest.update(np.ascontiguousarray(prompt_ids, dtype=np.int64).tobytes())
    digest.update(np.ascontiguousarray(completion_ids, dtype=np.int64).tobytes())
    return digest.digest()
