"""Batch types, from the collator through the policy to the loss: dataclasses of tensors.

They are not frozen, because Lightning moves a batch to the device by setting the fields of a copy.
Python ints and lists in them stay on the host, where attention loops over them, so that no device
synchronisation is needed to read a length.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(kw_only=True, slots=True)
class Scored:
    """The hidden-state rows that predict completion tokens, and their targets.

    Row `rows[i]` predicts token `targets[i]` of example `owners[i]`; a sequence's log-prob is the
    sum over its rows. Computed on the host, which spares a device synchronisation to find them.
    """

    rows: Int[Tensor, " scored"]
    targets: Int[Tensor, " scored"]
    owners: Int[Tensor, " scored"]


@dataclass(kw_only=True, slots=True)
class Sequences:
    """Sequences concatenated into one row without padding; positions restart in each."""

    input_ids: Int[Tensor, " tokens"]
    position_ids: Int[Tensor, " tokens"]
    boundaries: Int[Tensor, " sequences_plus_1"]
    """int32, `[0, len_1, len_1 + len_2, …]`: what variable-length attention calls `cu_seqlens`."""
    lengths: list[int]
    """Tokens of each sequence, on the host."""
    scored: Scored


@dataclass(kw_only=True, slots=True)
class PackedBatch:
    """One micro-batch of examples with their mismatched completions.

    `matched` is `[x1 y1 | x2 y2 | …]`; `mismatched` holds the mismatched completions y', in one of
    two layouts, by `shares_prompts`:

    - True: `[y'1 | y'2 | …]`. Positions continue those of the prompt, and attention reads the
      prompt's keys and values from the matched run. `mismatched.scored.rows` index the rows of the
      matched run followed by those of the mismatched run, because the prompt's last row, in the
      matched run, predicts the first token of y'.
    - False: `[x1 y'1 | x2 y'2 | …]`, complete sequences.

    `mismatched` is None if the loss has no reference point.
    """

    matched: Sequences
    mismatched: Sequences | None
    shares_prompts: bool
    prompt_lengths: list[int]
    desirable: Bool[Tensor, " batch"]
    weight: Float[Tensor, " batch"]
    """λ of the example: its class weight times the record's own weight."""
    is_filler: Bool[Tensor, " batch"]
    """True for a filler, which runs only so that its rank runs as many micro-batches as the others:
    it enters neither the loss nor z0 nor any metric. False for every other example, whatever its
    weight."""
    indices: list[int]
    """Positions of the examples in the data set."""
    matched_keys: list[bytes] | None = None
    """Keys of the matched log-probs in a reference cache; None: there is no cache."""
    mismatched_keys: list[bytes] | None = None

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(kw_only=True, slots=True)
class StepBatch:
    """One optimizer step on one rank: its micro-batches, and counts of the whole batch."""

    micro_batches: list[PackedBatch]
    """At least one; the same number on every rank."""
    num_examples: int
    """Of the whole batch over all ranks, as the counts below, without fillers."""
    num_tokens: int
    """Matched tokens, prompts included, after truncation to `max_length`."""
    num_desirable: int
    num_undesirable: int


@dataclass(kw_only=True, slots=True)
class Logps:
    """Sequence log-probs of a micro-batch under the policy or the reference, in nats, float32."""

    matched: Float[Tensor, " batch"] | None = None
    mismatched: Float[Tensor, " batch"] | None = None
    auxiliary_loss: Float[Tensor, ""] | None = None
    """Load-balancing loss of a mixture of experts over the matched run, before its coefficient."""


@dataclass(slots=True)
class Prediction:
    """Reward and log-probs of one example."""

    index: int
    """Its position in the data set."""
    reward: float
    policy_logps: float
    reference_logps: float
