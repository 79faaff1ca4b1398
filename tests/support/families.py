"""Tiny configurations of model families that differ from most in one mechanism.

`factories.make_model` builds them as it builds those of `ARCHITECTURES`, which more tests run over.
"""

from typing import Any

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
_GROUPED = {"num_key_value_heads": 2}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MAMBA2 = {"n_mamba_heads": 8, "mamba_d_state": 8, "chunk_size": 16}
_WINDOW = {"sliding_window": 16}
_WINDOW_AND_ALL = ["sliding_attention", "full_attention"]
_SHARED_BLOCK = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}

FAMILIES: dict[str, dict[str, Any]] = {
    # Routing that is sampled in training, and noise in it.
    "phimoe": _COMMON | _GROUPED | _EXPERTS | {"original_max_position_embeddings": 512},
    "mixtral": _COMMON | _GROUPED | _EXPERTS,
    # Layers that are skipped in training.
    "xglm": {
        "d_model": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "attention_heads": 4,
        "max_position_embeddings": 512,
        "init_std": 0.2,
    },
    # Rates of dropout that are read from the config.
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "initializer_range": 0.2},
    # One attention block, with its weights, at several depths.
    "zamba2": _COMMON
    | _MAMBA2
    | _SHARED_BLOCK
    | {
        "hybrid_layer_ids": [1, 3],
        "num_mem_blocks": 1,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "adapter_rank": 8,
        "use_mamba_kernels": False,
    },
    "zamba": _COMMON
    | {"num_key_value_heads": 4}
    | _SHARED_BLOCK
    | {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "n_mamba_heads": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "use_mamba_kernels": False,
    },
    # Layers that are linear by class and give more than a product with their weight.
    "llama4_text": _COMMON
    | _GROUPED
    | _EXPERTS
    | {
        "head_dim": 8,
        "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 16,
        "no_rope_layers": [1, 0],
    },
    "deepseek_v4": _COMMON
    | {
        "num_key_value_heads": 1,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "q_lora_rank": 12,
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "num_hidden_layers": 2,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["moe", "moe"],
        "sliding_window": 32,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 4,
        "index_head_dim": 8,
        "index_topk": 32,
        "num_nextn_predict_layers": 0,
    },
    # Mixers whose weights are read without a call.
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "state_size": 8,
        "chunk_size": 16,
        "initializer_range": 0.2,
    },
    # Models without experts of classes that can have them.
    "granitemoehybrid": _COMMON
    | _GROUPED
    | {
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 64,
        "layer_types": ["full_attention"] * 2,
        "position_embedding_type": "rope",
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
    "jamba": _COMMON
    | _GROUPED
    | {
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "doge": _COMMON | _GROUPED | {"is_moe": False},
    "flint": _COMMON | _GROUPED | {"head_dim": 8, "mlp_only_layers": [0, 1]},
    # Feed-forward networks that count as layers.
    "nemotron_h": _COMMON
    | _GROUPED
    | {
        "head_dim": 8,
        "layer_types": ["linear_attention", "moe", "full_attention", "mlp"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "num_nextn_predict_layers": 0,
        "n_group": 1,
        "topk_group": 1,
    },
    # Capped attention scores.
    "vaultgemma": _COMMON | _GROUPED | _WINDOW | {"head_dim": 8, "attn_logit_softcapping": 2.0},
    # Attention sinks; MiMo's are those of its windows alone, whose heads have another size.
    "granite_swa": _COMMON | _GROUPED | _WINDOW | {"layer_types": _WINDOW_AND_ALL},
    "granitemoe_swa": _COMMON
    | _GROUPED
    | _EXPERTS
    | _WINDOW
    | {"layer_types": _WINDOW_AND_ALL, "shared_intermediate_size": 32},
    "mimo_v2_flash": _COMMON
    | _GROUPED
    | _WINDOW
    | {
        "head_dim": 16,
        "v_head_dim": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 1,
        "swa_head_dim": 12,
        "swa_v_head_dim": 8,
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    # Layers that attend twice, and layers that run in cycles.
    "diffllama": _COMMON | _GROUPED,
    "hrm_text": _COMMON | {"num_hidden_layers": 8, "num_layers_per_stack": 1, "prefix_lm": False},
    # Models that pass no unknown arguments on to their layers.
    "stablelm": _COMMON | _GROUPED,
    "nemotron": _COMMON | _GROUPED,
    # Models that cannot checkpoint their activations.
    "jetmoe": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "kv_channels": 8,
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "initializer_range": 0.2,
    },
    "ctrl": {"n_embd": 32, "dff": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    # One that reads text both ways.
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "initializer_range": 0.2},
    # What they keep of a prompt: the state of linear attention, a short convolution's, keys and
    # values beside a state.
    "qwen3_5_text": _COMMON
    | _GROUPED
    | {
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "lfm2": _COMMON | _GROUPED | {"layer_types": ["conv", "full_attention"], "conv_bias": True},
    "falcon_h1": _COMMON
    | _GROUPED
    | {
        "head_dim": 8,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
    },
}

GRANITE_EXPERTS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.1,
    "output_router_logits": True,
    "layer_types": ["mamba", "attention"],
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
"""Fields for `granitemoehybrid` that give it experts and a mixer."""
