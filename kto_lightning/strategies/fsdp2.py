"""FSDP2 (`--trainer.strategy fsdp2`): weights, gradients and optimizer state in parts, one a rank.

Every layer is sharded by itself and what is left with the policy as a whole, so that a rank holds
one whole layer at a time. A policy is called through `Policy.forward` alone, within which all
weights are plain tensors. The frozen reference is sharded in the same way.
"""

from collections.abc import Mapping
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from kto_lightning.errors import ConfigError
from kto_lightning.models.policy import Policy

NAME = "fsdp2"
# Inputs are left alone: to cast what is in a `PackedRun`, a copy of it would be handed to a layer,
# in which nothing that the layer keeps is found again.
_HALF = MixedPrecisionPolicy(
    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
)


class FSDP2(ModelParallelStrategy):
    """Lightning's strategy, over all ranks and with checkpoints like those of any other.

    As it comes, it takes its data-parallel size for the number of machines, and gradients of the
    ranks of one machine are never added up. Its checkpoints number the optimizer's state in another
    order than an optimizer does. Here both are as elsewhere: a run can go on with another strategy
    and another number of ranks.

    Args:
        timeout: after which a rank that waits for another gives up.
    """

    def __init__(self, timeout: timedelta = timedelta(minutes=30)) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)

    rounds_weights = True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, policy: Policy) -> None:
        """Shard a policy that was just loaded, in place, over all ranks.

        Raises:
            ConfigError: if that would leave ranks with gradients of their own.
        """
        mesh = self.device_mesh["data_parallel"]
        if mesh.size() != self.world_size:
            raise ConfigError(
                f"FSDP2 shards over {mesh.size()} of {self.world_size} ranks, so that gradients "
                f"would not be added up over all. Use --trainer.strategy {NAME}."
            )
        half = self.precision_plugin.precision == "bf16-mixed"
        shard_policy(policy, mesh, _HALF if half else MixedPrecisionPolicy())

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained, whole, on the first rank; nothing on the others."""
        module = self.lightning_module
        assert module is not None
        parameters = module.named_parameters(remove_duplicate=False)
        frozen = {name for name, p in parameters if not p.requires_grad}
        state = {k: v for k, v in module.state_dict().items() if k not in frozen}
        return self._whole(state)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's own state with whole tensors, on the first rank; nothing on others."""
        return self._whole(optimizer.state_dict())

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        """Gathered tensor by tensor, so that a device never holds more than one."""
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
        """The file as it is; every rank takes its part of it below."""
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


def shard_policy(policy: Policy, mesh: DeviceMesh, precision: MixedPrecisionPolicy) -> None:
    """Shard every layer by itself, then what is left (embeddings, norm, head) as one.

    Gradients are reduced in every backward, not in a step's last alone: as exact, and a rank never
    holds a whole layer's.
    """
    for layer in decoder_layers(policy):
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)


def decoder_layers(policy: Policy) -> list[nn.Module]:
    """The layers of the language model: of all lists as long as its config has layers, the first
    that the others (a layer's experts) are not around."""
    num_layers = policy.causal_lm.config.get_text_config().num_hidden_layers
    for module in policy.causal_lm.modules():  # from the outside in
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return list(module)
    return []


def _part_of(value: Any, like: Tensor) -> Any:
    """This rank's part of a whole tensor that is shaped like a sharded one; anything else as is."""
    if not isinstance(value, Tensor) or not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    whole = value.to(like.device)
    # Every rank has read the whole: none has to send it.
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


if NAME not in StrategyRegistry.available_strategies():
    StrategyRegistry.register(NAME, FSDP2, description="FSDP2 over all ranks")
