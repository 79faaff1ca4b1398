"""Optimizers and learning-rate schedules by key."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import SchedulerType, get_scheduler

from kto_lightning.errors import ConfigError


def _adamw(groups: list[dict], learning_rate: float) -> Optimizer:
    fused = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=fused)


def _sgd(groups: list[dict], learning_rate: float) -> Optimizer:
    return SGD(groups, lr=learning_rate)


OPTIMIZERS: dict[str, Callable[[list[dict], float], Optimizer]] = {"adamw": _adamw, "sgd": _sgd}
SCHEDULES = [kind.value for kind in SchedulerType]


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
) -> Optimizer:
    """The optimizer of that name (`OPTIMIZERS`); weight decay on matrices only, never on biases
    and norms."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[name]([group for group in groups if group["params"]], learning_rate)


def make_scheduler(
    name: str, optimizer: Optimizer, *, warmup_ratio: float, num_steps: int
) -> LRScheduler:
    """A schedule of `transformers.get_scheduler`, over `num_steps` optimizer steps.

    Raises:
        ConfigError: if the schedule (one of `SCHEDULES`) needs more than these settings.
    """
    warmup_steps = math.ceil(warmup_ratio * num_steps)
    if name == "constant" and warmup_steps:
        name = "constant_with_warmup"
    try:
        return get_scheduler(name, optimizer, warmup_steps, num_steps)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--model.lr_schedule {name} cannot be used here: {error}") from error


def gradient_norm(parameters: Iterable[nn.Parameter], clip_norm: float | None) -> torch.Tensor:
    """The global L2 norm of the gradients before clipping; clips them to `clip_norm` if given."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(trained, clip_norm, norm)
    return norm
