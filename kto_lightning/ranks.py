"""What the processes of one job say, to each other beside tensors of a step and to the user."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from lightning import Trainer
from torch import Tensor

T = TypeVar("T")
_NO_LIMIT = timedelta(days=1000)


def gathered(own: list[T]) -> list[T]:
    """The lists of all ranks, one after the other, on every rank."""
    if not _several():
        return own
    parts: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, own)
    return [item for part in parts for item in part]


def on_any_rank(flags: Sequence[bool]) -> list[bool]:
    """Which of the flags are set on this rank or another; each rank has as many."""
    return [any(column) for column in zip(*gathered([list(flags)]), strict=True)]


@contextmanager
def wait_for_each_other() -> Iterator[None]:
    """No rank leaves the block before all have reached its end, however long one takes.

    For what the first rank alone does at the end of a run: a launcher may take a rank that leaves
    early for the end of the job, and a barrier of the usual kind gives up after half an hour.
    """
    group: Any = dist.new_group(backend="gloo", timeout=_NO_LIMIT) if _several() else None
    try:
        yield
    finally:
        if group is not None:
            dist.monitored_barrier(group, timeout=_NO_LIMIT)
            dist.destroy_process_group(group)


def by_rank(value: float, rank: int, num_ranks: int) -> Float[Tensor, " ranks"]:
    """A vector whose sum over the ranks holds every rank's value, so that a value rides along in a
    reduction that there is anyway."""
    vector = torch.zeros(num_ranks, dtype=torch.float64)
    vector[rank] = value
    return vector


def warn(trainer: Trainer, message: str) -> None:
    """A warning on stderr, once for all ranks; a progress bar makes way for it."""
    if trainer.is_global_zero:
        bar = trainer.progress_bar_callback
        say = print if bar is None else bar.print
        say(f"warning: {message}", file=sys.stderr)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
