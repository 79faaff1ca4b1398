"""Scoring of a batch: log-probs of policy and reference, the reference point, losses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kto_lightning import loss
from kto_lightning.batches.objective import has_reference_point
from kto_lightning.batches.types import Logps, PackedBatch, StepBatch
from kto_lightning.errors import ConfigError
from kto_lightning.models.policy import Policy
from kto_lightning.models.reference import Reference
from kto_lightning.training.metrics import BatchSums


@dataclass(slots=True)
class MicroBatchLogps:
    """Log-probs of a micro-batch, as far as they are computed."""

    policy: Logps
    reference: Logps

    def detach_(self) -> None:
        """Detach the policy's log-probs. Even after its backward the graph may hold activations:
        those of layers that no trainable parameter precedes."""
        if self.policy.matched is not None:
            self.policy.matched = self.policy.matched.detach()
        if self.policy.auxiliary_loss is not None:
            self.policy.auxiliary_loss = self.policy.auxiliary_loss.detach()


class BatchScorer:
    """Scores the micro-batches of a step with policy and reference.

    Args:
        policy: runs with gradients where the caller has enabled them.
        reference: never runs with gradients.
        beta: β of the loss.
        loss_name: kto or apo_zero_unpaired.
        sum_over_ranks: sums a tensor over all ranks.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Reference,
        *,
        beta: float,
        loss_name: str,
        sum_over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        self.policy, self._reference = policy, reference
        self._beta, self._loss = beta, loss_name
        self._sum_over_ranks = sum_over_ranks
        self.current_micro_batch: PackedBatch | None = None
        """The latest that was passed to the models: the one to name when memory runs out."""

    def score_for_reference_point(
        self, micro_batches: list[PackedBatch]
    ) -> list[MicroBatchLogps | None]:
        """The log-probs that z0 needs, per micro-batch; None where it needs none.

        z0 depends on the whole batch, so it must be known before the first backward. A single
        micro-batch is scored completely, with gradients. Of several, only the mismatched
        completions run through the policy here, without gradients; the reference scores everything.

        Raises:
            ConfigError: if the batches were made for the other loss.
        """
        if (micro_batches[0].mismatched is None) == has_reference_point(self._loss):
            raise ConfigError(
                "The loss kto needs mismatched completions in its batches and apo_zero_unpaired "
                f"has none, but these were not made for {self._loss}. Give loader and module the "
                "same loss."
            )
        if len(micro_batches) == 1:
            return [self.score(micro_batches[0])]
        if micro_batches[0].mismatched is None:
            return [None] * len(micro_batches)
        return [self._score_without_gradient(micro_batch) for micro_batch in micro_batches]

    def score(self, micro_batch: PackedBatch) -> MicroBatchLogps:
        """All log-probs of a micro-batch, in one run of reference and policy.

        The reference runs first: its memory is free again before the policy's activations are kept
        for the backward.
        """
        self.current_micro_batch = micro_batch
        reference = self._reference.logps(micro_batch)
        return MicroBatchLogps(self.policy(micro_batch), reference)

    @torch.no_grad()
    def _score_without_gradient(self, micro_batch: PackedBatch) -> MicroBatchLogps:
        self.current_micro_batch = micro_batch
        policy = self.policy(micro_batch, matched=False)
        return MicroBatchLogps(policy, self._reference.logps(micro_batch))

    def score_matched(
        self, micro_batch: PackedBatch, logps: MicroBatchLogps | None
    ) -> MicroBatchLogps:
        """The log-probs that the loss needs: `logps` of `score_for_reference_point`, with the
        policy's matched ones added, with gradients."""
        if logps is None:
            return self.score(micro_batch)
        if logps.policy.matched is None:
            self.current_micro_batch = micro_batch
            logps.policy = self.policy(micro_batch, mismatched=False)
        return logps

    def reference_point(
        self, batch: StepBatch, scored: Sequence[MicroBatchLogps | None], sums: BatchSums
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """z0 before and after its clamp, over the whole batch and all ranks. Adds the mismatched
        log-ratios to `sums`, for its standard error."""
        device = sums.values.device
        total = torch.zeros((), dtype=BatchSums.dtype(device), device=device)
        for micro_batch, logps in zip(batch.micro_batches, scored, strict=True):
            if logps is None or logps.policy.mismatched is None:
                continue
            assert logps.reference.mismatched is not None
            log_ratio = logps.policy.mismatched.detach() - logps.reference.mismatched
            total += (log_ratio * ~micro_batch.is_filler).sum()
            sums.add_mismatched(log_ratio, micro_batch.is_filler)
        total = self._sum_over_ranks(total)
        return total / batch.num_examples, loss.reference_point(total, batch.num_examples)

    def compute_losses(
        self,
        micro_batch: PackedBatch,
        logps: MicroBatchLogps,
        z0: Float[Tensor, ""],
        sums: BatchSums,
    ) -> Float[Tensor, " batch"]:
        """Per-example losses, 0 for fillers. Adds losses, rewards and log-probs to `sums`."""
        policy, reference = logps.policy.matched, logps.reference.matched
        assert policy is not None
        assert reference is not None
        log_ratio = policy - reference
        z0 = z0.to(log_ratio.dtype)
        losses = loss.kto_loss(
            log_ratio, micro_batch.desirable, z0, beta=self._beta, weight=micro_batch.weight
        )
        sums.add(
            loss=losses,
            reward=self._beta * log_ratio,
            logps=policy,
            gradient_left=loss.gradient_left(log_ratio.detach(), z0, beta=self._beta),
            desirable=micro_batch.desirable,
            is_filler=micro_batch.is_filler,
        )
        return losses * ~micro_batch.is_filler

    def auxiliary_loss(
        self, micro_batch: PackedBatch, logps: Logps, num_tokens: int
    ) -> Float[Tensor, ""]:
        """The micro-batch's share of the auxiliary loss of a Mixture of Experts: its loss weighted
        by its share of the step's `num_tokens`, times the model's coefficient. 0 for other models.
        """
        if logps.auxiliary_loss is None:
            return torch.zeros((), device=micro_batch.weight.device)
        share = sum(micro_batch.matched.lengths) / num_tokens
        is_real = ~micro_batch.is_filler[0]  # a filler is a micro-batch of its own
        return self.policy.auxiliary_coefficient * logps.auxiliary_loss * share * is_real

    def rewards(self, logps: MicroBatchLogps) -> Float[Tensor, " batch"]:
        """β · log-ratio of the matched completions."""
        assert logps.policy.matched is not None
        assert logps.reference.matched is not None
        return self._beta * (logps.policy.matched - logps.reference.matched)
