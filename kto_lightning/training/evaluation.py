"""Evaluation: metrics of held-out records, and rewards record by record."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc

from kto_lightning.batches.types import Prediction, StepBatch
from kto_lightning.training.metrics import BatchSums, batch_metrics
from kto_lightning.training.scoring import BatchScorer


class RewardAUC(Metric):
    """Area under the ROC curve of rewards: the share of pairs of a desirable and an undesirable
    completion in which the desirable one has the higher reward, ties counted half.

    NaN while a class is absent.
    """

    higher_is_better = True
    full_state_update = False
    rewards: list[Tensor]
    desirable: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rewards", default=[], dist_reduce_fx="cat")
        self.add_state("desirable", default=[], dist_reduce_fx="cat")

    def update(self, rewards: Float[Tensor, " batch"], desirable: Bool[Tensor, " batch"]) -> None:
        self.rewards.append(rewards)
        self.desirable.append(desirable)

    def compute(self) -> Float[Tensor, ""]:
        rewards = _concatenate(self.rewards)
        desirable = _concatenate(self.desirable).bool()
        if not len(rewards) or desirable.all() or not desirable.any():
            return torch.tensor(torch.nan)
        # torchmetrics would squash scores outside [0, 1] with a sigmoid, in which large rewards
        # become ties. Ranks keep their order exactly.
        _, ranks = torch.unique(rewards, sorted=True, return_inverse=True)
        return binary_auroc(ranks.double() / max(1, int(ranks.max())), desirable.long())


def _concatenate(parts: list[Tensor] | Tensor) -> Tensor:
    # A list until torchmetrics has reduced the state over ranks, which makes it one tensor.
    if isinstance(parts, Tensor):
        return parts
    return torch.cat(parts) if parts else torch.zeros(0)


class ValidationSums:
    """Sums over the batches of a validation."""

    def __init__(self, device: torch.device) -> None:
        self.batch_sums = BatchSums.zero(device)
        self.auc = RewardAUC().to(device)
        self._z0 = torch.zeros(2, dtype=BatchSums.dtype(device), device=device)
        self._auxiliary = torch.zeros((), dtype=BatchSums.dtype(device), device=device)
        self._num_examples = 0
        self._num_tokens = 0

    def add_batch(
        self,
        *,
        z0_raw: Float[Tensor, ""],
        z0: Float[Tensor, ""],
        auxiliary: Float[Tensor, ""],
        num_examples: int,
        num_tokens: int,
    ) -> None:
        """Add what is one number per batch, weighted by the batch's examples.

        Args:
            z0_raw: before its clamp; the same on all ranks, as are z0 and the two counts.
            auxiliary: this rank's share.
        """
        self._z0 += torch.stack([z0_raw, z0]) * num_examples
        self._auxiliary += auxiliary * num_examples
        self._num_examples += num_examples
        self._num_tokens += num_tokens

    def metrics(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float | None]:
        """The metrics of the stage `val`; None for those whose class is absent."""
        sums = torch.cat([self.batch_sums.values, self._auxiliary[None]])
        *totals, auxiliary = sum_over_ranks(sums).tolist()
        z0_raw, z0 = (self._z0 / max(1, self._num_examples)).tolist()
        auc = float(self.auc.compute())
        metrics = batch_metrics(totals)
        if metrics["loss"] is not None:
            metrics["loss"] += auxiliary / self._num_examples
        metrics |= {"z0": z0, "z0_raw": z0_raw, "tokens": self._num_tokens}
        metrics["reward/auc"] = None if auc != auc else auc
        return metrics


def validate_batch(scorer: BatchScorer, batch: StepBatch, sums: ValidationSums) -> None:
    """Add a held-out batch to `sums`, with z0 and losses as in a training step on it."""
    scored = [scorer.score(micro_batch) for micro_batch in batch.micro_batches]
    z0_raw, z0 = scorer.reference_point(batch, scored, sums.batch_sums)
    auxiliary = torch.zeros((), device=z0.device)
    for micro_batch, logps in zip(batch.micro_batches, scored, strict=True):
        scorer.compute_losses(micro_batch, logps, z0, sums.batch_sums)
        auxiliary += scorer.auxiliary_loss(micro_batch, logps.policy, batch.num_tokens)
        reward, is_real = scorer.rewards(logps), ~micro_batch.is_filler
        sums.auc.update(reward[is_real], micro_batch.desirable[is_real])
    sums.add_batch(
        z0_raw=z0_raw,
        z0=z0,
        auxiliary=auxiliary,
        num_examples=batch.num_examples,
        num_tokens=batch.num_tokens,
    )


def predict_batch(scorer: BatchScorer, batch: StepBatch) -> list[Prediction]:
    """Reward and log-probs of every example of this rank's part of a batch."""
    predictions = []
    for micro_batch in batch.micro_batches:
        logps = scorer.score(micro_batch)
        assert logps.policy.matched is not None
        assert logps.reference.matched is not None
        numbers = zip(
            micro_batch.indices,
            scorer.rewards(logps).tolist(),
            logps.policy.matched.tolist(),
            logps.reference.matched.tolist(),
            micro_batch.is_filler.tolist(),
            strict=True,
        )
        predictions += [
            Prediction(index, reward, policy, reference)
            for index, reward, policy, reference, is_filler in numbers
            if not is_filler
        ]
    return predictions
