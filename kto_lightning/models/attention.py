"""Packed, prefix-shared attention for transformers models.

`packed_attention` is registered with transformers as the implementation `PACKED`. It attends in the
segments of the run that is active (`packed_run.py`).
"""

import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from kto_lightning.models.flex_attention import attend_flex, can_use_flex
from kto_lightning.models.packed_run import PackedRun, UnsupportedAttentionError, current_run

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


def packed_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads tokens head_size"],
    key: Float[Tensor, "1 kv_heads tokens head_size"],
    value: Float[Tensor, "1 kv_heads tokens value_size"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Float[Tensor, " heads"] | None = None,
    **options: Any,  # whatever the model's layers pass
) -> tuple[Float[Tensor, "1 tokens heads value_size"], None]:
    """Attention inside the segments of the active run, with transformers' attention signature.

    Args:
        softcap: scores are capped to `softcap · tanh(score / softcap)` (Gemma 2, arXiv:2408.00118).
        s_aux: sinks, a score of each head that every query has beside those of its keys and that
            adds nothing to the result (gpt-oss, arXiv:2508.10925).

    Raises:
        UnsupportedAttentionError: if the layer passes an unknown option (position biases), a mask,
            or no run is active.
    """
    run = current_run()
    if run is None:
        raise UnsupportedAttentionError("its attention was called without the run's segments")
    _check_supported(module, attention_mask, options)
    query, key = query.to(value.dtype), key.to(value.dtype)
    key, value = run.keys_and_values(module, key, value)
    window = options.get("sliding_window") or _window_of_layer(module, options)
    if softcap is None and s_aux is None:
        if _can_use_varlen(query, value, dropout):
            return _attend_varlen(query, key, value, run, scaling, window), None
        attend = partial(_attend_plain, scaling=scaling, dropout=dropout)
        return _attend_by_segment(query, key, value, run, window, attend), None
    if can_use_flex(query, value, dropout):
        attended = attend_flex(
            query, key, value, run, scaling=scaling, window=window, softcap=softcap, sinks=s_aux
        )
        if attended is not None:
            return attended, None
    attend = partial(
        _attend_with_scores, scaling=scaling, dropout=dropout, softcap=softcap, sinks=s_aux
    )
    return _attend_by_segment(query, key, value, run, window, attend, always_masked=True), None


def _check_supported(module, attention_mask, options) -> None:
    if attention_mask is not None:
        raise UnsupportedAttentionError("the model makes an attention mask of its own")
    for name, option in options.items():
        if option is not None and option is not False and name not in _HARMLESS_OPTIONS:
            raise UnsupportedAttentionError(f"its attention uses '{name}'")
    if options.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise UnsupportedAttentionError("its attention is not causal")


def _window_of_layer(module: torch.nn.Module, options: dict[str, Any]) -> int | None:
    """The sliding window of a layer that does not pass it as an option, from the config."""
    config = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if not layer_types:
        if window and "sliding_window" not in options:
            # PhiMoE applies it in its mask; which layers of another model do is not in the config.
            raise UnsupportedAttentionError(
                "it has a sliding window that its layers do not pass on"
            )
        return None
    layer = getattr(module, "layer_idx", None)
    own = [] if layer is None else layer_types[layer : layer + 1]
    types = set(own or layer_types)
    if types == {"full_attention"}:
        return None
    if types == {"sliding_attention"}:
        return window
    unknown = sorted(types - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedAttentionError(f"it has layers of type {', '.join(unknown)}")
    raise UnsupportedAttentionError("its attention layers are not numbered")


def _can_use_varlen(query: Tensor, value: Tensor, dropout: float) -> bool:
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.shape[2] > 0
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= 256
        and dropout == 0.0
    )


def _attend_varlen(query, key, value, run: PackedRun, scaling, window) -> Tensor:
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


def _attend_by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    run: PackedRun,
    window: int | None,
    attend: Callable[..., Tensor],
    *,
    always_masked: bool = False,
) -> Tensor:
    """One segment at a time: for float32, the CPU and unusual head sizes.

    `attend(q, k, v, mask)`: the attention of one. Its mask is None where it is the causal one of as
    many queries as keys, unless `always_masked`.
    """
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
        if always_masked or q_length != kv_length or (window and window < kv_length):
            mask = run.mask(q_length, kv_length, window, q)
        attended.append(attend(q, k, v, mask))
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous()


def _attend_plain(q, k, v, mask: Tensor | None, *, scaling, dropout) -> Tensor:
    return scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _attend_with_scores(
    q, k, v, mask: Tensor, *, scaling, dropout, softcap, sinks: Tensor | None
) -> Tensor:
    """Attention with its scores as a tensor, in at least float32, to cap them and add sinks."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(2, 3)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(dim=-1)[..., : k.shape[2]].to(v.dtype)
    return torch.dropout(weights, dropout, train=dropout > 0) @ v


@lru_cache(maxsize=1)
def _varlen_takes_gqa() -> bool:
    """Whether grouped queries must be declared: torch 2.13 requires it, 2.11 has no such option."""
    assert varlen_attn is not None
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


# No mask function is registered with it: transformers then makes no mask, which would take a device
# synchronisation to find the sequences' starts in the positions.
AttentionInterface.register(PACKED, packed_attention)
