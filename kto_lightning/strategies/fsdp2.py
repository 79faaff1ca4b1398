"""FSDP2 (`--trainer.strategy fsdp2`): weights, gradients and optimizer state sharded over ranks.

Every layer is sharded by itself, and the rest of the policy (embeddings, norm, head) as one more
unit, so that a rank holds one whole layer at a time. A policy is called through `Policy.forward`
only, within which all weights are plain tensors. The frozen reference is sharded in the same way.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from itertools import chain
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

NAME = "fsdp2"
OFFLOAD_NAME = "fsdp2_offload"
# Inputs are not cast: FSDP2 would hand a layer a cast copy of its `PackedRun`, and the keys and
# values that the layer stores in the copy would be lost.
_HALF = MixedPrecisionPolicy(
    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
)


class FSDP2(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` over all ranks, with one whole file as a checkpoint.

    Lightning's own default sets the data-parallel size to the number of machines, so that gradients
    of the ranks of one machine are never reduced, and its checkpoints number the optimizer state in
    an order of their own. Here both are as in the other strategies: a run can be resumed with
    another strategy and another number of ranks.

    Args:
        offload: keep sharded parameters, gradients and optimizer state in host memory, and run the
            optimizer step there (FSDP2's `CPUOffloadPolicy`).
        timeout: how long a rank waits for another before it gives up.
    """

    rounds_weights = True

    def __init__(self, offload: bool = False, timeout: timedelta = timedelta(minutes=30)) -> None:
        # Offloaded gradients are reduced to a norm on the host, where NCCL has no collectives.
        backend = "cpu:gloo,cuda:nccl" if offload and torch.cuda.is_available() else None
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=backend,
            timeout=timeout,
        )
        self._offload = offload

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def model_to_device(self) -> None:
        """`shard` has put everything where it belongs; offloaded shards stay in host memory."""
        if not self._offload:
            super().model_to_device()

    def shard(self, policy: Policy) -> None:
        """Shard a policy that was just loaded, in place, over all ranks.

        Raises:
            ConfigError: if the mesh does not cover all ranks, whose gradients would differ.
        """
        mesh = self.device_mesh["data_parallel"]
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
            _HALF if half else MixedPrecisionPolicy(),
            CPUOffloadPolicy(pin_memory=on_gpu) if self._offload else OffloadPolicy(),
        )

    def synchronize_gradients(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients are reduced in every backward: as exact as once a step, and a rank never holds
        the unsharded gradient of more than one layer."""
        return nullcontext()

    def gradient_norm(self, parameters: Iterable[nn.Parameter], clip_norm: float | None) -> Tensor:
        return gradient_norm(parameters, clip_norm)

    def drop_gradients(self, module: LightningModule) -> None:
        module.zero_grad(set_to_none=True)

    def whole_state(self) -> dict[str, Any] | None:
        return self.lightning_module_state_dict()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained weights, unsharded, on rank 0; empty on the others."""
        module = self.lightning_module
        assert module is not None
        parameters = module.named_parameters(remove_duplicate=False)
        frozen = {name for name, p in parameters if not p.requires_grad}
        state = {k: v for k, v in module.state_dict().items() if k not in frozen}
        return self._whole(state)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's own state, unsharded, on rank 0; empty on the others."""
        return self._whole(optimizer.state_dict())

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        """Gather tensor by tensor, so that a device never holds more than one unsharded."""
        whole = {key: self._whole_value(value) for key, value in state.items()}
        return whole if self.is_global_zero else {}

    def _whole_value(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._whole_value(inner) for key, inner in value.items()}
        if isinstance(value, DTensor):
            gathered = value.full_tensor().detach()
            return gathered.cpu() if self.is_global_zero else None
        return value.detach().cpu() if isinstance(value, Tensor) else value

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the whole file; every rank copies its own shards out of it afterwards."""
        path = self.broadcast(checkpoint_path)
        return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        with torch.no_grad():
            for name, value in checkpoint["state_dict"].items():
                own[name].copy_(_part_of(value, own[name]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = list(chain(*(group["params"] for group in optimizer.param_groups)))
            parts = {
                index: {key: _part_of(value, parameters[index]) for key, value in one.items()}
                for index, one in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": parts})


def shard_policy(
    policy: Policy, mesh: DeviceMesh, precision: MixedPrecisionPolicy, offload: OffloadPolicy
) -> None:
    """Shard every layer by itself, then the rest (embeddings, norm, head) as one unit."""
    for unit in (*decoder_layers(policy), policy):
        fully_shard(unit, mesh=mesh, mp_policy=precision, offload_policy=offload)


def decoder_layers(policy: Policy) -> list[nn.Module]:
    """The layers of the language model: the outermost `ModuleList` with as many entries as its
    config has layers (a layer's list of experts may be as long)."""
    num_layers = policy.causal_lm.config.get_text_config().num_hidden_layers
    for module in policy.causal_lm.modules():  # parents come before their children
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return list(module)
    return []


def _part_of(value: Any, like: Tensor) -> Any:
    """This rank's shard of a whole tensor, laid out as `like`; anything else unchanged."""
    if not isinstance(value, Tensor) or not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    whole = value.to(like.device)
    # `src_data_rank=None`: every rank has read the whole file, so nothing is sent.
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


for _name, _offload in ((NAME, False), (OFFLOAD_NAME, True)):
    if _name not in StrategyRegistry.available_strategies():
        StrategyRegistry.register(
            _name, FSDP2, description="FSDP2 over all ranks", offload=_offload
        )
