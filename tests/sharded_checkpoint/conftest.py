"""A process group of one rank, and a checkpoint that is sharded over it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(tensor: Tensor) -> DTensor:
    return distribute_tensor(tensor, init_device_mesh("cpu", (1,)), [Shard(0)])


def make_checkpoint(seed: int = 0) -> dict[str, Any]:
    """A checkpoint as FSDP2 gives it: sharded weights and optimizer state, plain other values."""
    torch.manual_seed(seed)
    state = {"step": torch.tensor(3.0), "exp_avg": sharded(torch.randn(5, 7).bfloat16())}
    return {
        "state_dict": {
            "policy.a.weight": sharded(torch.randn(5, 7)),
            "policy.b.bias": sharded(torch.randn(3)),
            "policy.buffer": torch.arange(4),
        },
        "optimizer_states": [{"state": {0: state}, "param_groups": [{"betas": (0.9, 0.999)}]}],
        "callbacks": {"EarlyStopping": {"best_score": torch.tensor(0.5)}},
        "kto": {"beta": 0.1},
        "global_step": 3,
    }


def whole(value: Any) -> Any:
    """A checkpoint with its sharded tensors as plain ones."""
    if isinstance(value, dict):
        return {key: whole(one) for key, one in value.items()}
    if isinstance(value, list):
        return [whole(one) for one in value]
    return value.full_tensor() if isinstance(value, DTensor) else value
