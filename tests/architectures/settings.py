"""What `shrink` cannot know from a field's name, by model type."""

from typing import Any

from tests.architectures.shrink import EXPERT, FEED_FORWARD, HEAD_DIM, HIDDEN, WINDOW

SLIDING = ["sliding_attention", "full_attention"]
LINEAR = ["linear_attention", "full_attention"]
DENSE_AND_EXPERTS = ["dense", "sparse"]
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
}
_FOUR = {"num_hidden_layers": 4}
_SLIDING_4 = {"layer_types": SLIDING * 2, **_FOUR}
_THREE_AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_HALF_ROTATED = _THREE_AXES | {"mrope_section": [1, 2, 1], "partial_rotary_factor": 0.5}
_WHOLLY_ROTATED = _THREE_AXES | {"partial_rotary_factor": 1.0}
_TWO_KINDS = {
    "layer_types": LINEAR,
    "mlp_layer_types": DENSE_AND_EXPERTS,
    "num_hidden_layers": 2,
}
_SHARED_BLOCK = {
    **_FOUR,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
    "use_mamba_kernels": False,
}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
_DECODER = {"is_decoder": True}
_FEW_CHANNELS = {"base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 64}
_IMAGE_TOKENS = {"vocabulary_map": {"<image>": 5, "IMGIMGAA": 6}}
_WITH_THREE_AXES = """
qwen2_vl_text qwen2_5_vl_text qwen3_vl_text qwen3_vl_moe_text glm46v_text glm_ocr_text
paddleocr_vl_text qwen2_5_omni_text qwen3_omni_moe_text cosmos3_edge_text hunyuan_vl_text
"""
_ENCODERS = """
bert bert-generation camembert data2vec-text electra ernie megatron-bert rembert roberta
roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl
"""

SETTINGS: dict[str, dict[str, Any]] = {
    # Windows and kinds of layers.
    "afmoe": _SLIDING_4 | {"num_dense_layers": 1},
    "cohere_compass_text": {"layer_types": SLIDING, "rope_parameters": TWO_ROPES},
    "doge": {"keep_window_size": WINDOW},
    "exaone4": _SLIDING_4,
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma4_text": _SLIDING_4 | {"global_head_dim": 32},
    "gemma4_unified_text": _SLIDING_4 | {"global_head_dim": 32},
    "gemma3n_text": _SLIDING_4
    | {
        "num_kv_shared_layers": 2,
        "intermediate_size": [FEED_FORWARD] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "rope_parameters": TWO_ROPES,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "hrm_text": {"num_hidden_layers": 8, "num_layers_per_stack": 1, "prefix_lm": False},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
        "layer_types": SLIDING[::-1],
    },
    "qwen3": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
        "layer_types": SLIDING[::-1],
    },
    "smollm3": {"no_rope_layer_interval": 2, "no_rope_layers": None},
    "starcoder2": {"sliding_window": WINDOW},
    "step3p5": {
        "sliding_window": WINDOW,
        "layer_types": SLIDING,
        "mlp_layer_types": DENSE_AND_EXPERTS,
        "rope_parameters": TWO_ROPES,
        "num_attention_groups": 2,
    },
    "vaultgemma": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    # Experts.
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": HIDDEN,
            "ffn_hidden_size": FEED_FORWARD,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "deepseek_v2": _ROUTED | {"num_hidden_layers": 3, "topk_method": "greedy"},
    "dots1": _ROUTED | {"n_shared_experts": 1, "layer_types": SLIDING, "max_window_layers": 0},
    "ernie4_5_moe": {"moe_layer_end_index": 1, "num_hidden_layers": 3},
    "llama4_text": {"interleave_moe_layer_step": 1},
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": 4, "head_dim": 8},
    "phimoe": {"sliding_window": WINDOW},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    # Attention over chosen or compressed keys.
    "dots3_note_text": {
        "head_dim": 24,
        "layer_types": ["indexed_attention", "sliding_attention"],
        "mlp_layer_types": DENSE_AND_EXPERTS,
        "shared_experts_intermediate_size": EXPERT,
        "num_hidden_layers": 2,
        "per_layer_config": {},
    },
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": DENSE_AND_EXPERTS,
        "index_block_size": 8,
        "index_topk_blocks": 2,
        "index_local_blocks": 1,
        "index_n_heads": 2,
    },
    "qwen4_exp_text": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "indexed_attention"],
        "intermediate_size": FEED_FORWARD,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": WINDOW,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 16,
        "ple_embed_dim": HIDDEN,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 2,
        "make_ngram_vocab_size_divisible_by": 8,
    },
    # Linear attention, state spaces, convolutions.
    "bailing_hybrid": _TWO_KINDS | {"first_k_dense_replace": 1, "num_expert_group": 1},
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 2},
    "jamba": _FOUR
    | {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "output_router_logits": False,
    },
    "kimi_linear": _TWO_KINDS,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
    },
    "mamba2": {"num_heads": 8, "head_dim": HEAD_DIM, "n_groups": 1},
    "minimax": _FOUR | {"layer_types": LINEAR * 2, "block_size": 16},
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "zamba": _SHARED_BLOCK | {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": _SHARED_BLOCK
    | {
        "num_mem_blocks": 1,
        "n_mamba_heads": 8,
        "chunk_size": 16,
        "use_mem_rope": True,
        "hybrid_layer_ids": [1, 3],
    },
    # Attention of their own.
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": _DECODER
    | {
        "axial_pos_embds_dim": (32, 32),
        "axial_pos_shape": (16, 32),
        "attn_layers": ["local", "lsh"],
    },
    # Positions of three axes.
    **{name: {"rope_parameters": _THREE_AXES} for name in _WITH_THREE_AXES.split()},
    "ernie4_5_vl_moe_text": {"rope_parameters": _THREE_AXES | {"mrope_section": [3, 3, 2]}},
    "glm4v_text": {"rope_parameters": _WHOLLY_ROTATED},
    "glm4v_moe_text": {"rope_parameters": _HALF_ROTATED},
    # Image-text models.
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon": _IMAGE_TOKENS,
    "chameleon_vqgan": _FEW_CHANNELS,
    "deepseek_ocr2_text": _ROUTED | {"mlp_layer_types": DENSE_AND_EXPERTS},
    "emu3": _IMAGE_TOKENS,
    "emu3_vqgan": _FEW_CHANNELS,
    "florence_vision": {
        "depths": [1] * 4,
        "embed_dim": [16] * 4,
        "num_heads": [2] * 4,
        "num_groups": [2] * 4,
        "window_size": 4,
    },
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2"},
    "janus_vqgan": _FEW_CHANNELS,
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [HIDDEN] * 4},
    "radio": {"video_temporal_patch_size": 2},
    # Encoders that are configured as decoders.
    **dict.fromkeys(_ENCODERS.split(), _DECODER),
    "big_bird": _DECODER | {"attention_type": "original_full"},
    "xlm": {"emb_dim": HIDDEN, "causal": True},
    "xmod": _DECODER | {"default_language": "en_XX", "languages": ("en_XX",)},
}
