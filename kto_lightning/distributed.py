"""Collectives beside those of PyTorch's strategies, and messages that respect ranks."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from lightning import Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kto_lightning.errors import KTOError, printable

T = TypeVar("T")
_NO_LIMIT = timedelta(days=1000)
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""Gloo's messages when the peer has ended; NCCL waits until it is killed."""


def gathered(own: list[T]) -> list[T]:
    """The lists of all ranks, one after the other, on every rank."""
    if not _several():
        return own
    parts: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, own)
    return [item for part in parts for item in part]


def on_any_rank(flags: Sequence[bool]) -> list[bool]:
    """Which of the flags are set on any rank; every rank passes equally many."""
    return [any(column) for column in zip(*gathered([list(flags)]), strict=True)]


@contextmanager
def wait_for_each_other() -> Iterator[None]:
    """A barrier at the end of the block, without a time limit.

    For work of rank 0 alone at the end of a run: a launcher may take an early exit of another rank
    for the end of the job, and a usual barrier times out after half an hour.
    """
    group: Any = dist.new_group(backend="gloo", timeout=_NO_LIMIT) if _several() else None
    try:
        yield
    finally:
        if group is not None:
            dist.monitored_barrier(group, timeout=_NO_LIMIT)
            dist.destroy_process_group(group)


@contextmanager
def explain_lost_rank() -> Iterator[None]:
    """Turn the error of a collective whose peer has ended into a message.

    Raises:
        KTOError: for that error; others pass unchanged.
    """
    try:
        yield
    except RuntimeError as error:
        if not _several() or not any(words in str(error) for words in _LOST):
            raise
        raise KTOError(
            "another rank has ended while this one waited for it. Look at its output, or at what "
            "killed it; then resume with --ckpt_path last."
        ) from error


def by_rank(value: float, rank: int, num_ranks: int) -> Float[Tensor, " ranks"]:
    """This rank's value in a vector whose sum over the ranks holds every rank's value, so that it
    can be part of a reduction that is needed anyway."""
    vector = torch.zeros(num_ranks, dtype=torch.float64)
    vector[rank] = value
    return vector


def gradient_norm(parameters: Iterable[nn.Parameter], clip_norm: float | None) -> Tensor:
    """The global L2 norm of the gradients before clipping; clips them to `clip_norm` if given."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(trained, clip_norm, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def warn(trainer: Trainer, message: str) -> None:
    """Print a warning on stderr, on rank 0 only, above a progress bar if there is one."""
    if trainer.is_global_zero:
        bar = trainer.progress_bar_callback
        say = print if bar is None else bar.print
        say(f"warning: {printable(message)}", file=sys.stderr)


def is_first_rank() -> bool:
    """Whether this process is the only one, or rank 0 of several."""
    return not _several() or dist.get_rank() == 0


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
