"""What the command line refuses: wrong keys, wrong values, and trainer options that would do
nothing or harm here. Each answer names the key, what it may be and what was got."""

import difflib
import os
from collections.abc import Collection, Iterable
from typing import Any

from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ProgressBar,
    Timer,
)
from lightning.pytorch.cli import LightningArgumentParser

from kto_lightning.errors import ConfigError
from kto_lightning.training.optimizers import check_precision

ENVIRONMENT = "KTO"
"""What names of environment variables begin with that set options: KTO_FIT__MODEL__BETA."""
_BATCHES = (
    "Use --data.batch_size (examples per optimizer step over all devices) and --data.max_tokens "
    "(tokens per forward)."
)
REFUSED = {
    # Trainer option: (values that change nothing, why another one is refused and what to do)
    "gradient_clip_val": ((None,), "does nothing here. Use --model.gradient_clip_norm."),
    "gradient_clip_algorithm": ((None,), "does nothing here. Use --model.gradient_clip_norm."),
    "accumulate_grad_batches": (
        (None, 1),
        f"does nothing here. {_BATCHES}",
    ),
    "fast_dev_run": ((False, 0), "skips OUTPUT. Use --trainer.max_steps 1."),
    "barebones": ((None, False), "writes no metrics. Leave it out."),
    "enable_checkpointing": (
        (None, True),
        "contradicts what makes a run resumable. Leave it out: there is one checkpoint, at the "
        "end, unless --checkpoint.every_n_steps asks for more.",
    ),
    "default_root_dir": ((None,), "does nothing here. Use --output_dir."),
    "overfit_batches": (
        (0.0,),
        "exchanges the order of the data. Use --trainer.limit_train_batches and --data.shuffle "
        "false.",
    ),
    "use_distributed_sampler": (
        (False,),
        "would share batches out twice: that is done already. Leave it out.",
    ),
}
_REFUSED_CALLBACKS = {
    BatchSizeFinder: f"cannot change the size of batches here. {_BATCHES}",
    GradientAccumulationScheduler: f"has nothing to accumulate here. {_BATCHES}",
    LearningRateFinder: "needs Lightning's own optimization. Use --model.learning_rate.",
    ProgressBar: "would be a second one: progress is shown already. Leave it out.",
    Timer: "cannot be written to config.yaml. Use --trainer.max_time.",
}


def check_trainer_options(trainer: Any, *, trains: bool) -> None:
    """Refuse what would be ignored or harm, before any data or model is touched.

    Args:
        trainer: the settings under `trainer`.
        trains: whether the command is `fit`.

    Raises:
        ConfigError: with the key to use instead.
    """
    for name, (harmless, reason) in REFUSED.items():
        if trainer.get(name) not in harmless:
            raise ConfigError(f"--trainer.{name} {reason}")
    check_precision(trainer.precision)
    if trains:
        _check_length(trainer)


def check_environment(command: str, parser: LightningArgumentParser) -> None:
    """Refuse variables that look like options and are none: jsonargparse passes over them.

    Raises:
        ConfigError: with the nearest right name.
    """
    prefix = f"{ENVIRONMENT}_{command.upper()}__"
    known = [prefix + action.dest.upper().replace(".", "__") for action in parser._actions]
    for name in sorted(os.environ):
        if name.startswith(prefix) and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"the environment's {name} is no option of {command}.{hint}")


def check_callbacks(callbacks: list[Any]) -> None:
    """Refuse those of Lightning's callbacks that cannot work here, before the model is loaded.

    Raises:
        ConfigError: with what to use instead.
    """
    for callback in callbacks:
        for kind, reason in _REFUSED_CALLBACKS.items():
            if isinstance(callback, kind):
                raise ConfigError(f"--trainer.callbacks {type(callback).__name__} {reason}")


def check_monitors(callbacks: Iterable[Any], *, validates: bool, known: Collection[str]) -> None:
    """Refuse callbacks that watch what is never there, before the model is loaded; Lightning finds
    out when the first epoch ends.

    Args:
        callbacks: those of the trainer.
        validates: whether there are records to validate on.
        known: the metrics of a validation.

    Raises:
        ConfigError: with what to do.
    """
    for callback in callbacks:
        if not isinstance(callback, (EarlyStopping, ModelCheckpoint)) or callback.monitor is None:
            continue
        who = f"{type(callback).__name__} watches {callback.monitor}"
        if callback.monitor not in known:
            raise ConfigError(f"{who}, which is none of what it can: {', '.join(sorted(known))}.")
        if not validates:
            raise ConfigError(f"{who}, but nothing is validated. Add --data.validation.")


def _check_length(trainer: Any) -> None:
    """Before Lightning, which takes a run of no steps for done."""
    for name in ("max_steps", "max_epochs"):
        value = trainer.get(name)
        if value is not None and value != -1 and value < 1:
            raise ConfigError(
                f"--trainer.{name} must be at least 1, or -1 for no limit, got {value}."
            )
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise ConfigError(
            "the run would never end: --trainer.max_steps and --trainer.max_epochs are both -1. "
            "Give one of them."
        )
    if trainer.limit_train_batches == 0:
        raise ConfigError("--trainer.limit_train_batches 0 leaves nothing to train on.")
