"""What flows from the collator through the policy to the loss. Plain dataclasses of tensors.

`PackedBatch` and its parts are plain (not frozen) dataclasses, because Lightning moves a batch to
the device by setting the fields of a copy. Python ints and lists in them stay on the host: they are
what the attention loops over, so that the device is never asked for a length.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(kw_only=True, slots=True)
class Scored:
    """The hidden-state rows that predict completion tokens, and what they must predict.

    Row `rows[i]` predicts token `targets[i]` of example `owners[i]`; a sequence's log-prob is the
    sum over its rows. Computed on the host, so that the device never syncs to find them.
    """

    rows: Int[Tensor, " scored"]
    targets: Int[Tensor, " scored"]
    owners: Int[Tensor, " scored"]


@dataclass(kw_only=True, slots=True)
class Sequences:
    """Sequences packed end to end in one row, without padding; positions restart in each."""

    input_ids: Int[Tensor, " tokens"]
    position_ids: Int[Tensor, " tokens"]
    boundaries: Int[Tensor, " sequences_plus_1"]
    """int32, `[0, len_1, len_1 + len_2, …]`: what variable-length attention calls `cu_seqlens`."""
    lengths: list[int]
    """The same on the host, one length per sequence."""
    scored: Scored


@dataclass(kw_only=True, slots=True)
class PackedBatch:
    """One micro-batch of examples with their mismatched completions.

    `matched` is `[x1 y1 | x2 y2 | …]`; `mismatched` holds the mismatched completions, in one of two
    layouts told by `shares_prompts`:

    - True: `[y'1 | y'2 | …]`, whose positions continue their prompt's and which attend to the
      prompt's keys and values of the matched run. `mismatched.scored.rows` index the matched run's
      rows followed by the mismatched run's, because y'_1 is predicted by the prompt's last row.
    - False: `[x1 y'1 | x2 y'2 | …]`, whole sequences that stand alone.

    `mismatched` is None where the loss needs no reference point.
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
    it enters no sum, neither the loss nor z0 nor any metric. False for every other example,
    whatever its weight."""
    indices: list[int]
    """Which examples of the data set these are."""
    matched_keys: list[bytes] | None = None
    """What a reference cache files each matched log-prob under; None: there is no cache."""
    mismatched_keys: list[bytes] | None = None

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(kw_only=True, slots=True)
class StepBatch:
    """One optimizer step on one rank: its micro-batches, and what the whole batch counts."""

    micro_batches: list[PackedBatch]
    """As many on every rank, at least one."""
    num_examples: int
    """Of the whole batch over all ranks, as are the counts below; fillers never count."""
    num_tokens: int
    """Real matched tokens, prompts included, after the cut to `max_length`."""
    num_desirable: int
    num_undesirable: int


@dataclass(kw_only=True, slots=True)
class Logps:
    """What one pass of the policy or the reference says of a micro-batch, in nats, float32."""

    matched: Float[Tensor, " batch"] | None = None
    mismatched: Float[Tensor, " batch"] | None = None
    auxiliary_loss: Float[Tensor, ""] | None = None
    """A Mixture of Experts' load-balancing loss over the matched run, before its coefficient."""


@dataclass(slots=True)
class Prediction:
    """What the policy says of one example."""

    index: int
    """Its place in the set."""
    reward: float
    policy_logps: float
    reference_logps: float
