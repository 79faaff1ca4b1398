"""Lower bound of a KTO step's operations, from the lengths of its sequences.

With P prompt tokens, C matched and C' mismatched completion tokens, in forwards of one token
through the decoder, a step costs

    3 (P + C)       forward and backward of [x y]
    + C'            forward of y' on top of x
    + P + C + C'    the same two for the reference, unless cached
    + P             the prompts again, in a step of several micro-batches, as z0 comes first

and likewise in attention (forward and backward cost 3.5 forwards) and in the head, which scores
completions alone. With C' = C, and without head and attention, that is (4P+6C)/(3P+3C) of a
supervised fine-tuning step.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from kto_lightning.batches.types import PackedBatch, StepBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitCosts:
    """Operations of a model's forward, per unit of work."""

    token: int
    """Of one token, in all matrices of the decoder."""
    pair: int
    """Of one query with one key, in all layers."""
    scored: int
    """Of one row in the head."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "UnitCosts":
        config = model.config
        matrices = [m.weight for m in model.base_model.modules() if isinstance(m, nn.Linear)]
        return cls(
            token=2 * sum(matrix.numel() for matrix in matrices),
            pair=4 * config.num_hidden_layers * config.hidden_size,
            scored=2 * config.vocab_size * config.hidden_size,
        )

    def forward(self, *, tokens: int, pairs: int, scored: int) -> int:
        return self.token * tokens + self.pair * pairs + self.scored * scored


def floor(step: StepBatch, unit: UnitCosts, *, cached: bool, frozen: bool = False) -> float:
    """Lower bound of the operations of a step; see the module's docstring.

    Args:
        cached: the reference's log-probs are cached and cost nothing.
        frozen: only an adapter is trained, so backward computes no gradient of the base's matrices.
    """
    alone = len(step.micro_batches) == 1
    return sum(
        _floor(micro_batch, unit, cached=cached, frozen=frozen, alone=alone)
        for micro_batch in step.micro_batches
    )


def _floor(
    batch: PackedBatch, unit: UnitCosts, *, cached: bool, frozen: bool, alone: bool
) -> float:
    prompts, wholes, others = mismatched_lengths(batch)
    num_scored = len(batch.matched.scored.rows)
    matched = unit.forward(
        tokens=sum(wholes), pairs=sum(length**2 for length in wholes), scored=num_scored
    )
    attended = unit.pair * sum(length**2 for length in wholes)
    backward = (matched + 1.5 * attended) if frozen else (2 * matched + 0.5 * attended)
    mismatched = unit.forward(
        tokens=sum(others),
        pairs=sum(n * (p + n) for p, n in zip(prompts, others, strict=True)),
        scored=len(batch.mismatched.scored.rows) if batch.mismatched else 0,
    )
    prompts_again = unit.forward(tokens=sum(prompts), pairs=sum(p**2 for p in prompts), scored=0)
    reference = 0 if cached else matched + mismatched
    return matched + backward + mismatched + reference + (0 if alone else prompts_again)


def num_positions(step: StepBatch, *, cached: bool) -> int:
    """The positions of a step that it cannot do without; forward and backward count as three."""
    alone = len(step.micro_batches) == 1
    total = 0
    for batch in step.micro_batches:
        prompts, wholes, others = (sum(lengths) for lengths in mismatched_lengths(batch))
        total += 3 * wholes + others
        total += 0 if cached else wholes + others
        total += 0 if alone else prompts
    return total


def mismatched_lengths(batch: PackedBatch) -> tuple[list[int], list[int], list[int]]:
    """Lengths of prompts, of prompts with their completions, of mismatched completions."""
    if batch.mismatched is None:
        raise SystemExit("step_cost: the steps have no mismatched completions: no floor applies")
    prompts, others = batch.prompt_lengths, batch.mismatched.lengths
    if not batch.shares_prompts:
        others = [whole - prompt for whole, prompt in zip(others, prompts, strict=True)]
    return prompts, batch.matched.lengths, others
