"""A model without the values of its parameters, to be sent to processes that do not read them.

The module that one process has loaded, adapted and probed is sent as it is, so that the others need
not repeat any of that: parameters are on the device `meta`, tied ones are one parameter as before,
and buffers (RoPE's frequencies, which no file holds) keep their values.
"""

import io
import pickle
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers.utils import output_capturing

from kto_lightning.errors import ModelError

_HOOKS_INSTALLED = "_output_capturing_hooks_installed"
"""A transformers model's mark that its hooks for router logits and the like are there."""


def dump_skeleton(module: Any) -> bytes:
    """A module, or a tuple with modules, as bytes without the values of parameters.

    Raises:
        ModelError: if it holds what cannot be sent, such as a function made by another.
    """
    stream = io.BytesIO()
    try:
        _SkeletonPickler(stream, protocol=5).dump(module)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ModelError(
            f"the model cannot be sent to the other ranks, among which it is to be sharded: "
            f"{error}. Use --trainer.strategy ddp, under which every rank loads it."
        ) from error
    return stream.getvalue()


def load_skeleton(data: bytes) -> Any:
    """What `dump_skeleton` was given, with parameters on the device `meta`."""
    loaded = pickle.loads(data)
    for root in loaded if isinstance(loaded, tuple) else (loaded,):
        for module in root.modules() if isinstance(root, nn.Module) else ():
            vars(module).pop(_HOOKS_INSTALLED, None)  # transformers then installs them
    return loaded


class _SkeletonPickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, nn.Parameter):
            return _empty_parameter, (obj.shape, obj.dtype, obj.requires_grad)
        from_capturing = getattr(obj, "__module__", None) == output_capturing.__name__
        if from_capturing and isinstance(obj, FunctionType) and "<locals>" in obj.__qualname__:
            return _restore_no_hook, ()
        return NotImplemented


def _no_hook(module: nn.Module, inputs: Any, output: Any) -> None:
    """In place of a hook of transformers that cannot be sent, and is installed again."""


def _empty_parameter(shape: torch.Size, dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
    value = torch.empty(shape, dtype=dtype, device="meta")
    return nn.Parameter(value, requires_grad=requires_grad)


def _restore_no_hook() -> Any:
    return _no_hook
