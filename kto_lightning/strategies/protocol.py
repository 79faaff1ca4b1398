"""What a training step and an export need from a Lightning strategy."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

from lightning import LightningModule
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor, nn

from kto_lightning.distributed import gradient_norm
from kto_lightning.models.policy import Policy


@runtime_checkable
class TrainingStrategy(Protocol):
    """Gradients, sharding and whole weights of a strategy. `FSDP2` implements it itself;
    `Replicated` does so for Lightning's own strategies."""

    shard: Callable[[Policy], None] | None
    """Shards a policy over all ranks, in place; None: every rank holds all of it."""
    rounds_weights: bool
    """Whether mixed precision rounds the weights, where autocast rounds the inputs of products."""

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

    def whole_state(self) -> dict[str, Tensor] | None:
        """The trained weights, unsharded, on rank 0; empty on the others; None: nothing is sharded,
        and the module itself holds them. To be called on all ranks."""
        ...


class Replicated:
    """Lightning's strategies in which every rank holds the whole model: one device, or DDP."""

    shard: Callable[[Policy], None] | None = None
    rounds_weights = False

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

    def whole_state(self) -> dict[str, Tensor] | None:
        return None


def training_strategy(strategy: Strategy) -> TrainingStrategy:
    """The strategy of a trainer as `TrainingStrategy`."""
    return strategy if isinstance(strategy, TrainingStrategy) else Replicated(strategy)
