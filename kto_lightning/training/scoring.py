"""The numbers of one batch: log-probs, the reference point, losses. What a step is made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kto_lightning import loss
from kto_lightning.batches.types import Logps, PackedBatch, StepBatch
from kto_lightning.errors import ConfigError
from kto_lightning.models.policy import Policy
from kto_lightning.models.reference import Reference
from kto_lightning.training.metrics import BatchSums


@dataclass(slots=True)
class MicroLogps:
    """What is known of a micro-batch so far."""

    policy: Logps
    reference: Logps

    def detach_(self) -> None:
        """Keep the numbers alone: the graph behind them may hold activations even after its
        backward, of layers that nothing trained comes before."""
        if self.policy.matched is not None:
            self.policy.matched = self.policy.matched.detach()
        if self.policy.auxiliary_loss is not None:
            self.policy.auxiliary_loss = self.policy.auxiliary_loss.detach()


class BatchScorer:
    """Scores a step's micro-batches against the reference.

    Args:
        policy: with gradient where it is trained.
        reference: without.
        beta: β of the loss.
        loss_name: kto or apo_zero_unpaired.
        sum_over_ranks: adds a tensor over all devices.
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
        self._policy, self._reference = policy, reference
        self._beta, self._loss = beta, loss_name
        self._sum_over_ranks = sum_over_ranks
        self.current_micro_batch: PackedBatch | None = None
        """The micro-batch that was scored last, or is being scored."""

    def logps_before_backward(self, micro_batches: list[PackedBatch]) -> list[MicroLogps | None]:
        """What z0 needs. One micro-batch runs once, with gradient, for everything; several run
        their mismatched completions first, without one, and keep the reference's answers."""
        if (micro_batches[0].mismatched is None) != (self._loss == "apo_zero_unpaired"):
            raise ConfigError(
                "The loss kto needs mismatched completions in its batches and apo_zero_unpaired "
                f"has none, but these were not made for {self._loss}. Give loader and module the "
                "same loss."
            )
        if len(micro_batches) == 1:
            return [self.all_logps(micro_batches[0])]
        if micro_batches[0].mismatched is None:
            return [None] * len(micro_batches)
        return [self._logps_without_gradient(micro_batch) for micro_batch in micro_batches]

    def all_logps(self, micro_batch: PackedBatch) -> MicroLogps:
        """Everything that can be known of a micro-batch, in one run of policy and reference.

        The reference goes first: what it needs while it runs is free again before the policy's
        activations begin to wait for backward.
        """
        self.current_micro_batch = micro_batch
        reference = self._reference.logps(micro_batch)
        return MicroLogps(self._policy(micro_batch), reference)

    @torch.no_grad()
    def _logps_without_gradient(self, micro_batch: PackedBatch) -> MicroLogps:
        self.current_micro_batch = micro_batch
        policy = self._policy(micro_batch, matched=False)
        return MicroLogps(policy, self._reference.logps(micro_batch))

    def with_matched(self, micro_batch: PackedBatch, known: MicroLogps | None) -> MicroLogps:
        """What is known, and the policy's matched log-probs with gradient."""
        if known is None:
            return self.all_logps(micro_batch)
        if known.policy.matched is None:
            self.current_micro_batch = micro_batch
            known.policy = self._policy(micro_batch, mismatched=False)
        return known

    def reference_point(
        self, batch: StepBatch, known: Sequence[MicroLogps | None], sums: BatchSums
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """z0 before and after its clamp: one number over the whole batch and all ranks. How far it
        scatters goes into `sums`."""
        device = sums.values.device
        total = torch.zeros((), dtype=BatchSums.dtype(device), device=device)
        for micro_batch, logps in zip(batch.micro_batches, known, strict=True):
            if logps is None or logps.policy.mismatched is None:
                continue
            assert logps.reference.mismatched is not None
            log_ratio = logps.policy.mismatched.detach() - logps.reference.mismatched
            total += (log_ratio * ~micro_batch.is_filler).sum()
            sums.add_mismatched(log_ratio, micro_batch.is_filler)
        total = self._sum_over_ranks(total)
        return total / batch.num_examples, loss.reference_point(total, batch.num_examples)

    def add_losses(
        self,
        micro_batch: PackedBatch,
        logps: MicroLogps,
        z0: Float[Tensor, ""],
        sums: BatchSums,
    ) -> Float[Tensor, " batch"]:
        """Per-example losses, 0 for fillers; their sums and the rewards' go into `sums`."""
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
        """A Mixture of Experts' share of the auxiliary loss: a token-weighted mean over the step's
        micro-batches, times the model's own coefficient. 0 for other models."""
        if logps.auxiliary_loss is None:
            return torch.zeros((), device=micro_batch.weight.device)
        share = sum(micro_batch.matched.lengths) / num_tokens
        is_real = ~micro_batch.is_filler[0]  # a filler is a micro-batch of its own
        return self._policy.auxiliary_coefficient * logps.auxiliary_loss * share * is_real

    def rewards(self, logps: MicroLogps) -> Float[Tensor, " batch"]:
        """β · log-ratio of the matched completions."""
        assert logps.policy.matched is not None
        assert logps.reference.matched is not None
        return self._beta * (logps.policy.matched - logps.reference.matched)
