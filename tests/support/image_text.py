"""Tiny image-text models, one for each way in which they differ from plain language models."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tests.support.factories import BOS_ID, EOS_ID, PAD_ID, make_tokenizer, random_model

_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_QWEN_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "depth": 1,
    "patch_size": 8,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_SIGLIP = _VISION | {"model_type": "siglip_vision_model"}

IMAGE_TEXT: dict[str, dict[str, Any]] = {
    # The vision tower has layers of the language model's names.
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral", "sliding_window": None},
        "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 16},
    },
    # Positions of three axes.
    "qwen2_5_vl": {
        "text_config": _TEXT | {"rope_parameters": _SECTIONS},
        "vision_config": _QWEN_VISION | {"fullatt_block_indexes": [0]},
    },
    # `AutoModelForCausalLM` gives the language model alone.
    "qwen3_5": {
        "text_config": _TEXT
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        "vision_config": _QWEN_VISION,
    },
    # Names in the files that are not those in memory.
    "llava": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _VISION | {"model_type": "clip_vision_model"},
    },
    # Masks and windows of its own, tied embeddings.
    "gemma3": {
        "text_config": _TEXT
        | {
            "sliding_window": 16,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
    },
    # The head belongs to an inner model; `base_model` is the whole one.
    "llama4": {
        "text_config": _TEXT
        | {
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 1,
            "attention_chunk_size": 16,
            "no_rope_layers": [1, 0],
        },
        "vision_config": _VISION | {"vision_output_dim": 32, "projector_output_dim": 32},
    },
    # Layers of the language model that only images reach.
    "mllama": {
        "text_config": _TEXT
        | {
            "num_hidden_layers": 3,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        "vision_config": _VISION
        | {
            "attention_heads": 2,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
            "supported_aspect_ratios": [[1, 1]],
            "max_num_tiles": 1,
        },
    },
    # Its forward leaves out the scale that the language model's config has.
    "aya_vision": {
        "text_config": _TEXT
        | {
            "model_type": "cohere2",
            "logit_scale": 0.25,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": _SIGLIP,
    },
    # A vision tower whose attention cannot be exchanged.
    "got_ocr2": {
        "text_config": _TEXT | {"model_type": "qwen2"},
        "vision_config": _VISION
        | {"output_channels": 32, "window_size": 2, "global_attn_indexes": [0], "mlp_dim": 32},
    },
    # Text attends to what follows it.
    "paligemma": {
        "text_config": _TEXT | {"model_type": "gemma"},
        "vision_config": _SIGLIP,
    },
}
"""Configurations that `make_image_text` can build."""

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
)


def make_image_text(
    architecture: str, *, vocab_size: int, seed: int = 0, **text: Any
) -> PreTrainedModel:
    """A float32 model in evaluation mode, the same for the same arguments.

    Args:
        architecture: a key of `IMAGE_TEXT`.
        vocab_size: at least the tokenizer's size.
        seed: decides every weight, without touching the caller's random state.
        text: fields of the language model's configuration.
    """
    settings = dict(IMAGE_TEXT[architecture])
    special = {"pad_token_id": PAD_ID, "eos_token_id": EOS_ID, "bos_token_id": BOS_ID}
    settings["text_config"] = settings["text_config"] | special | {"vocab_size": vocab_size} | text
    config = AutoConfig.for_model(architecture, **settings)
    return random_model(AutoModelForImageTextToText, config, seed)


def save_image_text(directory: Path, architecture: str, **text: Any) -> Path:
    """A model directory as on a hub, with a tokenizer and files of processors."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(directory)
    make_image_text(architecture, vocab_size=len(tokenizer), **text).save_pretrained(directory)
    for name in PROCESSOR_FILES:
        (directory / name).write_text('{"made_for": "tests"}')
    return directory
