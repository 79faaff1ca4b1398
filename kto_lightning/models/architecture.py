"""What a language model head multiplies with: its weight at this moment, its bias, its scale."""

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from kto_lightning.errors import ConfigError

_OPT_OFFSET = 2
"""Rows that OPT's tables begin with and no position has."""


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


def auxiliary_coefficient(config: PreTrainedConfig) -> float:
    """A Mixture of Experts' own factor on its load-balancing loss; 0 for other models."""
    if not hasattr(config, "output_router_logits"):
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0)


def num_experts(config: Any) -> int:
    return config.num_experts if hasattr(config, "num_experts") else config.num_local_experts


def num_positions(model: PreTrainedModel) -> int | None:
    """The length of a model's table of learned positions (GPT-2, OPT, GPT-Neo); None: it has none,
    and computes whatever position it is asked for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    tokens = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    is_table = any(table.num_embeddings in (limit, limit + _OPT_OFFSET) for table in tables)
    return limit if is_table else None


def check_positions(model: PreTrainedModel, name: str, longest: int | None) -> None:
    """Refuse sequences that a model has no positions for, before the first of them comes.

    Args:
        model: the policy.
        name: what it was loaded by.
        longest: tokens that a sequence may have; None: any number.

    Raises:
        ConfigError: with the length to set.
    """
    known = num_positions(model)
    if known is None or (longest is not None and longest <= known):
        return
    found = "sequences of any length" if longest is None else f"sequences of up to {longest} tokens"
    raise ConfigError(
        f"{name} has {known} positions, and {found} would be given to it. Set --data.max_length "
        f"{known}."
    )
