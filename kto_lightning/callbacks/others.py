"""Other people's callbacks beside a run: its checkpoints hold what is trained, and resume exactly.

Lightning's `WeightAveraging` keeps an average of the weights, puts it in the policy's place during
a validation and for good when training ends, and into `state_dict` of a checkpoint, beside the
policy's own weights.
"""

import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from torch import Tensor

from kto_lightning.callbacks.checkpoints import Checkpoints
from kto_lightning.callbacks.lightning_state import kto_module
from kto_lightning.errors import StoppedRun, printable


def averaging_callback(trainer: Trainer) -> WeightAveraging | None:
    """The callback that averages weights; None: there is none."""
    callbacks: Iterable[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    return next((one for one in callbacks if isinstance(one, WeightAveraging)), None)


class BeforeOthers(Callback):
    """The first of all callbacks, to be called before another changes the weights.

    Args:
        configs: the settings of the other callbacks, for the comparison when a run is resumed.
    """

    def __init__(self, configs: list[Any] | None = None) -> None:
        text = json.dumps(configs, default=str) if configs else None
        self.resume_settings = {"trainer.callbacks": text}
        self._has_trained = False
        self._validates = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Free the copy of a second model that an averaging callback has made with the module's,
        and keep frozen weights, which are in no checkpoint, free of rounding in the average."""
        averaged: Any = getattr(averaging_callback(trainer), "_average_model", None)
        if averaged is None:
            return
        averaged.module.reference = None
        if averaged.avg_fn is not None:
            averaged.avg_fn = partial(_average_or_equal, averaged.avg_fn)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a run that `EarlyStopping` had stopped stay so."""
        self._has_trained = True
        for callback in trainer.early_stopping_callbacks:
            assert isinstance(callback, EarlyStopping)
            if callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
                trainer.should_stop = True
                if trainer.is_global_zero:
                    print(f"stopped   early, at step {trainer.global_step}, before it was resumed")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validates = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validates = False

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Put the policy's own weights back, if the run stops during a validation and is saved."""
        averaging = averaging_callback(trainer)
        if averaging is not None and self._validates and isinstance(exception, StoppedRun):
            averaging.on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last checkpoint before the others end."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints):
                callback.on_train_end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a run resumed after its last step, whose training never starts, end as it did."""
        if self._has_trained:
            return
        averaging = averaging_callback(trainer)
        if averaging is not None:
            averaging.on_train_end(trainer, pl_module)
        if trainer.is_global_zero:
            print(f"complete  at step {trainer.global_step}: no step is left to take")
            for change in kto_module(pl_module).resumption.latest:
                print(f"ignored   {printable(change.described)}")


def _average_or_equal(
    average: Callable[[Tensor, Tensor, Any], Tensor], averaged: Tensor, current: Tensor, count: Any
) -> Tensor:
    """The average, which of equal weights is no other: d · x + (1 − d) · x rounds."""
    return averaged if torch.equal(averaged, current) else average(averaged, current, count)
