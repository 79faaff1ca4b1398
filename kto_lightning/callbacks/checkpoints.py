"""Checkpoints of a run, and random numbers that a resumed run draws again."""

import os
import sys
import time
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from kto_lightning.callbacks.lightning_state import ends_epoch, kto_data, validates_now
from kto_lightning.errors import StoppedRun, check_count, printable
from kto_lightning.sharded_checkpoint import remove_leftovers
from kto_lightning.strategies.protocol import training_strategy
from kto_lightning.training.checkpoints import (
    checkpoints_of,
    list_checkpoints,
    normalize_loop_progress,
)


class Checkpoints(Checkpoint):
    """Saves `OUTPUT/checkpoints/step=N.ckpt` and keeps the last two.

    Once saving has taken longer than a step, later checkpoints are written beside the steps that
    follow, if the strategy can. The end of the run and the next checkpoint wait for that, and only
    then is an older one removed.

    Args:
        every_n_steps: optimizer steps from one checkpoint to the next; null: at the end only.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        check_count("--checkpoint.every_n_steps", every_n_steps, or_null=True)
        self.every_n_steps = every_n_steps
        self.resume_settings = {"checkpoint.every_n_steps": every_n_steps}
        self._saved_step = -1
        self._saves_slowly = False
        self._has_pending = False
        self._step_started = self._step_seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rename checkpoints of later steps than the one resumed from, so that `last` never means
        one of them, and remove what a killed run left of one."""
        if not trainer.is_global_zero:
            return
        remove_leftovers(checkpoints_of(trainer.default_root_dir))
        for step, path in list_checkpoints(trainer.default_root_dir):
            if step > trainer.global_step:
                os.replace(path, _unused_name(path.with_suffix(".ckpt.old")))
                where = printable(str(path))
                print(f"warning: {where} is of a later step; renamed to .ckpt.old", file=sys.stderr)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self._step_started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self._step_seconds = time.perf_counter() - self._step_started
        self._finish(trainer, wait=False)
        if self._is_due(trainer) and not validates_now(trainer) and not ends_epoch(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a validated step only now: a run resumed from it would skip its validation."""
        fits = trainer.state.fn == "fit" and not trainer.sanity_checking
        if fits and self._is_due(trainer) and not ends_epoch(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step of an epoch only now: what other callbacks do at an epoch's end, such
        as EarlyStopping, a run resumed from it would skip."""
        if self._is_due(trainer):
            self._save(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        return bool(self.every_n_steps) and trainer.global_step % self.every_n_steps == 0

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count epochs and steps by the data: of a stream, how far it has been read."""
        loops = checkpoint["loops"]["fit_loop"]
        position = kto_data(trainer).stream_position()
        if position is not None:
            num_epochs, num_in_epoch = position.epoch, position.step
        else:
            num_steps = loops["epoch_loop.batch_progress"]["total"]["processed"]
            num_epochs, num_in_epoch = divmod(num_steps, int(trainer.num_training_batches))
        normalize_loop_progress(loops, num_epochs=num_epochs, num_in_epoch=num_in_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, trains_on=False)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save a run that stops between two steps, on all ranks alike."""
        if isinstance(exception, StoppedRun) and trainer.state.fn == "fit" and trainer.global_step:
            self._save(trainer, trains_on=False)

    def _save(self, trainer: Trainer, *, trains_on: bool = True) -> None:
        self._finish(trainer, wait=True)
        step = trainer.global_step
        if step == self._saved_step:
            return
        background = trains_on and self._saves_slowly
        path = checkpoints_of(trainer.default_root_dir) / f"step={step}.ckpt"
        started = time.perf_counter()
        trainer.save_checkpoint(path, storage_options={"background": True} if background else None)
        self._saved_step, self._has_pending = step, True
        if background:
            return
        self._finish(trainer, wait=True)
        if training_strategy(trainer.strategy).saves_in_background:
            is_slow = time.perf_counter() - started > self._step_seconds
            self._saves_slowly = trainer.strategy.broadcast(is_slow)

    def _finish(self, trainer: Trainer, *, wait: bool) -> None:
        """Remove older checkpoints once the latest is whole."""
        if not self._has_pending:
            return
        if not training_strategy(trainer.strategy).finish_saving(wait=wait):
            return
        self._has_pending = False
        if trainer.is_global_zero:
            for _, old in list_checkpoints(trainer.default_root_dir)[:-2]:
                trainer.strategy.remove_checkpoint(old)


def _unused_name(path: Path) -> Path:
    """The path, or where that exists already, with the first number that does not."""
    names = chain([path], (path.with_name(f"{path.name}.{n}") for n in count(2)))
    return next(name for name in names if not os.path.lexists(name))


class StepSeed(Callback):
    """Seeds every step from the run's seed, the step and the rank, so that a resumed run draws the
    dropout masks that the uninterrupted one would have drawn."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        entropy = [seed, trainer.global_step, trainer.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
