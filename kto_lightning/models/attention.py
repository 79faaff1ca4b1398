"""Packed, prefix-shared attention for transformers models.

`packed_attention` is registered with transformers as the implementation `PACKED`. It gets the run's
segments (`packed_run.py`) in the keyword argument `packed_run`, which `model(...)` passes unchanged
to every layer, also through peft and activation checkpointing.
"""

import inspect
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from kto_lightning.models.packed_run import PackedRun

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a build of torch without it: one segment at a time on every device
    varlen_attn = None

PACKED = "kto_packed"

# Options of a layer that change no result here. Any other that is not None or False is an error:
# ignoring it would silently compute another model.
_HARMLESS_OPTIONS = {
    "position_ids",
    "cache_position",
    "is_causal",  # False is an error
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "position_embeddings",
    "layer_idx",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "sliding_window",
    "num_items_in_batch",
}


class UnsupportedAttentionError(Exception):
    """A layer needs something that packed attention does not implement; the padded path does."""


def packed_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads tokens head_size"],
    key: Float[Tensor, "1 kv_heads tokens head_size"],
    value: Float[Tensor, "1 kv_heads tokens value_size"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_run: PackedRun | None = None,
    **options: Any,  # whatever the model's layers pass
) -> tuple[Float[Tensor, "1 tokens heads value_size"], None]:
    """Attention inside the segments of `packed_run`, with transformers' attention signature.

    Raises:
        UnsupportedAttentionError: if the layer passes an unknown option (soft-capping, sinks,
            position biases), a mask, or no `packed_run`.
    """
    _check_supported(module, attention_mask, packed_run, options)
    assert packed_run is not None
    packed_run.num_attention_calls += 1
    query, key = query.to(value.dtype), key.to(value.dtype)
    key, value = packed_run.keys_and_values(_layer_index(module), key, value)
    window = options.get("sliding_window") or _window_of_layer(module, options)
    attend = _attend_varlen if _can_use_varlen(query, value, dropout) else _attend_by_segment
    return attend(query, key, value, packed_run, scaling, window, dropout), None


def _check_supported(module, attention_mask, packed_run, options) -> None:
    if packed_run is None:
        raise UnsupportedAttentionError("its attention was called without the run's segments")
    if attention_mask is not None:
        raise UnsupportedAttentionError("the model makes an attention mask of its own")
    for name, option in options.items():
        if option is not None and option is not False and name not in _HARMLESS_OPTIONS:
            raise UnsupportedAttentionError(f"its attention uses '{name}'")
    if options.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise UnsupportedAttentionError("its attention is not causal")


def _layer_index(module: torch.nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise UnsupportedAttentionError("its attention layers are not numbered")
    return layer


def _window_of_layer(module: torch.nn.Module, options: dict[str, Any]) -> int | None:
    """The sliding window of a layer that does not pass it as an option, from the config."""
    config = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return window if layer_types[_layer_index(module)] == "sliding_attention" else None
    if window and "sliding_window" not in options:
        # PhiMoE applies it in its mask; which layers of another model do is not in the config.
        raise UnsupportedAttentionError("it has a sliding window that its layers do not pass on")
    return None


def _can_use_varlen(query: Tensor, value: Tensor, dropout: float) -> bool:
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.shape[2] > 0
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= 256
        and dropout == 0.0
    )


def _attend_varlen(query, key, value, run: PackedRun, scaling, window, dropout) -> Tensor:
    """One kernel for all segments; causal, with each segment's last query at its last key."""
    assert varlen_attn is not None
    options: dict[str, Any] = {}  # `Any`: pyright would check it against every parameter
    if _varlen_takes_gqa() and query.shape[1] != key.shape[1]:
        options["enable_gqa"] = True
    attended = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        run.boundaries("queries", query.device),
        run.boundaries("keys", query.device),
        max(run.lengths),
        max(run.kv_lengths),
        scale=scaling,
        window_size=(window - 1 if window else -1, 0),
        **options,
    )
    assert isinstance(attended, Tensor)
    return attended[None]


def _attend_by_segment(query, key, value, run: PackedRun, scaling, window, dropout) -> Tensor:
    """`scaled_dot_product_attention` per segment: for float32, the CPU and unusual head sizes."""
    attended = []
    segments = zip(
        query.split(run.lengths, dim=2),
        key.split(run.kv_lengths, dim=2),
        value.split(run.kv_lengths, dim=2),
        strict=True,
    )
    for q, k, v in segments:
        q_length, kv_length = q.shape[2], k.shape[2]
        if q_length == 0:
            attended.append(q.new_empty(*q.shape[:3], v.shape[3]))
            continue
        mask = None
        if q_length != kv_length or (window and window < kv_length):
            mask = run.mask(q_length, kv_length, window, q)
        attended.append(
            scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous()


@lru_cache(maxsize=1)
def _varlen_takes_gqa() -> bool:
    """Whether grouped queries must be declared: torch 2.13 requires it, 2.11 has no such option."""
    assert varlen_attn is not None
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


# No mask function is registered with it: transformers then makes no mask, which would take a device
# synchronisation to find the sequences' starts in the positions.
AttentionInterface.register(PACKED, packed_attention)
