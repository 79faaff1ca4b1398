"""`Batching`: from tokenized examples to a `DataLoader` whose item is one optimizer step."""

import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64
from torch.utils.data import Dataset, Sampler

from kto_lightning.batches.class_weights import ClassWeights
from kto_lightning.batches.collate import StepBatches, TokenizedExamples
from kto_lightning.batches.packing import example_costs
from kto_lightning.batches.pairing import Pairing, pair_distinct_prompts, pair_none, pair_rotate
from kto_lightning.batches.sampler import PlanSampler
from kto_lightning.batches.types import StepBatch
from kto_lightning.batches.workers import RememberingSampler, StepLoader, init_worker
from kto_lightning.errors import MOST_PROCESSES, ConfigError, check_count

PairingKind = Literal["distinct_prompts", "rotate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionContext:
    """The rank and model that run the batches; they change micro-batches, never the result."""

    rank: int
    world_size: int
    shares_prompts: bool
    """Whether the model shares prompts between completions; otherwise it pads."""
    with_keys: bool
    """Whether batches carry the keys of a reference cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batching:
    """Settings for pairing and batching examples; the fields are keys of `KTODataModule`."""

    batch_size: int
    max_tokens: int
    max_length: int | None
    """Tokens after which prompt + completion is truncated; None: never."""
    shuffle: bool
    pairing: PairingKind
    pairing_seed: int
    num_workers: int

    def __post_init__(self) -> None:
        check_count("--data.batch_size", self.batch_size)
        check_count("--data.max_tokens", self.max_tokens)
        check_count("--data.num_workers", self.num_workers, least=0, most=MOST_PROCESSES)
        check_count("--data.pairing_seed", self.pairing_seed, least=0)
        if self.max_length is not None:
            check_count("--data.max_length", self.max_length, least=2)

    def pair(
        self, prompt_keys: Int64[np.ndarray, " examples"], *, needs_partners: bool, buffer: int = 0
    ) -> Pairing:
        """Assign mismatched completions to the examples of a data set, or of a stream's buffer.

        Raises:
            ConfigError, DataError: as `pair_rotate` and `pair_distinct_prompts`.
        """
        if not needs_partners:
            return pair_none(len(prompt_keys))
        if self.pairing == "rotate":
            return pair_rotate(len(prompt_keys), self.batch_size)
        # NumPy seeds [s, 0] and s alike: a stream of one buffer is paired as a data set is.
        seed = [self.pairing_seed, buffer] if self.shuffle else None
        return pair_distinct_prompts(prompt_keys, seed=seed)

    def plans(
        self,
        examples: TokenizedExamples,
        pairing: Pairing,
        context: ExecutionContext,
        *,
        shuffle: bool,
        seed: int,
        buffer: int = 0,
    ) -> PlanSampler:
        """The sampler of one rank's plans; `seed` draws the order of each epoch."""
        costs = example_costs(
            examples.prompt_lengths,
            examples.completion_lengths,
            pairing.partner,
            max_length=self.max_length,
        )
        return PlanSampler(
            pairing=pairing,
            costs=costs,
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            shuffle=shuffle,
            seed=seed,
            rank=context.rank,
            world_size=context.world_size,
            padded=not context.shares_prompts,
            buffer=buffer,
        )

    def batches(
        self, examples: TokenizedExamples, weights: ClassWeights, context: ExecutionContext
    ) -> StepBatches:
        """The data set that collates each plan into its batch."""
        return StepBatches(
            examples=examples,
            desirable_weight=weights.desirable,
            undesirable_weight=weights.undesirable,
            max_length=self.max_length,
            can_share_prompts=context.shares_prompts,
            with_keys=context.with_keys,
        )

    def loader(self, batches: Dataset[StepBatch], plans: Sampler) -> StepLoader:
        """A loader without batching of its own: `plans` yields one key per optimizer step."""
        return StepLoader(
            batches,
            batch_size=None,
            sampler=RememberingSampler(plans) if self.num_workers else plans,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=init_worker if os.name == "posix" else None,
        )


def check_validation_interval(trainer: Any, num_steps: int | None) -> None:
    """Check before the model is loaded what Lightning checks when the first epoch begins.

    Args:
        trainer: Lightning's, typed `Any` because this package does not import Lightning.
        num_steps: per epoch; None: unknown.

    Raises:
        ConfigError: if an epoch has fewer steps than the validation interval.
    """
    interval, every = trainer.val_check_interval, trainer.check_val_every_n_epoch
    if num_steps is None or not isinstance(interval, int) or every is None:
        return
    if interval > num_steps:
        raise ConfigError(
            f"--trainer.val_check_interval {interval} is more than the {num_steps} steps of an "
            "epoch. Lower it, or count steps over all epochs with "
            "--trainer.check_val_every_n_epoch null."
        )
