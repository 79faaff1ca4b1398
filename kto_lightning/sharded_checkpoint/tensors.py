"""Tensors of a checkpoint dict by their names: their paths in it, joined by dots."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def map_tensors(value: Any, change: Callable[[str, Tensor], Any], name: str = "") -> Any:
    """A copy of a checkpoint's value with `change(name, tensor)` in place of each tensor."""
    if isinstance(value, Mapping):
        return {key: map_tensors(one, change, f"{name}{key}.") for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(
            map_tensors(one, change, f"{name}{index}.") for index, one in enumerate(value)
        )
    return change(name[:-1], value) if isinstance(value, Tensor) else value
