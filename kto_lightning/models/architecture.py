"""What a language model head multiplies with: its weight at this moment, its bias, its scale."""

from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig


def effective_head(head: Any) -> tuple[Tensor, Tensor | None]:
    """The weight `[V, D]` and bias a language model head multiplies with at this moment.

    A LoRA layer's weight is its base plus the deltas of the adapters that are switched on, so that
    an adapter on the head is trained like any other (arXiv:2106.09685, eq. 3). Switched off, the
    base keeps the precision of that sum: what the adapter adds is then all that differs.
    """
    if not hasattr(head, "get_delta_weight"):
        weight, bias = head.weight, getattr(head, "bias", None)
    else:
        base = head.get_base_layer()
        dtypes = (parameter.dtype for parameter in head.parameters())
        weight, bias = base.weight.to(reduce(torch.promote_types, dtypes)), base.bias
        if not head.disable_adapters and not head.merged:
            for adapter in head.active_adapters:
                weight = weight + head.get_delta_weight(adapter)
    return _whole(weight), None if bias is None else _whole(bias)


def _whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def logit_scale(config: PreTrainedConfig) -> float:
    """The factor on the logits, by each family's name for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # HyperCLOVA X multiplies by what Granite and MiniCPM divide by.
    return float(scaling if config.model_type == "hyperclovax" else 1 / scaling)
