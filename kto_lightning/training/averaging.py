"""Checkpoints of a run whose weights Lightning's `WeightAveraging` averages."""

from typing import Any

from torch import nn

from kto_lightning.errors import ConfigError
from kto_lightning.models.weights import drop_frozen

_CURRENT = "current_model_state"
"""Lightning's name for the trained weights, beside their average in `state_dict`."""


def drop_frozen_averages(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Leave the frozen weights out of the second set of weights too, in place."""
    if _CURRENT in checkpoint:
        checkpoint[_CURRENT] = drop_frozen(checkpoint[_CURRENT], module)


def restore_averages(checkpoint: dict[str, Any], module: nn.Module, *, averages: bool) -> None:
    """Complete both sets of weights, which Lightning's callback loads, with the frozen ones.

    Args:
        averages: whether the run that resumes has such a callback.

    Raises:
        ConfigError: if only one of the two runs has.
    """
    if averages != (_CURRENT in checkpoint):
        had = "had no" if averages else "had a"
        raise ConfigError(
            f"the run of --ckpt_path {had} WeightAveraging callback, whose average a checkpoint "
            "holds. Give the same --trainer.callbacks, or start a new run from the exported model."
        )
    if averages:
        own = module.state_dict()
        for name in ("state_dict", _CURRENT):
            checkpoint[name] = own | checkpoint[name]
