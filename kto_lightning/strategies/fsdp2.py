"""FSDP2 (`--trainer.strategy fsdp2`): weights, gradients and optimizer state sharded over ranks.

Every layer is sharded by itself, and the rest of the policy (embeddings, norm, head) as one more
unit, so that a rank holds one whole layer at a time. A policy is called through `Policy.forward`
only, within which all weights are plain tensors. The frozen reference is sharded in the same way.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from kto_lightning.distributed import gradient_norm
from kto_lightning.errors import ConfigError
from kto_lightning.models.policy import Policy
from kto_lightning.models.sharding import ShardOf, fill_shards
from kto_lightning.models.units import sharded_units
from kto_lightning.sharded_checkpoint import (
    CheckpointWriter,
    ShardedHeader,
    read_header,
    read_tensors,
    verify_directory,
)
from kto_lightning.strategies.protocol import MappingCheckpointIO
from kto_lightning.strategies.replicas import check_replicas

NAME = "fsdp2"
OFFLOAD_NAME = "fsdp2_offload"
HYBRID_NAME = "fsdp2_hybrid"
HYBRID_OFFLOAD_NAME = "fsdp2_hybrid_offload"
# Inputs are not cast: some models pass float32 sums from layer to layer, such as Mamba with its
# `residual_in_fp32`, which every layer would round.
HALF = MixedPrecisionPolicy(
    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
)


class FSDP2(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` over all ranks, with checkpoints of our own.

    Lightning's own default sets the data-parallel size to the number of machines, so that gradients
    of the ranks of one machine are never reduced, and its checkpoints number the optimizer state in
    an order of their own. Here both are as in the other strategies: a run can be resumed with
    another strategy and another number of ranks. A checkpoint is a directory (`sharded_checkpoint`)
    to which every rank writes its shards; a rank never holds more than those and one whole tensor.

    Args:
        offload: keep sharded parameters, gradients and optimizer state in host memory, and run the
            optimizer step there (FSDP2's `CPUOffloadPolicy`).
        timeout: how long a rank waits for another before it gives up.
        replicas: groups of consecutive ranks that hold a whole model each, sharded within the group
            (hybrid sharding); 1: all ranks are one group; null: one group per machine.
    """

    rounds_weights = True
    saves_in_background = True

    def __init__(
        self,
        offload: bool = False,
        timeout: timedelta = timedelta(minutes=30),
        replicas: int | None = 1,
    ) -> None:
        # Offloaded gradients are reduced to a norm on the host, where NCCL has no collectives.
        backend = "cpu:gloo,cuda:nccl" if offload and torch.cuda.is_available() else None
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=backend,
            timeout=timeout,
        )
        self._offload, self._replicas = offload, replicas
        self._writer = CheckpointWriter(timeout)

    @property
    def offloads(self) -> bool:
        """Whether shards and the optimizer step are in host memory."""
        return self._offload

    @property
    def num_replicas(self) -> int:
        """Groups of ranks that hold a whole model each."""
        return self.num_nodes if self._replicas is None else self._replicas

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        """Make Lightning's device mesh: all ranks in its first dimension, or, with replicas, these
        in its first and the shards of each in its second.

        Raises:
            ConfigError: if the ranks cannot be divided so.
        """
        num_ranks = self.num_nodes * self.num_processes
        check_replicas(self._replicas, num_nodes=self.num_nodes, num_ranks=num_ranks)
        first = self.num_replicas if self.num_replicas > 1 else num_ranks
        self._data_parallel_size = first
        self._tensor_parallel_size = num_ranks // first
        super().setup_environment()

    def model_to_device(self) -> None:
        """`shard` has put everything where it belongs; offloaded shards stay in host memory."""
        if not self._offload:
            super().model_to_device()

    def shard(self, policy: Policy, shard_of: ShardOf) -> None:
        """Shard a policy over all ranks, see `Shard`.

        Raises:
            ConfigError: if the mesh does not cover all ranks, whose gradients would differ.
        """
        mesh = self._sharding_mesh
        if mesh.size() != self.world_size:
            raise ConfigError(
                f"FSDP2 shards over {mesh.size()} of {self.world_size} ranks, so that gradients "
                f"would not be reduced over all. Use --trainer.strategy {NAME}."
            )
        half = self.precision_plugin.precision == "bf16-mixed"
        on_gpu = self.root_device.type == "cuda"
        shard_policy(
            policy,
            mesh,
            HALF if half else MixedPrecisionPolicy(),
            CPUOffloadPolicy(pin_memory=on_gpu) if self._offload else OffloadPolicy(),
        )
        fill_shards(policy, shard_of, on_host=self._offload)

    @property
    def _sharding_mesh(self) -> DeviceMesh:
        """`[shards]`, or `[replicas, shards]`, as `fully_shard` takes it."""
        return self.device_mesh if self.num_replicas > 1 else self.device_mesh["data_parallel"]

    def synchronize_gradients(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients are reduced in every backward: as exact as once a step, and a rank never holds
        the unsharded gradient of more than one layer."""
        return nullcontext()

    def gradient_norm(self, parameters: Iterable[nn.Parameter], clip_norm: float | None) -> Tensor:
        return gradient_norm(parameters, clip_norm)

    def drop_gradients(self, module: LightningModule) -> None:
        module.zero_grad(set_to_none=True)

    def gather(self, tensor: Tensor) -> Tensor | None:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return whole.detach().cpu() if self.is_global_zero else None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state, of which every rank has its shards."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's own state, of which every rank has its shards."""
        return optimizer.state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write a directory, every rank its shards.

        Args:
            storage_options: `{"background": True}`: write it beside the steps that follow.

        Raises:
            KTOError: on all ranks, if it or the one before cannot be written.
        """
        background = storage_options is not None and storage_options["background"]
        path = Path(self.broadcast(filepath))
        self._writer.write(checkpoint, path, background=background)

    def finish_saving(self, *, wait: bool) -> bool:
        return self._writer.finish(wait=wait)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The header of a directory, all of whose files are verified, or a file whose tensors are
        mapped into memory; every rank reads its own shards afterwards."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            verify_directory(path, together=True)
            return read_header(path)
        if isinstance(self.checkpoint_io, MappingCheckpointIO):
            return self.checkpoint_io.map_checkpoint(path)
        return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        _fill(checkpoint, {("state_dict", name): own[name] for name in checkpoint["state_dict"]})

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Lay the state of every parameter out as the parameter itself."""
        states = checkpoint["optimizer_states"]
        for number, (optimizer, state) in enumerate(zip(self.optimizers, states, strict=True)):
            parameters = list(chain(*(group["params"] for group in optimizer.param_groups)))
            own = {
                index: {key: _empty_part(value, parameters[index]) for key, value in one.items()}
                for index, one in state["state"].items()
            }
            parts = {
                ("optimizer_states", number, "state", index, key): value
                for index, one in own.items()
                for key, value in one.items()
                if isinstance(value, DTensor)
            }
            _fill(checkpoint, parts)
            optimizer.load_state_dict({**state, "state": own})


def shard_policy(
    policy: Policy, mesh: DeviceMesh, precision: MixedPrecisionPolicy, offload: OffloadPolicy
) -> None:
    """Shard every unit of `sharded_units` by itself."""
    for unit in sharded_units(policy):
        fully_shard(unit, mesh=mesh, mp_policy=precision, offload_policy=offload)
    # From torch 2.13 on.
    reduce_unused: Any = getattr(policy, "set_reduce_scatter_unused_params", None)
    if reduce_unused is not None:
        # Whether a parameter gets a gradient may depend on the rank's examples.
        reduce_unused(True)


def _empty_part(value: Any, parameter: Tensor) -> Any:
    """An empty tensor laid out as a parameter for a state of its shape; any other state unchanged.

    The shape of a sharded state, which is on `meta`, is compared when it is read.
    """
    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor):
        return value
    if value.shape != parameter.shape and not value.is_meta:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)


@torch.no_grad()
def _fill(checkpoint: Mapping[str, Any], own: Mapping[tuple[Any, ...], Tensor]) -> None:
    """Copy values from a checkpoint, shard by shard.

    Args:
        checkpoint: a header, whose values are read from disk, or the whole checkpoint.
        own: this rank's tensors by their path in the checkpoint.
    """
    if isinstance(checkpoint, ShardedHeader):
        named = {".".join(map(str, path)): tensor for path, tensor in own.items()}
        read_tensors(checkpoint.path, named)
        return
    for path, tensor in own.items():
        value: Any = checkpoint
        for key in path:
            value = value[key]
        if isinstance(tensor, DTensor):
            # `src_data_rank=None`: every rank has the whole file, so nothing is sent.
            layout = tensor.device_mesh, tensor.placements
            value = distribute_tensor(value.to(tensor.device), *layout, src_data_rank=None)
        tensor.copy_(value)


for _name, _settings in {
    NAME: {"offload": False},
    OFFLOAD_NAME: {"offload": True},
    HYBRID_NAME: {"offload": False, "replicas": None},
    HYBRID_OFFLOAD_NAME: {"offload": True, "replicas": None},
}.items():
    if _name not in StrategyRegistry.available_strategies():
        StrategyRegistry.register(_name, FSDP2, description="FSDP2", **_settings)
