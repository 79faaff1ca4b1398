"""Batches that nothing is learned from: validation and prediction, without a gradient."""

import torch

from kto_lightning.batches.types import Prediction, StepBatch
from kto_lightning.training.evaluation import ValidationSums
from kto_lightning.training.scoring import BatchScorer


def validate_batch(scorer: BatchScorer, batch: StepBatch, sums: ValidationSums) -> None:
    """Add the numbers of a held-out batch, the same as a training step's, to `sums`."""
    known = [scorer.all_logps(micro_batch) for micro_batch in batch.micro_batches]
    z0_raw, z0 = scorer.reference_point(batch, known, sums.batches)
    auxiliary = torch.zeros((), device=z0.device)
    for micro_batch, logps in zip(batch.micro_batches, known, strict=True):
        scorer.add_losses(micro_batch, logps, z0, sums.batches)
        auxiliary += scorer.auxiliary_loss(micro_batch, logps.policy, batch.num_tokens)
        reward, counted = scorer.rewards(logps), micro_batch.counted
        sums.auc.update(reward[counted], micro_batch.desirable[counted])
    sums.add_batch(
        z0_raw=z0_raw,
        z0=z0,
        auxiliary=auxiliary,
        num_examples=batch.num_examples,
        num_tokens=batch.num_tokens,
    )


def predict_batch(scorer: BatchScorer, batch: StepBatch) -> list[Prediction]:
    """Reward and log-probs of every example that this rank counts."""
    predictions = []
    for micro_batch in batch.micro_batches:
        logps = scorer.all_logps(micro_batch)
        assert logps.policy.matched is not None
        assert logps.reference.matched is not None
        numbers = zip(
            micro_batch.indices,
            scorer.rewards(logps).tolist(),
            logps.policy.matched.tolist(),
            logps.reference.matched.tolist(),
            micro_batch.counted.tolist(),
            strict=True,
        )
        predictions += [
            Prediction(index, reward, policy, reference)
            for index, reward, policy, reference, counted in numbers
            if counted
        ]
    return predictions
