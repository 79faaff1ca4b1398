"""Weights in a checkpoint: which are saved, and whether they fit a model."""

from typing import Any

import torch
from torch import Tensor, nn

from kto_lightning.errors import ConfigError
from kto_lightning.sharded_checkpoint import ShardedHeader


def drop_frozen(state: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """A module's state dict without its frozen parameters, which training does not change."""
    # A tied weight has one entry in the state per name.
    parameters = module.named_parameters(remove_duplicate=False)
    frozen = {name for name, p in parameters if not p.requires_grad}
    return {
        name: value
        for name, value in state.items()
        if name not in frozen and _quantized_weight(name) not in frozen
    }


def _quantized_weight(name: str) -> str | None:
    """The weight that a four-bit scale belongs to: `a.weight` of `a.weight.absmax`."""
    weight, dot, _ = name.rpartition(".weight.")
    return f"{weight}.weight" if dot else None


def _fits(value: Any, shape: torch.Size, *, sharded: bool) -> bool:
    """Whether it is a tensor of this shape whose values can be copied, or read if it is sharded."""
    return (
        isinstance(value, Tensor)
        and value.shape == shape
        and value.layout == torch.strided
        and (sharded or not value.is_meta)
    )


def check_weights_fit(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Check that a checkpoint is one of this model: loading would silently skip what does not fit.

    Raises:
        ConfigError: unless the checkpoint holds every trained weight of `module`, in its shape,
            and no other.
    """
    saved = checkpoint.get("state_dict")
    if not saved or not isinstance(saved, dict):
        raise ConfigError("the checkpoint holds no weights. Give another that `fit` wrote.")
    own = {name: weight.shape for name, weight in module.state_dict().items()}
    trained = [n for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad]
    wrong = [name for name in trained if name not in saved]
    sharded = isinstance(checkpoint, ShardedHeader)
    wrong += [n for n, v in saved.items() if n not in own or not _fits(v, own[n], sharded=sharded)]
    if not wrong:
        return
    origin = checkpoint.get("kto")
    origin = origin if isinstance(origin, dict) else {}
    raise ConfigError(
        f"the checkpoint does not hold the weights of this policy ({len(wrong)} do not fit, for "
        f"example {wrong[0]}). It was saved with --model.policy {origin.get('policy')} and "
        f"--model.lora {origin.get('lora')}: give the same."
    )
