"""Other configurations of an architecture that published checkpoints have."""

from typing import Any

from tests.architectures.settings import LINEAR
from tests.architectures.shrink import HEAD_DIM, POSITIONS, WINDOW

_FULL = {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}
_NO_WINDOW = {"sliding_window": None}
_PLAIN_QWEN = _FULL | _NO_WINDOW | {"use_sliding_window": False, "max_window_layers": 2}
_AUXILIARY_LOSS = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
_DENSE = {"num_local_experts": 0, "num_experts_per_tok": 0}
_SHORT = 48
"""Positions of the first training: the checks' longest sequence lies beyond them."""


def _yarn(**more: Any) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        **more,
    }


_YARN_SCALED = _yarn(beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * (HEAD_DIM // 2),
    "long_factor": [4.0] * (HEAD_DIM // 2),
    "original_max_position_embeddings": _SHORT,
    "factor": POSITIONS / _SHORT,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

VARIANTS: dict[str, dict[str, Any]] = {
    # Positions.
    "llama+dynamic": {
        "max_position_embeddings": _SHORT,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
    "llama+llama3": {"rope_parameters": _LLAMA3},
    "mistral+yarn": _NO_WINDOW | {"rope_parameters": _yarn()},
    "deepseek_v3+yarn": {"rope_parameters": _YARN_SCALED},
    "ministral3+scaling": {
        "rope_parameters": _YARN_SCALED
        | {"max_position_embeddings": POSITIONS, "llama_4_scaling_beta": 0.5}
    },
    "phi3+longrope": _NO_WINDOW
    | {"original_max_position_embeddings": _SHORT, "rope_parameters": _LONGROPE},
    "falcon+alibi": {"alibi": True},
    "falcon+new": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    # Windows.
    "llama4_text+nochunk": _FULL | {"no_rope_layers": [1, 0], "moe_layers": [1]},
    "mistral+nowindow": _NO_WINDOW,
    "phi3+nowindow": _NO_WINDOW,
    "phimoe+nowindow": _NO_WINDOW,
    "qwen2+nowindow": _PLAIN_QWEN | {"tie_word_embeddings": True},
    "qwen3+nowindow": _PLAIN_QWEN | {"tie_word_embeddings": True},
    "starcoder2+nowindow": _NO_WINDOW,
    # Scores and heads.
    "gemma2+nocap": {"attn_logit_softcapping": None},
    "gemma3_text+bidirectional": {"use_bidirectional_attention": True},
    "gemma4_text+kvshared": {"num_kv_shared_layers": 2},
    "gemma4_text+keqv": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "llama+bias": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "gpt_neox+sequential": {"use_parallel_residual": False},
    "opt+350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "minicpm3+scaled": {"dim_model_base": 32, "scale_emb": 2},
    # Experts.
    "deepseek_v2+noqlora": {"q_lora_rank": None},
    "gemma4_text+experts": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "hidden_size_per_layer_input": 0,
    },
    "mixtral+auxiliary": _NO_WINDOW | _AUXILIARY_LOSS,
    "mixtral+jitter": _NO_WINDOW | {"router_jitter_noise": 0.1},
    "olmoe+auxiliary": _AUXILIARY_LOSS,
    "phimoe+nojitter": {"router_jitter_noise": 0.0},
    "qwen3_moe+mixed": {"mlp_only_layers": [0]},
    "qwen3_next+mixed": {"mlp_only_layers": [0]},
    "minimax_m3_vl_text+dense": {"layer_types": ["full_attention"] * 2},
    # Models without experts of classes that can have them.
    "jamba+dense": {"num_experts": 1, "num_experts_per_tok": 1},
    "granitemoehybrid+dense": _DENSE,
    "granitemoehybrid+dense_attention": _FULL | _DENSE,
    # Layers of one kind alone, or of both.
    "granitemoehybrid+attention": _FULL,
    "granitemoehybrid+both": {"layer_types": LINEAR, "num_hidden_layers": 2},
    "lfm2+attention": _FULL,
    "minimax+windowed": {"sliding_window": WINDOW},
}
"""Fields by `model_type+name`."""
