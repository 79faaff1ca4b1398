"""A forward on a device that does not exist: shows tensors left on the CPU, and waiting.

    python -m tests.gpu.fake_device qwen2 lfm2

Tensors have shapes and a device and no data (`FakeTensorMode`). An operation on tensors of two
devices fails, and so does whatever reads a value, for which a real device would have to be waited
for. PyTorch's build for CPUs knows no CUDA tensors to index, so the device is one of a backend that
is registered here, for the whole process; bfloat16 weights take the variable-length kernel, as on a
GPU. Without a device there is no backward. Prints one line for each model; exit status 1 if one
failed.
"""

import argparse
import dataclasses
import functools
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

from kto_lightning.batches.types import StepBatch
from kto_lightning.models import attention
from kto_lightning.models.packed_run import CHECKPOINTING
from kto_lightning.models.policy import Policy
from kto_lightning.models.reference import FrozenReference
from kto_lightning.models.routes.choose import make_policy
from kto_lightning.training.metrics import BatchSums
from kto_lightning.training.scoring import BatchScorer
from tests.support.factories import add_adapter, make_model
from tests.support.steps import VOCABULARY, step_batch

DEVICE = torch.device("gpu:0")


class Backend(_DummyBackendModule):
    """What PyTorch asks of a backend's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def register_device() -> Callable[[Tensor], Tensor]:
    """Register the backend; the function that gives a tensor without data for another."""
    _setup_privateuseone_for_python_backend("gpu", Backend())  # pyright: ignore[reportArgumentType]
    torch.library.Library("_", "IMPL", "AutocastPrivateUse1").fallback(
        torch.library.fallthrough_kernel
    )
    mode.may_turn_const = lambda t: False  # constants would be moved with their data
    return fake


mode = FakeTensorMode()


def fake(tensor: Tensor) -> Tensor:
    """A tensor of the same shape on the device, in bfloat16 for a floating-point one."""
    dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
    with mode:
        return torch.empty(tensor.shape, dtype=dtype, device=DEVICE)
