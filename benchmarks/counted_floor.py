"""Lower bound of a step's operations without a formula, for models of any kind of layers.

The terms are those of `step_floor.py`. Each is counted where the model runs one sequence alone, in
its own attention and without padding: forward and backward of [x y], forward of [x y], forward of
x, and forward of y' on top of the model's own cache of x. Where the model has no cache that grows
by several tokens at once, the last is the forward of [x y'] less that of x.
"""

from functools import cache

import torch
from operations import counter
from step_floor import mismatched_lengths
from torch import Tensor
from transformers import PreTrainedModel

from kto_lightning.batches.types import PackedBatch, Scored, StepBatch


class CountedFloor:
    """The floor of steps of one model. Operations depend on lengths alone: each is counted once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model.eval()
        self._trained = cache(self._count_trained)
        self._forward = cache(self._count_forward)
        self._continued = cache(self._count_continued)

    def __call__(self, step: StepBatch, *, cached: bool, head: bool = True) -> int:
        """Operations that a step cannot do without.

        Args:
            cached: the reference's log-probs are cached and cost nothing.
            head: with those of the head, which no padding concerns.
        """
        alone = len(step.micro_batches) == 1
        return sum(self._floor(batch, cached, head, alone) for batch in step.micro_batches)

    def _floor(self, batch: PackedBatch, cached: bool, head: bool, alone: bool) -> int:
        assert batch.mismatched is not None
        total = 0
        for prompt, whole, other, scored, other_scored in zip(
            *mismatched_lengths(batch),
            _counts(batch.matched.scored, len(batch), head),
            _counts(batch.mismatched.scored, len(batch), head),
            strict=True,
        ):
            continued = self._continued(prompt, other, other_scored)
            total += self._trained(whole, scored) + continued
            total += 0 if cached else self._forward(whole, scored) + continued
            total += 0 if alone else self._forward(prompt, 0)
        return total

    def _count_trained(self, length: int, scored: int) -> int:
        with counter() as counted:
            self._logits(length, scored).sum().backward()
        self._model.zero_grad()
        return counted.get_total_flops()

    @torch.no_grad()
    def _count_forward(self, length: int, scored: int) -> int:
        if not length:
            return 0
        with counter() as counted:
            self._logits(length, scored)
        return counted.get_total_flops()

    @torch.no_grad()
    def _count_continued(self, prompt: int, length: int, scored: int) -> int:
        if not prompt or not length:
            return self._forward(length, scored)
        ids = torch.ones(1, prompt, dtype=torch.int64)
        before = getattr(self._model(input_ids=ids, use_cache=True), "past_key_values", None)
        if before is None:
            return self._forward(prompt + length, scored) - self._forward(prompt, 0)
        with counter() as counted:
            self._logits(length, scored, past_key_values=before, use_cache=True)
        return counted.get_total_flops()

    def _logits(self, length: int, scored: int, **options: object) -> Tensor:
        """Of the last `scored` positions of a sequence."""
        ids = torch.ones(1, length, dtype=torch.int64)
        rows = torch.arange(length - scored, length)
        return self._model(input_ids=ids, logits_to_keep=rows, **options).logits


def _counts(scored: Scored, num_examples: int, head: bool) -> list[int]:
    """The scored tokens of each example, or none without a head."""
    if not head:
        return [0] * num_examples
    return torch.bincount(scored.owners, minlength=num_examples).tolist()
