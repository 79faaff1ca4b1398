"""Differences between model families: head, logit scale, router loss, learned positions."""

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from kto_lightning.errors import ConfigError

_OPT_OFFSET = 2
"""Unused rows at the start of OPT's position table, in addition to one row per position."""


# `Any`: a linear layer or peft's LoRA layer around one, which share no typed base class.
def effective_head(head: Any) -> tuple[Tensor, Tensor | None]:
    """The weight `[V, D]` and bias `[V]` that a language model head currently multiplies with.

    A LoRA layer's weight is its base weight plus the updates of its active adapters, as a tensor
    that autograd follows, so that an adapter on the head is trained like any other
    (arXiv:2106.09685, eq. 3). With the adapters disabled the base weight is still cast to the
    dtype of that sum, so that the log-probs of policy and reference differ by the update alone.
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
    return _full_tensor(weight), None if bias is None else _full_tensor(bias)


def _full_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def logit_scale(config: PreTrainedConfig) -> float:
    """The factor on the logits, under each family's name for it; 1 if there is none."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # HyperCLOVA X multiplies by the value; Granite and MiniCPM divide by it.
    return float(scaling if config.model_type == "hyperclovax" else 1 / scaling)


def logit_softcap(config: PreTrainedConfig) -> float | None:
    """The final soft-capping of the logits (Gemma-2); None: they are not capped."""
    return getattr(config, "final_logit_softcapping", None)


def auxiliary_coefficient(config: PreTrainedConfig) -> float:
    """The config's factor on a Mixture of Experts' load-balancing loss; 0 for other models."""
    if not hasattr(config, "output_router_logits"):
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0)


def num_experts(config: PreTrainedConfig) -> int:
    """Experts per layer of a Mixture of Experts, under each family's name for it."""
    name = "num_experts" if hasattr(config, "num_experts") else "num_local_experts"
    return getattr(config, name)


def num_positions(model: PreTrainedModel) -> int | None:
    """The length of a table of learned position embeddings (GPT-2, OPT, GPT-Neo).

    None for models without such a table, which compute the embedding of any position.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    tokens = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    is_table = any(table.num_embeddings in (limit, limit + _OPT_OFFSET) for table in tables)
    return limit if is_table else None


def check_positions(model: PreTrainedModel, name: str, longest: int | None) -> None:
    """Check, before training, that a model has a position for every token of every sequence.

    Args:
        model: the policy.
        name: the name it was loaded by.
        longest: most tokens of a sequence; None: unlimited.

    Raises:
        ConfigError: if sequences can be longer than the table; names the `max_length` to set.
    """
    known = num_positions(model)
    if known is None or (longest is not None and longest <= known):
        return
    found = "sequences of any length" if longest is None else f"sequences of up to {longest} tokens"
    raise ConfigError(
        f"{name} has {known} positions, fewer than {found} need. Set --data.max_length {known}."
    )
