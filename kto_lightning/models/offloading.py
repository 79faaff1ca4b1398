"""What backward needs of the activations, kept in the host's memory in between.

As `torch.autograd.graph.save_on_cpu`, which would take every weight along: a linear layer keeps its
weight for backward too, and under autocast a copy of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

MIN_BYTES = 2**18
"""Smaller tensors stay: some ten microseconds on a bus, about what it takes a copy to begin."""


@dataclass(slots=True)
class _Waiting:
    """A tensor in the host's memory, and how it lay on the device."""

    host: Tensor
    stride: tuple[int, ...]
    device: torch.device


class OffloadedActivations(saved_tensors_hooks):
    """A context for a forward: its large activations wait for backward in the host's memory.

    Everything runs on one stream of the device, so that a copy there has ended before its memory is
    used again. A tensor that several operations keep is copied once.

    Args:
        parameters: of the model; what has the shape of a weight, or of its transpose, stays.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        shapes = {tuple(p.shape) for p in parameters if p.ndim > 1}
        shapes |= {shape[1:] for shape in shapes if len(shape) > 2}  # one expert's of many
        self._weights = shapes | {(*shape[:-2], shape[-1], shape[-2]) for shape in shapes}
        # The storage is held weakly: so long as it is, no other can be taken for it.
        self._copies: dict[tuple, tuple[StorageWeakRef, _Waiting]] = {}
        super().__init__(self._to_host, _from_host)

    def _to_host(self, tensor: Tensor) -> Tensor | _Waiting:
        if _is_on_host(tensor) or tensor.nbytes < MIN_BYTES or tuple(tensor.shape) in self._weights:
            return tensor
        if 0 in tensor.stride():
            return tensor  # expanded: it takes less memory than its copy would
        storage = StorageWeakRef(tensor.untyped_storage())
        key = (storage.cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._copies:
            host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            host.copy_(tensor, non_blocking=True)
            self._copies[key] = storage, _Waiting(host, tensor.stride(), tensor.device)
        return self._copies[key][1]


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _from_host(packed: Tensor | _Waiting) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    # A product of the same numbers laid out otherwise may differ in its last bits.
    tensor = torch.empty_strided(
        packed.host.shape, packed.stride, dtype=packed.host.dtype, device=packed.device
    )
    return tensor.copy_(packed.host, non_blocking=True)
