"""Values of Lightning's trainer options, checked before Lightning does, in this project's terms."""

import datetime
import re
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from kto_lightning.errors import MOST_PROCESSES, ConfigError, check_count
from kto_lightning.strategies.checks import strategy_problem

_COUNTS = {
    # option: (the least, the most)
    "num_nodes": (1, 65_536),
    "min_steps": (0, None),
    "min_epochs": (0, None),
    "check_val_every_n_epoch": (1, None),
    "log_every_n_steps": (0, None),
    "num_sanity_val_steps": (-1, None),
    "reload_dataloaders_every_n_epochs": (0, None),
}
_LENGTHS = ("max_steps", "max_epochs")
_SHARES = ("limit_train_batches", "limit_val_batches", "limit_predict_batches")
_PROFILERS = ("simple", "advanced", "pytorch", "xla")
_TIME = re.compile(r"\d+:\d+:\d+:\d+")
_LISTED = ("auto", "ddp", "fsdp2", "fsdp2_offload", "fsdp2_hybrid", "fsdp2_hybrid_offload")
"""Strategies that a message names; Lightning's others are taken too."""


def check_trainer_values(trainer: Any) -> None:
    """Check numbers, names and devices.

    Args:
        trainer: the settings under `trainer`.

    Raises:
        ConfigError: with the option, and what it may be.
    """
    for name, (least, most) in _COUNTS.items():
        limit = {} if most is None else {"most": most}
        if trainer.get(name) is not None:
            check_count(f"--trainer.{name}", trainer[name], least=least, **limit)
    for name in _LENGTHS:
        value = trainer.get(name)
        if value not in (None, -1) and (isinstance(value, bool) or value < 1):
            raise ConfigError(
                f"--trainer.{name} must be at least 1, or -1 for no limit, got {value}."
            )
        check_count(f"--trainer.{name}", value, least=-1, or_null=True)
    for name in (*_SHARES, "val_check_interval"):
        _check_share(name, trainer.get(name))
    if trainer.get("max_time") is not None:
        _check_time("max_time", trainer.max_time)
    _check_name("profiler", trainer.get("profiler"), _PROFILERS, listed=_PROFILERS)
    _check_accelerator(trainer.accelerator)
    _check_devices(trainer.devices, on_cpu=_runs_on_cpu(trainer.accelerator))
    registered = StrategyRegistry.available_strategies()
    strategies = ["auto", *(name for name in registered if "xla" not in name and "tpu" not in name)]
    if strategy_problem(trainer.strategy) is None:  # else a better message comes with the model
        _check_name("strategy", trainer.strategy, strategies, listed=_LISTED)


def _check_share(name: str, value: Any) -> None:
    """A share of all batches, or their number."""
    if value is None:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        _check_time(name, value)
    elif not (0.0 <= value <= 1.0 or (value >= 2 and value == value // 1 <= 2**31)):
        raise ConfigError(
            f"--trainer.{name} must be a share from 0 to 1 or a number of steps, got {value}."
        )


def _check_time(name: str, value: Any) -> None:
    """A duration, as Lightning takes it."""
    if isinstance(value, (dict, Namespace)):
        try:
            datetime.timedelta(**vars(value) if isinstance(value, Namespace) else value)
        except (TypeError, OverflowError) as error:
            raise ConfigError(f"--trainer.{name} is not a duration: {error}.") from error
    elif not isinstance(value, datetime.timedelta) and not _TIME.fullmatch(str(value)):
        raise ConfigError(f"--trainer.{name} must be a duration as DD:HH:MM:SS, got {value}.")


def _check_name(name: str, value: Any, known: Any, *, listed: tuple[str, ...]) -> None:
    """A name; a class, as the parser has made it, is taken as it is."""
    if isinstance(value, str) and value.lower() not in known:
        raise ConfigError(
            f"--trainer.{name} must be one of {', '.join(listed)}, got {value or repr(value)}."
        )


def _check_accelerator(value: Any) -> None:
    known = sorted({"auto", "gpu", *AcceleratorRegistry.available_accelerators()})
    _check_name("accelerator", value, known, listed=tuple(known))
    if not isinstance(value, str) or value == "auto":
        return
    names = ("cuda", "mps") if value == "gpu" else (value,)
    if not any(AcceleratorRegistry[name]["accelerator"].is_available() for name in names):
        raise ConfigError(
            f"--trainer.accelerator {value}: PyTorch finds no such device here. Use auto or cpu."
        )


def _runs_on_cpu(accelerator: Any) -> bool:
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return accelerator == "cpu" or (accelerator == "auto" and not has_gpu)


def _check_devices(value: Any, *, on_cpu: bool) -> None:
    """A number of them, or on GPUs their numbers."""
    text = str(value)
    if text == "auto":
        return
    if text.isdecimal() and len(text) <= 10 and not isinstance(value, bool):
        check_count("--trainer.devices", int(text), most=MOST_PROCESSES)
        return
    of_gpus = text == "-1" or re.fullmatch(r"\[?\d{1,5}(, ?\d{1,5})*,?\]?", text)
    if on_cpu or not of_gpus:
        choice = "" if on_cpu else ", or numbers of GPUs such as 0,2"
        raise ConfigError(
            f"--trainer.devices must be auto or a number of processes{choice}, got {value!r}."
        )
