"""Bytes of tensors that are alive, tracked by PyTorch's dispatcher, also for tensors without data.

Under `FakeTensorMode` a step of any size runs in seconds and in no memory, with the operations and
tensors of the real one.
"""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TrackedMemory(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        """Bytes of the storages made so far that are still there."""
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = {
            id(leaf.untyped_storage())
            for leaf in tree_leaves((args, kwargs or {}))
            if isinstance(leaf, torch.Tensor)
        }
        outputs = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage(), inputs)
        return outputs

    def _add(self, storage: Any, inputs: set[int]) -> None:
        key = storage._cdata
        if key in self._sizes or id(storage) in inputs:
            return
        size = storage.nbytes()
        self._sizes[key] = size
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.alive -= self._sizes.pop(key, 0)

    def reset_peak(self) -> None:
        """Let the peak begin anew at what is alive now."""
        self.peak = self.alive
