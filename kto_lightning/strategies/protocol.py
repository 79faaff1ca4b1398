"""What a training step and an export need from a Lightning strategy."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning import LightningModule
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor, nn

from kto_lightning.distributed import gradient_norm
from kto_lightning.models.sharding import Shard


@runtime_checkable
class TrainingStrategy(Protocol):
    """Gradients, sharding, whole tensors and checkpoints of a strategy. `FSDP2` implements it
    itself; `Replicated` does so for Lightning's own strategies."""

    shard: Shard | None
    """None: every rank holds the whole policy."""
    rounds_weights: bool
    """Whether mixed precision rounds the weights, where autocast rounds the inputs of products."""
    gather: Callable[[Tensor], Tensor | None] | None
    """Gives the whole of a sharded tensor on the CPU on rank 0, None on the others; called on all
    ranks, which begin with the same tensor. None: every rank holds whole tensors."""

    saves_in_background: bool
    """Whether `save_checkpoint` takes `storage_options={"background": True}`."""

    def synchronize_gradients(self, *, last: bool) -> AbstractContextManager[None]:
        """Surround the backward of a micro-batch; gradients of all ranks are averaged in the last
        micro-batch of a step at the latest."""
        ...

    def gradient_norm(self, parameters: Iterable[nn.Parameter], clip_norm: float | None) -> Tensor:
        """The global L2 norm of the gradients, on every rank, before clipping to `clip_norm`."""
        ...

    def drop_gradients(self, module: LightningModule) -> None:
        """Make the optimizer step that follows change nothing."""
        ...

    def finish_saving(self, *, wait: bool) -> bool:
        """Whether no checkpoint is being written in the background any more, on all ranks alike.
        To be called on all ranks.

        Args:
            wait: until it is.

        Raises:
            KTOError: on all ranks, if the pending one could not be written.
        """
        ...


class Replicated:
    """Lightning's strategies in which every rank holds the whole model: one device, or DDP."""

    shard: Shard | None = None
    rounds_weights = False
    saves_in_background = False
    gather: Callable[[Tensor], Tensor | None] | None = None

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy

    def synchronize_gradients(self, *, last: bool) -> AbstractContextManager[None]:
        if last or not isinstance(self._strategy, ParallelStrategy):
            return nullcontext()
        return self._strategy.block_backward_sync()

    def gradient_norm(self, parameters: Iterable[nn.Parameter], clip_norm: float | None) -> Tensor:
        return gradient_norm(parameters, clip_norm)

    def drop_gradients(self, module: LightningModule) -> None:
        module.zero_grad(set_to_none=True)

    def finish_saving(self, *, wait: bool) -> bool:
        return True


@runtime_checkable
class MappingCheckpointIO(Protocol):
    """A Lightning `CheckpointIO` that can leave the tensors of a checkpoint in their file."""

    def map_checkpoint(self, path: Path) -> dict[str, Any]:
        """Load a file whose tensors are mapped into memory."""
        ...


def training_strategy(strategy: Strategy) -> TrainingStrategy:
    """The strategy of a trainer as `TrainingStrategy`."""
    return strategy if isinstance(strategy, TrainingStrategy) else Replicated(strategy)
