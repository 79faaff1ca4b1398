"""Collectives beside those of PyTorch's strategies, and messages that respect ranks."""

import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from lightning import Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kto_lightning.errors import ConfigError, KTOError, OtherRankError, printable

T = TypeVar("T")
S = TypeVar("S")
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


def raise_together(error: KTOError | None) -> None:
    """Raise the error of the first rank that has one, on every rank; to be called on all of them.

    A host may not have what another has: unless all hosts failed, the message names the host.
    """
    own = None if error is None else (type(error), str(error))
    outcomes = gathered([(socket.gethostname(), own)])
    hosts = {host for host, _ in outcomes}
    failed = [(host, found) for host, found in outcomes if found is not None]
    if error is not None and {host for host, _ in failed} == hosts:
        raise error
    if failed:
        host, (kind, message) = failed[0]
        raise kind(f"on host {host}: {message}" if len(hosts) > 1 else message)


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
def explain_lost_rank(names: Mapping[str, str]) -> Iterator[None]:
    """Turn the error of a collective whose peer has ended into a message.

    Args:
        names: of other hosts, by their addresses.

    Raises:
        KTOError: for that error; others pass unchanged.
    """
    try:
        yield
    except RuntimeError as error:
        if not _several() or not any(words in str(error) for words in _LOST):
            raise
        host = next((name for at, name in dict(names).items() if f"[{at}]" in str(error)), None)
        on_host = f" on host {host}" if host else ""
        raise KTOError(
            f"another rank{on_host} has ended while this one waited for it. Look at its output, or "
            "at what killed it; then resume with --ckpt_path last."
        ) from error


def stream_to_first_rank(
    items: Iterable[T], gather: Callable[[T], S], write: Callable[[Iterator[S]], None]
) -> None:
    """Gather items one after the other, for rank 0 to write; to be called on all ranks.

    Args:
        items: equally many on every rank.
        gather: a collective; what it gives is used on rank 0 only.
        write: called on rank 0, takes all.

    Raises:
        KTOError: on the other ranks, if `write` fails on rank 0, which they would wait for.
    """
    if is_first_rank():
        try:
            write(gather(item) for item in items if _go_on(True))
        except BaseException:
            _go_on(False)
            raise
        _go_on(True)
        return
    for item in items:
        _go_on(True)
        gather(item)
    _go_on(True)


def _go_on(goes_on: bool) -> bool:
    """Tell all ranks whether rank 0 goes on.

    Raises:
        KTOError: on the others, if it does not.
    """
    if not _several():
        return goes_on
    told = [goes_on]
    dist.broadcast_object_list(told, src=0)
    if not told[0] and not is_first_rank():
        raise KTOError("rank 0 has ended with an error. Look at its output.")
    return told[0]


def by_rank(value: float, rank: int, num_ranks: int) -> Float[Tensor, " ranks"]:
    """This rank's value in a vector whose sum over the ranks holds every rank's value, so that it
    can be part of a reduction that is needed anyway."""
    vector = torch.zeros(num_ranks, dtype=torch.float64)
    vector[rank] = value
    return vector


class _Reaching(torch.autograd.Function):
    """Its first input; the others are part of the graph, but get no gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.num_parameters = len(parameters)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*gradients, *[None] * ctx.num_parameters)


def reaching_all(loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """The loss, in whose backward every trained parameter takes part.

    DDP waits for all of them, and what a parameter gets may depend on the rank's examples: nothing,
    if no token is routed to its expert, or if sequences are shorter than a block of compressed
    keys. It then counts as 0.
    """
    return _Reaching.apply(loss, *(p for p in parameters if p.requires_grad))  # pyright: ignore[reportReturnType]


def fill_missing_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Set the gradient of trained parameters that have got none to 0, as a reduction over ranks
    does: an optimizer treats the two differently, and the number of ranks must not count."""
    for parameter in parameters:
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


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


def from_first_rank(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, which alone calls it, on every rank. It has no time limit.

    Raises:
        OtherRankError: on the others, if `make` raises an exception on rank 0, where it passes.
    """
    if not _several():
        return make()
    is_first = dist.get_rank() == 0
    # Before the work: its own handshake has a time limit.
    group: Any = dist.new_group(backend="gloo", timeout=_NO_LIMIT)
    result, error = _attempt(make) if is_first else (None, None)
    sent: list[Any] = [(result, _as_other_rank(error))]
    dist.broadcast_object_list(sent, src=0, group=group)
    gathered([])  # a rank that leaves the group earlier would close connections of the others
    dist.destroy_process_group(group)
    if error is not None:
        raise error
    result, problem = sent[0]
    if problem is not None:
        raise OtherRankError(*problem)
    return result


def on_all_ranks(make: Callable[[], T]) -> T:
    """What `make` returns on this rank, once it has returned on all.

    Raises:
        OtherRankError: if it raises an exception on another rank; this rank's own passes.
    """
    result, error = _attempt(make)
    problems = gathered([_as_other_rank(error)])
    if error is not None:
        raise error
    problem = next(filter(None, problems), None)
    if problem is not None:
        raise OtherRankError(*problem)
    return result  # pyright: ignore[reportReturnType]


def _attempt(make: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return make(), None
    except Exception as error:
        return None, error


def _as_other_rank(error: Exception | None) -> tuple[str, int] | None:
    """What the other ranks are told of an error: its message and the exit status."""
    if error is None:
        return None
    rank = dist.get_rank() if _several() else 0
    status = 2 if isinstance(error, ConfigError) else getattr(error, "status", 1)
    return f"rank {rank} has failed: {error}", status
