"""Differences between model families: head, logit scale, router loss, learned positions."""

import sys
from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from kto_lightning.errors import ConfigError

_OPT_OFFSET = 2
"""Unused rows at the start of OPT's position table, in addition to one row per position."""

_LOGIT_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_FEED_FORWARD = {"mlp", "moe"}
"""Types of layers in which no token sees another."""


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
    for name in _LOGIT_FACTORS:
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


def decoder(model: PreTrainedModel) -> nn.Module:
    """What gives the last hidden state: a model without its head.

    transformers' `base_model` is the whole model where a class names another submodule than it
    has, as those of Llama 4 and of Mllama's text model do. There it is the outermost model with
    the input embeddings and without the head.
    """
    head, found = model.get_output_embeddings(), model.base_model
    if found is not model:
        return found
    without_head = (
        m for m in _models_of_text(model) if all(inner is not head for inner in m.modules())
    )
    return next(without_head, model)


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that reads text: all of it, but for those of several modalities."""
    if model.config.get_text_config() is model.config:
        return model
    return list(_models_of_text(model))[-1]


def attending_part(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model whose attention is exchanged: all of it, or where a vision tower's cannot
    be, the language model."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if all(part._can_set_attn_implementation() for part in parts):
        return model
    return language_model(model)


def attention_of(config: PreTrainedConfig) -> str | dict[str, Any]:
    """The attention of a model as `set_attn_implementation` takes it: a name, or where parts have
    configs of their own, one for each."""
    own = config._attn_implementation or "eager"
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    parts = {key: attention_of(part) for key, part in parts.items() if part is not None}
    return {"": own, **parts} if parts else own


def _models_of_text(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The models within a model that have its input embeddings; outermost first, itself."""
    embeddings = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and any(m is embeddings for m in module.modules()):
            yield module


def logit_settings(config: PreTrainedConfig) -> str:
    """The factors and the capping of the logits, as the config has them."""
    names = (*_LOGIT_FACTORS, "logits_scaling", "final_logit_softcapping")
    values = {name: getattr(config, name, None) for name in names}
    return ", ".join(f"{name} {v:g}" for name, v in values.items() if v not in (None, 1))


def auxiliary_coefficient(model: PreTrainedModel) -> float:
    """The config's factor on a Mixture of Experts' load-balancing loss; 0 for models that have none
    in transformers, some of which have the setting (Llama 4)."""
    config = model.config.get_text_config()
    has_loss = hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")
    if not has_loss or not hasattr(config, "output_router_logits"):
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0)


def num_experts(config: PreTrainedConfig) -> int:
    """Experts per layer of a Mixture of Experts, under each family's name for it."""
    name = "num_experts" if hasattr(config, "num_experts") else "num_local_experts"
    return getattr(config, name)


def mixing_layer_types(config: PreTrainedConfig) -> list[str] | None:
    """The types of the layers that mix tokens, each layer's; None where all are of one type.

    Nemotron-H counts its feed-forward networks as layers of their own.
    """
    types = getattr(config, "layer_types", None)
    return [kind for kind in types if kind not in _FEED_FORWARD] if types else None


def num_mixing_layers(config: PreTrainedConfig) -> int:
    """How many layers mix the tokens of a text; Mllama's cross-attention has images only."""
    types = mixing_layer_types(config)
    of_images = getattr(config, "cross_attention_layers", None) or ()
    return (config.num_hidden_layers if types is None else len(types)) - len(of_images)


def num_positions(model: PreTrainedModel) -> int | None:
    """The length of a table of learned position embeddings (GPT-2, OPT, GPT-Neo).

    None for models without such a table, which compute the embedding of any position.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    tokens = model.get_input_embeddings()
    tables = [
        m
        for m in language_model(model).modules()
        if isinstance(m, nn.Embedding) and m is not tokens
    ]
    is_table = any(table.num_embeddings in (limit, limit + _OPT_OFFSET) for table in tables)
    return limit if is_table else None


def check_positions(model: PreTrainedModel, name: str, longest: int | None) -> None:
    """Check, before training, that a model has a position for every token of every sequence.

    Args:
        model: the policy.
        name: the name it was loaded by.
        longest: most tokens of a sequence; None: unlimited.

    Raises:
        ConfigError: if sequences can be longer than the table, or than what a model attends to
            causally; names the `max_length` to set.
    """
    found = "sequences of any length" if longest is None else f"sequences of up to {longest} tokens"
    known = num_positions(model)
    if known is not None and (longest is None or longest > known):
        raise ConfigError(
            f"{name} has {known} positions, fewer than {found} need. Set --data.max_length {known}."
        )
    # Of more keys Doge keeps the best of the whole sequence, those after a token among them.
    window = getattr(model.config.get_text_config(), "keep_window_size", None)
    if window is not None and (longest is None or longest > window):
        raise ConfigError(
            f"{name} attends causally to {window} tokens only, its keep_window_size, fewer than "
            f"{found} have. Set --data.max_length {window}."
        )
