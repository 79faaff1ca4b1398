"""Activation offloading: tensors saved for backward stay in host memory between the passes.

`torch.autograd.graph.save_on_cpu` would move every weight too: a linear layer saves its weight for
backward, and under autocast a copy of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

MIN_BYTES = 2**18
"""Smaller tensors stay on the device: 256 KiB take about 10 µs on a PCIe bus, as long as starting
the copy."""


@dataclass(slots=True)
class _HostCopy:
    """A tensor in host memory, with its original stride and device."""

    host: Tensor
    stride: tuple[int, ...]
    device: torch.device


class OffloadedActivations(saved_tensors_hooks):
    """A context for a forward that moves large activations to host memory until backward.

    Copies run on the device's current stream, so that a copy has ended before the memory that it
    reads is used again. A tensor that several operations save is copied once.

    Args:
        parameters: the model's. Tensors with the shape of a weight, or of its transpose, stay on
            the device.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        shapes = {tuple(p.shape) for p in parameters if p.ndim > 1}
        shapes |= {shape[1:] for shape in shapes if len(shape) > 2}  # of one expert
        self._weights = shapes | {(*shape[:-2], shape[-1], shape[-2]) for shape in shapes}
        # The weak reference keeps a storage's id from being reused, but not its memory alive.
        self._copies: dict[tuple, tuple[StorageWeakRef, _HostCopy]] = {}
        super().__init__(self._to_host, _from_host)

    def _to_host(self, tensor: Tensor) -> Tensor | _HostCopy:
        if _is_on_host(tensor) or tensor.nbytes < MIN_BYTES or tuple(tensor.shape) in self._weights:
            return tensor
        if 0 in tensor.stride():
            return tensor  # expanded: its copy would take more memory than the tensor does
        storage = StorageWeakRef(tensor.untyped_storage())
        key = (storage.cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._copies:
            host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            host.copy_(tensor, non_blocking=True)
            self._copies[key] = storage, _HostCopy(host, tensor.stride(), tensor.device)
        return self._copies[key][1]


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _from_host(packed: Tensor | _HostCopy) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    # The original strides: with others a matrix product may differ in its last bits.
    tensor = torch.empty_strided(
        packed.host.shape, packed.stride, dtype=packed.host.dtype, device=packed.device
    )
    return tensor.copy_(packed.host, non_blocking=True)
