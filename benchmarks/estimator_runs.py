"""Training runs that differ in z0 alone, and the mismatched log-ratios of what was trained."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from jaxtyping import Float, Int64
from lightning import Trainer
from silence import be_quiet
from torch import Tensor

from kto_lightning import loss
from kto_lightning.batches.collate import StepBatches
from kto_lightning.batches.pairing import Pairing, pair_distinct_prompts
from kto_lightning.batches.sampler import PlanSampler
from kto_lightning.batches.types import PackedBatch, StepBatch
from kto_lightning.data.datamodule import KTODataModule
from kto_lightning.module import KTOModule
from kto_lightning.training.metrics import BatchSums
from kto_lightning.training.scoring import BatchScorer, MicroLogps

MICRO_BATCH_SIZE = 2
"""The smallest `per_device_train_batch_size` with which TRL has mismatched completions."""
WHOLE = 2**40
"""Tokens per forward: more than any batch has, so that a step is one micro-batch in its order."""
SCORED_AT_ONCE = 64

Row = dict[str, float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the contestants share."""

    model: Path
    train: Path
    batch_size: int
    steps: int
    beta: float
    learning_rate: float
    max_length: int
    held_out: float | None
    """Share of the records, by prompt; None: none."""


@dataclass(kw_only=True, slots=True)
class Run:
    """A run's numbers."""

    train: list[Row] = field(default_factory=list)
    """A row a step, with z0 over the whole batch whichever the contestant."""
    held_out: list[Row] = field(default_factory=list)
    """A row after half of the steps and one after all."""
    micro_z0s: list[list[float]] = field(default_factory=list)
    """Of each step, one a micro-batch; empty where z0 is over the whole batch."""


class WholeBatchModule(KTOModule):
    """`KTOModule` that remembers its numbers."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.run = Run()

    def publish(self, stage: str, metrics: Row) -> None:
        super().publish(stage, metrics)
        rows = self.run.train if stage == "train" else self.run.held_out
        rows.append({"step": self.trainer.global_step, **metrics})


class MicroBatchScorer(BatchScorer):
    """Trains as TRL does: every `MICRO_BATCH_SIZE` examples against a z0 of their own.

    What goes into the sums is computed as always, with z0 over the whole batch: so both contestants
    are measured alike, and only the gradient differs.
    """

    z0s: Float[Tensor, " micro_batches"]
    """Of the step: each micro-batch's mean, clamped."""

    def reference_point(
        self, batch: StepBatch, known: Sequence[MicroLogps | None], sums: BatchSums
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        (logps,) = known
        assert logps is not None
        assert logps.policy.mismatched is not None
        assert logps.reference.mismatched is not None
        log_ratio = logps.policy.mismatched.detach() - logps.reference.mismatched
        self.z0s = torch.stack(
            [
                loss.reference_point(micro_batch.sum(), len(micro_batch))
                for micro_batch in log_ratio.split(MICRO_BATCH_SIZE)
            ]
        )
        return super().reference_point(batch, known, sums)

    def add_losses(
        self, micro_batch: PackedBatch, logps: MicroLogps, z0: Float[Tensor, ""], sums: BatchSums
    ) -> Float[Tensor, " batch"]:
        super().add_losses(micro_batch, logps, z0, sums)
        policy, reference = logps.policy.matched, logps.reference.matched
        assert policy is not None
        assert reference is not None
        parts = zip(
            (policy - reference).split(MICRO_BATCH_SIZE),
            micro_batch.desirable.split(MICRO_BATCH_SIZE),
            micro_batch.weight.split(MICRO_BATCH_SIZE),
            self.z0s,
            strict=True,
        )
        losses = [
            # A mean of the micro-batches' means, also where the last of them is smaller.
            loss.kto_loss(log_ratio, desirable, own_z0, beta=self._beta, weight=weight)
            * (len(micro_batch) / len(self.z0s) / len(log_ratio))
            for log_ratio, desirable, weight, own_z0 in parts
        ]
        return torch.cat(losses)


class MicroBatchModule(WholeBatchModule):
    """The same, but trained as TRL does; held-out records are scored as ever."""

    def _scorer(self) -> BatchScorer:
        if not self.trainer.training:
            return super()._scorer()
        assert self.policy is not None
        assert self.reference is not None
        self._micro_batch_scorer = MicroBatchScorer(
            self.policy,
            self.reference,
            beta=self.beta,
            loss_name=self.loss,
            sum_over_ranks=self._sum_over_ranks,
        )
        return self._micro_batch_scorer

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.run.micro_z0s.append(self._micro_batch_scorer.z0s.tolist())


CONTESTANTS: dict[str, type[WholeBatchModule]] = {
    "whole batch": WholeBatchModule,
    "micro-batches of 2": MicroBatchModule,
}


def train(job: tuple[str, Settings, int]) -> Run:
    """What a contestant's run says, by its name, settings and seed; for a pool of processes."""
    name, settings, seed = job
    module, _ = fit(CONTESTANTS[name], settings, seed)
    return module.run


def fit(
    contestant: type[WholeBatchModule], settings: Settings, seed: int
) -> tuple[WholeBatchModule, KTODataModule]:
    """Train on the CPU. The seed draws held-out records, partners and the order of the epochs."""
    module = contestant(
        str(settings.model), beta=settings.beta, learning_rate=settings.learning_rate
    )
    data = KTODataModule(
        str(settings.train),
        validation=settings.held_out,
        batch_size=settings.batch_size,
        max_tokens=WHOLE,
        max_length=settings.max_length,
        pairing_seed=seed,
        preprocessing_workers=1,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=settings.steps,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        val_check_interval=max(1, settings.steps // 2),
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    torch.manual_seed(seed)
    with patch.dict(os.environ, PL_GLOBAL_SEED=str(seed)):  # what the order is drawn by
        trainer.fit(module, datamodule=data)
    return module, data


def trained_log_ratios(
    settings: Settings, *, seed: int, num_pairings: int
) -> list[tuple[Pairing, Float[np.ndarray, " examples"]]]:
    """log π_θ(y'|x) − log π_ref(y'|x) of every example of the data set, in nats, after training.

    Once for each of several ways to pair the examples, the first of which it was trained with.
    """
    module, data = fit(WholeBatchModule, settings, seed)
    examples, policy, reference = data.prepared.train_set, module.policy, module.reference
    assert examples is not None
    assert policy is not None
    assert reference is not None
    batches = StepBatches(
        examples=examples,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        max_length=settings.max_length,
        can_share_prompts=policy.packed,
    )
    found = []
    for number in range(num_pairings):
        pairing = pair_distinct_prompts(examples.prompt_keys, seed=seed + number)
        log_ratios = np.empty(len(examples))
        for chosen, batch in _batches_in_order(pairing, batches):
            with torch.no_grad():
                after = policy(batch, matched=False).mismatched
                before = reference.logps(batch, matched=False).mismatched
            assert after is not None
            assert before is not None
            log_ratios[chosen] = (after - before).double().numpy()
        found.append((pairing, log_ratios))
    return found


def _batches_in_order(
    pairing: Pairing, batches: StepBatches
) -> Iterator[tuple[Int64[np.ndarray, " batch"], PackedBatch]]:
    plans = PlanSampler(
        pairing=pairing,
        costs=np.ones(len(pairing), dtype=np.int64),
        batch_size=SCORED_AT_ONCE,
        max_tokens=WHOLE,
        shuffle=False,
        seed=0,
    )
    for plan in plans:
        (batch,) = batches[plan].micro_batches
        yield plan.examples, batch


def set_up_process() -> None:
    """In this process: the tables alone, and one thread."""
    torch.set_num_threads(1)  # models this small gain nothing from a second
    be_quiet()
