"""Small models of several families, with random weights: at least one for each route."""

from collections.abc import Callable
from typing import Any

import torch
from inputs import Shape
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

Settings = Callable[[Shape], dict[str, Any]]
"""What a family's config takes besides, or instead of, the dimensions that all have."""


def make_family(family: str, shape: Shape, **settings: Any) -> PreTrainedModel:
    """A model of a family (its `model_type`); `settings` are added to its config."""
    config = AutoConfig.for_model(family, **_common(shape) | FAMILIES[family](shape) | settings)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _common(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": None,
    }


def _head_width(shape: Shape) -> dict[str, Any]:
    return {"head_dim": shape.hidden_size // shape.num_heads}


def _alternating(shape: Shape, kind: str) -> dict[str, Any]:
    """Every second layer attends, and the others are of another kind."""
    return {"layer_types": ([kind, "full_attention"] * shape.num_layers)[: shape.num_layers]}


def _experts(shape: Shape) -> dict[str, Any]:
    return _head_width(shape) | {"num_local_experts": 4, "num_experts_per_tok": 2}


def _gated_delta_rule(shape: Shape) -> dict[str, Any]:
    width = shape.hidden_size // shape.num_heads
    return (
        _head_width(shape)
        | _alternating(shape, "linear_attention")
        | {
            "linear_num_key_heads": shape.num_kv_heads,
            "linear_num_value_heads": shape.num_heads,
            "linear_key_head_dim": width,
            "linear_value_head_dim": width,
        }
    )


def _mamba2(shape: Shape) -> dict[str, Any]:
    """The state-space layers of Granite and Falcon-H1, twice as wide as the model."""
    return {
        "mamba_n_heads": 2 * shape.num_heads,
        "mamba_d_head": shape.hidden_size // shape.num_heads,
        "mamba_d_state": 16,
        "mamba_chunk_size": 64,
    }


def _granite(shape: Shape) -> dict[str, Any]:
    return (
        _mamba2(shape)
        | _alternating(shape, "mamba")
        | {
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": shape.intermediate_size,
        }
    )


def _falcon_h1(shape: Shape) -> dict[str, Any]:
    return _mamba2(shape) | {"mamba_d_ssm": 2 * shape.hidden_size}


def _short_convolutions(shape: Shape) -> dict[str, Any]:
    return _alternating(shape, "conv") | {"block_auto_adjust_ff_dim": False}


def _jamba(shape: Shape) -> dict[str, Any]:
    return {
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    }


FAMILIES: dict[str, Settings] = {
    "qwen3": _head_width,
    "gemma2": _head_width,  # soft-capping
    "gpt_oss": _experts,  # sinks
    "qwen3_5_text": _gated_delta_rule,
    "granitemoehybrid": _granite,
    "falcon_h1": _falcon_h1,
    "lfm2": _short_convolutions,
    "mamba": lambda shape: {},
    "jamba": _jamba,
}
