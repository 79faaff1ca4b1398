"""Checkpoints of a run, and random numbers that a resumed run draws again."""

import os
import sys
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from kto_lightning.callbacks.lightning_state import ends_epoch, kto_data, validates_now
from kto_lightning.errors import StoppedRun, check_count, printable
from kto_lightning.training.checkpoints import (
    checkpoints_of,
    list_checkpoints,
    normalize_loop_progress,
)


class Checkpoints(Checkpoint):
    """Saves `OUTPUT/checkpoints/step=N.ckpt` and keeps the last two.

    Args:
        every_n_steps: optimizer steps from one checkpoint to the next; null: at the end only.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        check_count("--checkpoint.every_n_steps", every_n_steps, or_null=True)
        self.every_n_steps = every_n_steps
        self.resume_settings = {"checkpoint.every_n_steps": every_n_steps}
        self._saved_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rename checkpoints of later steps than the one resumed from, so that `last` never means
        one of them, and remove what a killed run left of one."""
        if not trainer.is_global_zero:
            return
        for part in checkpoints_of(trainer.default_root_dir).glob(".step=*.ckpt.part"):
            with suppress(OSError):
                part.unlink()
        for step, path in list_checkpoints(trainer.default_root_dir):
            if step > trainer.global_step:
                os.replace(path, _unused_name(path.with_suffix(".ckpt.old")))
                where = printable(str(path))
                print(f"warning: {where} is of a later step; renamed to .ckpt.old", file=sys.stderr)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
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
        self._save(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save a run that stops between two steps, on all ranks alike."""
        if isinstance(exception, StoppedRun) and trainer.state.fn == "fit" and trainer.global_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step == self._saved_step:
            return
        directory = checkpoints_of(trainer.default_root_dir)
        trainer.save_checkpoint(directory / f"step={step}.ckpt")
        self._saved_step = step
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
