"""Attention by its definition, one segment at a time: what every kernel is held against."""

import math
from typing import Any

import torch
from torch import Tensor

from kto_lightning.models.packed_run import PackedRun


def defined_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one sequence's last queries: `[1, heads, q, d]` and `[1, kv_heads, kv, d]`."""
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = scaling * query @ key.transpose(2, 3)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    num_queries, num_keys = scores.shape[2:]
    places = torch.arange(num_keys - num_queries, num_keys, device=scores.device)
    distance = places[:, None] - torch.arange(num_keys, device=scores.device)
    visible = (distance >= 0) & (distance < (window or math.inf))
    weights = scores.masked_fill(~visible, -math.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[:, None, None]
    return weights / total @ value


def by_segment(query: Tensor, key: Tensor, value: Tensor, run: PackedRun, **options: Any) -> Tensor:
    """`defined_attention` of each of the run's segments, `[1, tokens, heads, d]`."""
    segments = zip(
        query.split(run.lengths, 2),
        key.split(run.kv_lengths, 2),
        value.split(run.kv_lengths, 2),
        strict=True,
    )
    parts = [defined_attention(*part, **options) for part in segments]
    return torch.cat(parts, dim=2).transpose(1, 2)
