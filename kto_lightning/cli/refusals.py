"""Checks of options that would have no effect or do harm here: Lightning's trainer options,
callbacks and monitors, and misspelt environment variables."""

import difflib
import os
from collections.abc import Collection, Iterable
from typing import Any

from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    ProgressBar,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.cli import LightningArgumentParser

from kto_lightning.cli.trainer_values import check_trainer_values
from kto_lightning.errors import ConfigError
from kto_lightning.training.optimizers import check_precision

ENVIRONMENT = "KTO"
"""Prefix of the environment variables that set options: KTO_FIT__MODEL__BETA."""
_BATCHES = (
    "Use --data.batch_size (examples per optimizer step over all devices) and --data.max_tokens "
    "(tokens per forward)."
)
REFUSED = {
    # Trainer option: (allowed values, why others are refused and what to do)
    "gradient_clip_val": ((None,), "has no effect here. Use --model.gradient_clip_norm."),
    "gradient_clip_algorithm": ((None,), "has no effect here. Use --model.gradient_clip_norm."),
    "accumulate_grad_batches": ((None, 1), f"has no effect here. {_BATCHES}"),
    "fast_dev_run": ((False, 0), "writes nothing to --output_dir. Use --trainer.max_steps 1."),
    "barebones": ((None, False), "writes no metrics. Omit it."),
    "enable_checkpointing": (
        (None, True),
        "would make a run impossible to resume. Omit it: one checkpoint is saved, at the end, "
        "unless --checkpoint.every_n_steps is given.",
    ),
    "default_root_dir": ((None,), "has no effect here. Use --output_dir."),
    "overfit_batches": (
        (0.0,),
        "replaces the order of the data. Use --trainer.limit_train_batches and --data.shuffle "
        "false.",
    ),
    "use_distributed_sampler": (
        (False,),
        "would split batches over ranks a second time. Omit it.",
    ),
}
_REFUSED_CALLBACKS = {
    BatchSizeFinder: f"cannot change the batch size here. {_BATCHES}",
    GradientAccumulationScheduler: f"has nothing to accumulate here. {_BATCHES}",
    LearningRateFinder: "needs Lightning's own optimization. Use --model.learning_rate.",
    ProgressBar: "would be a second progress display. Omit it.",
    StochasticWeightAveraging: "replaces the learning-rate schedule, and no checkpoint holds its "
    "average. Use WeightAveraging or EMAWeightAveraging.",
    ModelPruning: "gives weights other names, under which no checkpoint can be resumed. Prune the "
    "exported model.",
    BaseFinetuning: "freezes weights, which then are in no checkpoint. Use --model.lora.",
    Timer: "cannot be written to config.yaml. Use --trainer.max_time.",
}


def check_trainer_options(trainer: Any, *, trains: bool) -> None:
    """Check for options that would be ignored or do harm, before data and model are read.

    Args:
        trainer: the settings under `trainer`.
        trains: whether the command is `fit`.

    Raises:
        ConfigError: with the key to use instead.
    """
    check_trainer_values(trainer)
    for name, (allowed, reason) in REFUSED.items():
        if trainer.get(name) not in allowed:
            raise ConfigError(f"--trainer.{name} {reason}")
    check_precision(trainer.precision)
    if trains:
        _check_limits(trainer)


def check_environment(command: str, parser: LightningArgumentParser) -> None:
    """Check for variables with the prefix of options that set none; jsonargparse ignores them.

    Raises:
        ConfigError: with the nearest right name.
    """
    prefix = f"{ENVIRONMENT}_{command.upper()}__"
    known = [prefix + action.dest.upper().replace(".", "__") for action in parser._actions]
    for name in sorted(os.environ):
        if name.startswith(prefix) and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"the environment variable {name} sets no option of {command}.{hint}")


def check_callbacks(callbacks: list[Any], *, shards: bool = False) -> None:
    """Check for Lightning's callbacks that cannot work here, before the model is loaded.

    Args:
        shards: whether the strategy shards the weights.

    Raises:
        ConfigError: with what to use instead.
    """
    for callback in callbacks:
        for kind, reason in _REFUSED_CALLBACKS.items():
            if isinstance(callback, kind):
                raise ConfigError(f"--trainer.callbacks {type(callback).__name__} {reason}")
        if isinstance(callback, WeightAveraging):
            _check_averaging(callback, shards=shards)


def _check_averaging(callback: WeightAveraging, *, shards: bool) -> None:
    name = f"--trainer.callbacks {type(callback).__name__}"
    if shards:
        raise ConfigError(
            f"{name} averages whole models, and this strategy shards them. Use ddp, or omit it."
        )
    if any(callback.should_update(epoch_idx=epoch) for epoch in (0, 1, 10**6)):
        raise ConfigError(
            f"{name} averages at the end of epochs, which a checkpoint saved there does not tell. "
            "Average after steps: update_starting_at_step, update_every_n_steps."
        )


def check_monitors(callbacks: Iterable[Any], *, validates: bool, known: Collection[str]) -> None:
    """Check the metrics that callbacks monitor, before the model is loaded; Lightning would raise
    at the end of the first epoch.

    Args:
        callbacks: those of the trainer.
        validates: whether there are held-out records.
        known: metrics of a validation.

    Raises:
        ConfigError: if a metric is unknown or never computed, with what to do.
    """
    for callback in callbacks:
        if not isinstance(callback, (EarlyStopping, ModelCheckpoint)) or callback.monitor is None:
            continue
        name = f"{type(callback).__name__} monitors {callback.monitor}"
        if callback.monitor not in known:
            raise ConfigError(f"{name}, which is not one of {', '.join(sorted(known))}.")
        if not validates:
            raise ConfigError(f"{name}, but there is no validation. Add --data.validation.")


def _check_limits(trainer: Any) -> None:
    """Check the run's length; Lightning would end a run of no steps without an error."""
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise ConfigError(
            "the run would never end: --trainer.max_steps and --trainer.max_epochs are both -1. "
            "Give one of them."
        )
    if trainer.limit_train_batches == 0:
        raise ConfigError("--trainer.limit_train_batches 0 leaves nothing to train on.")
