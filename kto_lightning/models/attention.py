"""Packed, prefix-shared attention: what a transformers model calls in place of its own.

A packed run is one row of sequences end to end. `packed_attention` is registered with transformers
under the name `PACKED` and finds the run's segments in the keyword argument `packed_run`, which
`model(...)` hands down to every layer untouched, also through PEFT and activation checkpointing.

Two kinds of run (arXiv:2410.20305 shares prefixes between DPO's two answers in the same spirit):

- a matched run `[x1 y1 | x2 y2 | …]` attends causally inside each segment and may keep every
  layer's keys and values of the prompts in a `PromptStore`;
- a mismatched run `[y'1 | y'2 | …]` reads that store: y'_i attends to x_i, then causally to itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a build of torch without it: segments go one by one on every device
    varlen_attn = None

PACKED = "kto_packed"

# What a layer may pass that changes no number here. Anything else that is not None or False would
# be ignored silently, so it is refused.
_HARMLESS = {
    "position_ids",
    "cache_position",
    "is_causal",  # as False it is refused
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
    """A layer asks for something packed attention cannot give; the padded path can."""


@dataclass(kw_only=True, slots=True, eq=False)
class PromptStore:
    """Every layer's keys and values of one run that holds the prompts, detached, by layer index.

    With `rows` only those rows are copied; without, the whole tensors are kept, which costs nothing
    while autograd holds them anyway. `open` is switched off after the run, because activation
    checkpointing calls the layers again in backward.
    """

    starts: Sequence[int]
    """Where each prompt begins among the kept rows."""
    num_rows: int
    rows: Tensor | None = None
    open: bool = True
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        key, value = key.detach(), value.detach()
        if self.rows is not None:
            key, value = key.index_select(2, self.rows), value.index_select(2, self.rows)
        self.layers[layer] = (key, value)


def interleaved_ranges(*starts_and_lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Rows `[s1 … s1+n1 | t1 … t1+m1 | s2 … s2+n2 | …]` of `(s, n, t, m, …)`, int64.

    Example:
        >>> interleaved_ranges([0, 10], [2, 1])
        array([ 0,  1, 10])
    """
    starts = np.stack(starts_and_lengths[0::2], axis=1).reshape(-1).astype(np.int64)
    lengths = np.stack(starts_and_lengths[1::2], axis=1).reshape(-1).astype(np.int64)
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(lengths.sum())


@dataclass(slots=True, eq=False)
class PackedRun:
    """The segments of one packed run, made once per run and handed to every layer.

    `lengths` are the segments' query lengths. In a mismatched run `prefix_lengths` are their
    prompts' lengths and `kv_rows` arranges `[kept rows | own rows]` into `[x1 y'1 | x2 y'2 | …]`.
    """

    lengths: list[int]
    store: PromptStore | None = None
    prefix_lengths: list[int] | None = None
    kv_rows: Tensor | None = None
    num_calls: int = 0
    """How many layers have attended: a model with layers that mix tokens otherwise has fewer."""
    _masks: dict[tuple, Tensor] = field(default_factory=dict)
    _boundaries: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def continuing(
        cls, store: PromptStore, prompt_lengths: list[int], lengths: list[int], device: torch.device
    ) -> "PackedRun":
        """The run `[y'1 | y'2 | …]` on top of the prompts in `store`, which takes no more in."""
        store.open = False
        own_starts = np.cumsum([store.num_rows, *lengths[:-1]])
        kv_rows = interleaved_ranges(store.starts, prompt_lengths, own_starts, lengths)
        return cls(
            lengths=lengths,
            store=store,
            prefix_lengths=prompt_lengths,
            kv_rows=torch.from_numpy(kv_rows).to(device, non_blocking=True),
        )

    @property
    def kv_lengths(self) -> list[int]:
        if self.prefix_lengths is None:
            return self.lengths
        return [p + n for p, n in zip(self.prefix_lengths, self.lengths, strict=True)]

    def keys_and_values(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What this run's queries attend to: `[1, heads, kv_tokens, head_size]` each."""
        if self.prefix_lengths is None:
            if self.store is not None and self.store.open:
                self.store.keep(layer, key, value)
            return key, value
        assert self.store is not None
        assert self.kv_rows is not None
        kept_key, kept_value = self.store.layers[layer]
        return (
            torch.cat([kept_key.to(key.dtype), key], dim=2).index_select(2, self.kv_rows),
            torch.cat([kept_value.to(value.dtype), value], dim=2).index_select(2, self.kv_rows),
        )

    def mask(self, q_length: int, kv_length: int, window: int | None, like: Tensor) -> Tensor:
        """0 where query i, aligned at the end, may look, −inf elsewhere: `[q_length, kv_length]`.

        Built once a run: every layer asks for the same ones.
        """
        key = (q_length, kv_length, window, like.dtype)
        if key not in self._masks:
            distance = torch.arange(kv_length - q_length, kv_length, device=like.device)[:, None]
            distance = distance - torch.arange(kv_length, device=like.device)
            hidden = distance < 0
            if window:
                hidden |= distance >= window
            mask = torch.zeros(q_length, kv_length, dtype=like.dtype, device=like.device)
            self._masks[key] = mask.masked_fill_(hidden, float("-inf"))
        return self._masks[key]

    def boundaries(self, of: str, device: torch.device) -> Tensor:
        """`[0, length_1, length_1 + length_2, …]` of the queries or the keys, int32."""
        if of not in self._boundaries:
            lengths = self.lengths if of == "queries" else self.kv_lengths
            boundaries = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
            self._boundaries[of] = boundaries.to(device, non_blocking=True)
        return self._boundaries[of]


def packed_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads tokens head_size"],
    key: Float[Tensor, "1 kv_heads tokens head_size"],
    value: Float[Tensor, "1 kv_heads tokens value_size"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_run: PackedRun | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "1 tokens heads value_size"], None]:
    """Attention over the segments of `packed_run`; transformers' attention signature.

    Raises:
        UnsupportedAttentionError: if the layer passes an option this function does not know
            (soft-capping, sinks, position biases), a mask, or no `packed_run`.
    """
    _check_known(module, attention_mask, packed_run, options)
    assert packed_run is not None
    packed_run.num_calls += 1
    query, key = query.to(value.dtype), key.to(value.dtype)
    key, value = packed_run.keys_and_values(_layer_index(module), key, value)
    window = options.get("sliding_window") or _window_of_layer(module, options)
    attend = _attend_varlen if _can_use_varlen(query, value, dropout) else _attend_by_segment
    return attend(query, key, value, packed_run, scaling, window, dropout), None


def _check_known(module, attention_mask, packed_run, options) -> None:
    if packed_run is None:
        raise UnsupportedAttentionError("attention was called without the run's segments")
    if attention_mask is not None:
        raise UnsupportedAttentionError("the model makes an attention mask of its own")
    for name, option in options.items():
        if option is not None and option is not False and name not in _HARMLESS:
            raise UnsupportedAttentionError(f"its attention uses '{name}'")
    if options.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise UnsupportedAttentionError("its attention is not causal")


def _layer_index(module: torch.nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise UnsupportedAttentionError("its attention layers are not numbered")
    return layer


def _window_of_layer(module: torch.nn.Module, options: dict[str, Any]) -> int | None:
    """The window of a layer that is named a sliding one in the config but does not pass it."""
    config = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return window if layer_types[_layer_index(module)] == "sliding_attention" else None
    if window and "sliding_window" not in options:
        # PhiMoE masks by it; nothing tells which layers another model masks.
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
    """One kernel over all segments; queries and keys are aligned at each segment's end."""
    assert varlen_attn is not None
    options: dict[str, Any] = {}
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
    """`scaled_dot_product_attention` segment by segment: float32, CPU, unusual head sizes."""
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
    """torch 2.13 wants to be told; 2.11 neither needs nor knows the argument."""
    import inspect

    return "enable_gqa" in inspect.signature(varlen_attn).parameters  # pyright: ignore[reportArgumentType]


# No mask function beside it: transformers then makes no mask, and does not wait for the device to
# find out from the positions where sequences begin.
AttentionInterface.register(PACKED, packed_attention)
