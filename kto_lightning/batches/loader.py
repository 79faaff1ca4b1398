"""From tokenized examples to the loader whose item is one optimizer step."""

import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64
from torch.utils.data import DataLoader, Dataset, Sampler

from kto_lightning.batches.class_weights import ClassWeights
from kto_lightning.batches.collate import StepBatches, TokenizedExamples
from kto_lightning.batches.packing import example_costs
from kto_lightning.batches.pairing import Pairing, pair_distinct_prompts, pair_rotate, unpaired
from kto_lightning.batches.sampler import PlanSampler
from kto_lightning.batches.types import StepBatch
from kto_lightning.errors import ConfigError

PairingKind = Literal["distinct_prompts", "rotate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionContext:
    """Where and by what batches are run, which decides their cut but never their result."""

    rank: int
    world_size: int
    packed: bool
    """Whether the model runs packed and shares prompts; else it pads."""
    with_keys: bool
    """Whether a reference cache asks under which keys log-probs are filed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batching:
    """How examples become steps; the fields are `KTODataModule`'s keys."""

    batch_size: int
    max_tokens: int
    max_length: int | None
    """Tokens at which prompt + completion are cut; None: no cut."""
    shuffle: bool
    pairing: PairingKind
    pairing_seed: int
    num_workers: int

    def __post_init__(self) -> None:
        for name, least in (
            *(("batch_size", 1), ("max_tokens", 1)),
            *(("num_workers", 0), ("pairing_seed", 0)),
        ):
            if getattr(self, name) < least:
                got = getattr(self, name)
                raise ConfigError(f"--data.{name} must be at least {least}, got {got}.")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"--data.max_length must be at least 2, got {self.max_length}.")

    def pair(
        self, prompt_keys: Int64[np.ndarray, " examples"], *, needs_partners: bool, buffer: int = 0
    ) -> Pairing:
        """Whose completion each example of a set, or of a stream's buffer, is mismatched with.

        Raises:
            ConfigError, DataError: as `pair_rotate` and `pair_distinct_prompts`.
        """
        if not needs_partners:
            return unpaired(len(prompt_keys))
        if self.pairing == "rotate":
            return pair_rotate(len(prompt_keys), self.batch_size)
        # A seed of [s, 0] is that of s: the first buffer is paired as a whole set is.
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
        """One rank's plan for every step of an epoch; `seed` draws the orders of the epochs."""
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
            padded=not context.packed,
            buffer=buffer,
        )

    def batches(
        self, examples: TokenizedExamples, weights: ClassWeights, context: ExecutionContext
    ) -> StepBatches:
        """What turns a plan into its batch."""
        return StepBatches(
            examples=examples,
            desirable_weight=weights.desirable,
            undesirable_weight=weights.undesirable,
            max_length=self.max_length,
            can_share_prompts=context.packed,
            with_keys=context.with_keys,
        )

    def loader(self, batches: Dataset[StepBatch], plans: Sampler) -> DataLoader[StepBatch]:
        return DataLoader(
            batches,
            batch_size=None,
            sampler=plans,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_begin_worker if os.name == "posix" else None,
        )


def _begin_worker(worker: int) -> None:
    """Ctrl-C in a terminal and most schedulers' signals go to a whole group of processes; a worker
    that ends by one would take the run with it before it is saved. The run's own end is another
    matter, however it comes."""
    os.setsid()
    for signum in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    """PyTorch's workers watch the process that forked them: where that is a fork server (Python
    3.14), each keeps the other alive when the run is killed."""
    run = multiprocessing.parent_process()
    if run is not None:
        run.join()
        os._exit(1)


def check_validation_interval(trainer: Any, num_steps: int | None) -> None:
    """Before the model is loaded; Lightning finds out when the first epoch begins.

    Raises:
        ConfigError: if an epoch of `num_steps` is over before validation comes round.
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
