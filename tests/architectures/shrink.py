"""Tiny configurations of any model class: the default one, with fields of known names made small.

Depth is chosen so that every kind of layer that the default configuration has occurs once.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

VOCABULARY = 320
HIDDEN, HEADS, KEY_VALUE_HEADS, HEAD_DIM, FEED_FORWARD, EXPERT = 64, 4, 2, 16, 96, 32
POSITIONS = 512
WINDOW = 32
"""Of attention windows, chunks and blocks: shorter than the checks' longest sequence."""
PAD_ID, EOS_ID, BOS_ID = 0, 1, 2
_STANDARD_DEVIATION = 0.2
"""Of weights: attention is then far from uniform, and distributions are peaked."""

_NAMES = [
    (
        VOCABULARY,
        "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size",
    ),
    (
        HIDDEN,
        "hidden_size n_embd d_model dim embed_dim embedding_size encoder_hidden_size "
        "text_hidden_size projection_dim out_hidden_size projector_hidden_size "
        "word_embed_proj_dim hidden_size_global vision_output_dim projector_input_dim "
        "projector_output_dim image_text_hidden_size backbone_hidden_size vision_hidden_size "
        "projection_hidden_size d_embed input_embedding_size output_embedding_size "
        "merged_hidden_size attention_hidden_size image_token_embed_dim decoder_hidden_size "
        "moe_hidden_size embedding_dim dim_model_base lru_width "
        "adapter_in_dim adapter_out_dim adapter_input_size",
    ),
    (
        FEED_FORWARD,
        "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim "
        "ffn_hidden_size dim_ff dff mlp_dim intermediate_size_mlp dense_intermediate_size "
        "projection_intermediate_size alignment_intermediate_size",
    ),
    (
        EXPERT,
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
        "shared_experts_intermediate_size expert_ffn_hidden_size share_expert_dim "
        "moe_shared_expert_intermediate_size codebook_size audio_vocab_size max_img_size",
    ),
    (
        HEADS,
        "num_attention_heads n_head num_heads n_heads encoder_attention_heads "
        "decoder_attention_heads attention_heads num_encoder_attention_heads "
        "num_decoder_attention_heads swa_num_attention_heads num_sliding_attention_heads "
        "conf_num_attention_heads linear_num_value_heads linear_num_heads",
    ),
    (
        KEY_VALUE_HEADS,
        "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_query_groups "
        "linear_num_key_heads",
    ),
    (
        HEAD_DIM,
        "head_dim swa_head_dim kv_channels attention_head_dim dim_head kv_lora_rank "
        "qk_nope_head_dim v_head_dim o_lora_rank index_head_dim codebook_dim "
        "query_pre_attn_scalar mamba_d_head mamba_head_dim mamba_headdim mamba_chunk_size "
        "chunk_size",
    ),
    (
        POSITIONS,
        "max_position_embeddings n_positions max_seq_len n_ctx model_max_length "
        "max_target_positions max_source_positions context_length max_sequence_length "
        "original_max_position_embeddings",
    ),
    (
        WINDOW,
        "sliding_window window_size attention_window_size local_attention sliding_window_size "
        "attention_chunk_size index_topk",
    ),
    # Of few heads an indexer's scores, sums of rectified products, are often all 0, and which of
    # equal keys it keeps depends on how many there are.
    (32, "index_n_heads"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_top_k moe_topk moe_k num_experts_per_token"),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts zero_expert_num"),
    (2, "n_group o_groups"),
    (1, "topk_group num_expert_group"),
    (24, "q_lora_rank qk_head_dim"),
    (8, "qk_rope_head_dim rotary_dim block_size linear_key_head_dim linear_value_head_dim"),
    (8, "linear_head_dim hidden_size_per_layer_input laurel_rank adapter_rank"),
    (8, "mamba_d_state mamba_n_heads state_size ssm_state_size mamba_num_heads"),
    (4, "linear_conv_kernel_dim mamba_dt_rank time_step_rank conv1d_width"),
    (1, "mamba_n_groups mamba_ngroups n_groups conf_num_hidden_layers"),
    (2, "n_mamba_heads encoder_layers decoder_layers num_encoder_layers num_decoder_layers"),
    (128, "mamba_d_ssm"),
    (64, "num_position_embeddings"),
    (0, "num_nextn_predict_layers num_kv_shared_layers max_window_layers"),
]
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")
_SIZES = {name: size for size, names in _NAMES for name in names.split()}
_SIZES |= dict.fromkeys(_DEPTHS, 2)

_KINDS = """
layer_types mlp_layer_types layers_block_type block_types no_rope_layers indexer_types
activation_sparsity_pattern layer_rope_theta attention_layers swiglu_limits
"""
_PER_LAYER = {
    **dict.fromkeys(_KINDS.split()),
    "intermediate_size": FEED_FORWARD,
    "num_attention_heads": HEADS,
    "num_attention_heads_per_layer": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
}
"""Fields that are lists of one value a layer, and that value; None: the default's."""
_MOST_KINDS_OF_LAYERS = 5
_SPECIAL = {"pad_token_id": PAD_ID, "eos_token_id": EOS_ID, "bos_token_id": BOS_ID}
_DEVIATIONS = ("initializer_range", "init_std")
_LEFT_ALONE = {"per_layer_config", "id2label", "label2id", "num_labels", "chunk_size_feed_forward"}
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")


def shrink(default: Any, settings: dict[str, dict[str, Any]]) -> Any:
    """A tiny configuration of the class of `default`.

    Args:
        default: a configuration with its default values.
        settings: fields that replace the small ones, by model type, also of configurations inside.
    """
    fields = _small_fields(default, settings) | settings.get(default.model_type, {})
    return type(default)(**fields)


def _small_fields(default: Any, settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    values = {k: v for k, v in default.to_dict().items() if k not in _LEFT_ALONE}
    small: dict[str, Any] = {}
    for name, value in values.items():
        inner = _value(default, name)
        if hasattr(inner, "to_dict") and hasattr(inner, "model_type"):
            small[name] = shrink(inner, settings)
        elif name in _SIZES and type(value) is int:
            small[name] = _SIZES[name]
        elif "drop" in name and isinstance(value, float):
            small[name] = 0.0
    depth, per_layer = _kinds_of_layers(default)
    small |= per_layer
    if depth:
        small |= {name: depth for name in _DEPTHS if isinstance(_value(default, name), int)}
    small |= {name: value for name, value in _SPECIAL.items() if name in values}
    small |= {name: _STANDARD_DEVIATION for name in _DEVIATIONS if name in values}
    return small | dict(_consistent(default, values, small))


def _consistent(
    default: Any, values: dict[str, Any], small: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Fields that depend on others."""
    if "head_dim" in _field_names(default) and values.get("head_dim") is None:
        yield "head_dim", HEAD_DIM
    if {"kv_lora_rank", "num_key_value_heads", "qk_nope_head_dim"} <= small.keys():
        yield "num_key_value_heads", HEADS  # latent attention has one a head
    if {"kv_lora_rank", "qk_rope_head_dim", "head_dim"} <= small.keys():
        yield "head_dim", small["qk_rope_head_dim"]  # rotated
    if type(values.get("patch_size")) is int and type(values.get("image_size")) is int:
        yield "patch_size", 8
        yield "image_size", 32
    if values.get("first_k_dense_replace") and "mlp_layer_types" not in values:
        yield "first_k_dense_replace", 1


def _kinds_of_layers(default: Any) -> tuple[int | None, dict[str, list[Any]]]:
    """A depth at which each kind of layer of the default configuration occurs once, and the
    per-layer fields for it; None: it has no such fields."""
    depth = next((d for name in _DEPTHS if isinstance(d := _value(default, name), int)), None)
    lists = {
        name: list(values)
        for name in _PER_LAYER
        if name in (_field_names(default) or {name})
        and isinstance(values := _value(default, name), list | tuple)
        and depth
        and len(values) == depth
    }
    if not depth or not lists:
        return None, {}
    first: dict[str, int] = {}
    for layer in range(depth):
        first.setdefault(str([values[layer] for values in lists.values()]), layer)
    layers = list(first.values())[:_MOST_KINDS_OF_LAYERS]
    if len(layers) == 1:
        layers.append(min(layers[0] + 1, depth - 1))
    per_layer = {
        name: [values[layer] if _PER_LAYER[name] is None else _PER_LAYER[name] for layer in layers]
        for name, values in lists.items()
    }
    return len(layers), per_layer


def _field_names(config: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config)} if _is_dataclass(config) else set()


def _is_dataclass(config: Any) -> bool:
    return dataclasses.is_dataclass(type(config))


def _value(config: Any, name: str) -> Any:
    """A field; None: it has none, also where reading it raises an error, as of derived ones."""
    try:
        return getattr(config, name, None)
    except Exception:
        return config.to_dict().get(name)
