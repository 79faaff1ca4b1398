"""Optimizers and learning-rate schedules by name, and the number of a run's steps."""

import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import SchedulerType, get_scheduler
from transformers.optimization import Adafactor

from kto_lightning.errors import ConfigError, check_number, check_one_of

_PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16")

_FUSED_ON = ("cuda", "cpu")
"""Devices on which all of AdamW is one kernel: one pass over the weights instead of a dozen."""


def _adamw(groups: list[dict], learning_rate: float) -> Optimizer:
    fused = all(p.device.type in _FUSED_ON for group in groups for p in group["params"])
    return AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=fused)


def _sgd(groups: list[dict], learning_rate: float) -> Optimizer:
    return SGD(groups, lr=learning_rate)


def _adafactor(groups: list[dict], learning_rate: float) -> Optimizer:
    """Adafactor with a fixed learning rate, as transformers' Trainer sets it.

    `torch.optim.Adafactor` has no such setting: it scales the rate of each parameter by the root
    mean square of its weights.
    """
    return Adafactor(groups, lr=learning_rate, scale_parameter=False, relative_step=False)


def _adamw_8bit(groups: list[dict], learning_rate: float) -> Optimizer:
    # An optional dependency.
    from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

    return AdamW8bit(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8)


OPTIMIZERS: dict[str, Callable[[list[dict], float], Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "adamw_8bit": _adamw_8bit,
}
SCHEDULES = [kind.value for kind in SchedulerType]
_DECAY_RATIO = 0.1
"""Share of all steps, at their end, in which `warmup_stable_decay` decays (arXiv:2404.06395)."""
_MIN_LR_RATIO = 0.1
"""Share of the learning rate at which a cosine with a minimum ends (arXiv:2203.15556)."""
# Vectors never decay; this is for matrices: biases of experts, norms per head, one row for each.
_NEVER_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|[._])norm(\.|$)", re.IGNORECASE)


@dataclass(kw_only=True, slots=True)
class Optimization:
    """Optimizer and schedule, under the names of `KTOModule`'s arguments.

    Raises:
        ConfigError: for settings that would otherwise fail only once data and model are loaded.
    """

    optimizer: str
    """One of `OPTIMIZERS`."""
    learning_rate: float
    weight_decay: float
    warmup_ratio: float
    lr_schedule: str
    """One of `SCHEDULES`."""
    gradient_clip_norm: float | None

    def __post_init__(self) -> None:
        check_one_of("--model.optimizer", self.optimizer, OPTIMIZERS)
        if self.optimizer == "adamw_8bit":
            _check_bitsandbytes()
        check_number("learning_rate", self.learning_rate)
        check_number("weight_decay", self.weight_decay)
        if self.gradient_clip_norm is not None:
            check_number("gradient_clip_norm", self.gradient_clip_norm, above=0.0)
        check_one_of("--model.lr_schedule", self.lr_schedule, SCHEDULES)
        check_number("warmup_ratio", self.warmup_ratio, most=1.0)
        self._scheduler(SGD([torch.zeros(1)], lr=self.learning_rate), num_steps=1000)

    def configure(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], *, num_steps: int | None
    ) -> dict[str, Any]:
        """Optimizer and schedule, as Lightning's `configure_optimizers` returns them."""
        self.check_num_steps(num_steps)
        optimizer = make_optimizer(
            self.optimizer,
            named_parameters,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
        )
        return {"optimizer": optimizer, "lr_scheduler": self._scheduler(optimizer, num_steps)}

    def check_num_steps(self, num_steps: int | None) -> None:
        """Refuse a schedule over the whole run where the number of steps is not known.

        Raises:
            ConfigError: if `num_steps` is None and the learning rate is not constant.
        """
        if num_steps is not None or (self.lr_schedule == "constant" and not self.warmup_ratio):
            return
        raise ConfigError(
            f"--model.lr_schedule {self.lr_schedule} with --model.warmup_ratio "
            f"{self.warmup_ratio:g} depends on the number of steps, which is not known before a "
            "stream ends. Give --trainer.max_steps, or leave the learning rate constant."
        )

    def _scheduler(self, optimizer: Optimizer, num_steps: int | None) -> LRScheduler:
        return make_scheduler(
            self.lr_schedule, optimizer, warmup_ratio=self.warmup_ratio, num_steps=num_steps or 0
        )


def _check_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "--model.optimizer adamw_8bit needs bitsandbytes, which is not installed. "
            "`pip install bitsandbytes`, or use adamw, or adafactor for little memory."
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            "--model.optimizer adamw_8bit needs a CUDA device, and there is none here. "
            "Use adamw, or adafactor for little memory."
        )


def use_settings(
    settings: Optimization,
    optimizer: Optimizer,
    scheduler: Any,
    weight_decays: Sequence[float],
) -> None:
    """Give a restored optimizer and its schedule the settings of this run, in place.

    Restoring brings back learning rate and weight decay of the checkpoint. With the same settings
    this changes no number.

    Args:
        scheduler: of `make_scheduler`; its count of steps stays, over this run's number of them.
        weight_decays: of each parameter group.
    """
    scheduler.base_lrs = [settings.learning_rate] * len(weight_decays)
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    for group, decay, factor in zip(optimizer.param_groups, weight_decays, factors, strict=True):
        group["initial_lr"] = settings.learning_rate
        group["lr"] = settings.learning_rate * factor
        group["weight_decay"] = decay


def check_precision(precision: int | str | None) -> None:
    """Refuse a precision under which the model or its metrics would not be what was asked for.

    Raises:
        ConfigError: with what to use instead.
    """
    if precision is None or str(precision) in _PRECISIONS:
        return
    reason = "is not available here"
    if precision in ("bf16-true", "16-true"):
        reason = "rounds rotary embeddings and small updates away"
    elif str(precision) in ("16", "16-mixed"):
        reason = "scales gradients, which clipping and grad_norm here do not undo"
    elif str(precision) in ("64", "64-true"):
        reason = "has no use here: log-probs are float32"
    raise ConfigError(
        f"--trainer.precision {precision} {reason}. Use bf16-mixed or 32-true; for a frozen base "
        "in bfloat16 add --model.lora and --model.dtype bfloat16."
    )


def count_steps(
    *,
    steps_per_epoch: int | None,
    limit_train_batches: int | float,
    max_steps: int,
    max_epochs: int | None,
) -> int | None:
    """Optimizer steps of a whole run, from its data and the trainer's limits; None: not known.

    Args:
        steps_per_epoch: of the data; None: not known, because they are streamed.
        limit_train_batches: how many of these are made: a share as a float, a number as an int.
        max_steps: not positive: unbounded.
        max_epochs: None or negative: unbounded.

    Raises:
        ConfigError: if nothing limits the run.
    """
    per_epoch = steps_per_epoch
    if isinstance(limit_train_batches, int):
        limits = (limit_train_batches, steps_per_epoch)
        per_epoch = min(limit for limit in limits if limit is not None)
    elif steps_per_epoch is not None:
        per_epoch = int(steps_per_epoch * limit_train_batches)
    limit = max_steps if max_steps > 0 else None
    if max_epochs is None or max_epochs < 0:
        if limit is None:
            raise ConfigError("Give --trainer.max_steps or --trainer.max_epochs.")
        return limit
    if per_epoch is None:
        return limit
    return max_epochs * per_epoch if limit is None else min(limit, max_epochs * per_epoch)


def make_optimizer(
    name: str,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float,
) -> Optimizer:
    """The optimizer of that name (`OPTIMIZERS`); weight decay on matrices only, never on biases
    and norms."""
    decayed, not_decayed = [], []
    for parameter_name, parameter in named_parameters:
        if parameter.requires_grad:
            never = parameter.ndim < 2 or _NEVER_DECAYED.search(parameter_name)
            (not_decayed if never else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    return OPTIMIZERS[name]([group for group in groups if group["params"]], learning_rate)


def make_scheduler(
    name: str, optimizer: Optimizer, *, warmup_ratio: float, num_steps: int
) -> LRScheduler:
    """A schedule of `transformers.get_scheduler`, over `num_steps` optimizer steps.

    `warmup_stable_decay` decays over the last tenth of all steps, a cosine with a minimum ends at a
    tenth of the learning rate.

    Raises:
        ConfigError: if the schedule (one of `SCHEDULES`) cannot be used with these settings.
    """
    warmup_steps = math.ceil(warmup_ratio * num_steps)
    all_warm_up = warmup_steps >= num_steps  # polynomial divides by the steps after the warm-up
    if warmup_steps and (name == "constant" or (name == "polynomial" and all_warm_up)):
        name = "constant_with_warmup"
    details: dict[str, Any] = {}
    if name == "warmup_stable_decay":
        decay_steps = min(math.ceil(_DECAY_RATIO * num_steps), num_steps - warmup_steps)
        details["num_decay_steps"] = decay_steps
    elif name.endswith("with_min_lr"):
        details["min_lr_rate"] = _MIN_LR_RATIO
    try:
        # `step` of some takes a metric, which the declared type does not say.
        scheduler: Any = get_scheduler(name, optimizer, warmup_steps, num_steps, details)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--model.lr_schedule {name} cannot be used here: {error}") from error
    if "metrics" in inspect.signature(scheduler.step).parameters:
        raise ConfigError(
            f"--model.lr_schedule {name} needs a validation metric, and here the learning rate "
            "changes with every optimizer step. Use constant, linear or cosine."
        )
    return scheduler
