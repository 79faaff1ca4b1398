"""Packed attention against its definition in float64, segment by segment."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kto_lightning.models.attention import UnsupportedAttentionError, packed_attention
from kto_lightning.models.packed_run import PackedRun, PromptStore, interleaved_ranges

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 8


class Layer(nn.Module):
    """The attributes of a layer that an attention function reads."""

    def __init__(self, layer_idx: int | None = 0, **config: Any) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.config = SimpleNamespace(**config)


def heads(tokens: int, count: int = HEADS, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, tokens, HEAD_SIZE, generator=generator, dtype=torch.float64)


def defined_attention(
    query: Tensor, key: Tensor, value: Tensor, *, window: int | None, scaling: float
) -> Tensor:
    """Attention of one sequence's last queries: `[1, heads, q, d]` and `[1, kv_heads, kv, d]`."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = scaling * query @ key.transpose(2, 3)
    num_queries, num_keys = scores.shape[2:]
    places = torch.arange(num_keys - num_queries, num_keys)
    distance = places[:, None] - torch.arange(num_keys)
    visible = (distance >= 0) & (distance < (window or math.inf))
    scores[:, :, ~visible] = -math.inf
    return scores.softmax(-1) @ value


def by_segment(
    query: Tensor, key: Tensor, value: Tensor, run: PackedRun, window: int | None, scaling: float
) -> Tensor:
    segments = zip(
        query.split(run.lengths, 2),
        key.split(run.kv_lengths, 2),
        value.split(run.kv_lengths, 2),
        strict=True,
    )
    parts = [defined_attention(*part, window=window, scaling=scaling) for part in segments]
    return torch.cat(parts, dim=2).transpose(1, 2)


segment_lengths = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@settings(deadline=None, max_examples=30)
@given(
    lengths=segment_lengths,
    window=st.none() | st.integers(1, 12),
    kv_heads=st.sampled_from((1, 2, 4)),
)
def test_segments_attend_to_themselves_alone(lengths, window, kv_heads) -> None:
    tokens = sum(lengths)
    query, key, value = (
        heads(tokens),
        heads(tokens, kv_heads, seed=1),
        heads(tokens, kv_heads, seed=2),
    )
    run = PackedRun(lengths=lengths)
    found, weights = packed_attention(
        Layer(), query, key, value, None, scaling=0.3, sliding_window=window, packed_run=run
    )
    assert weights is None
    assert run.num_attention_calls == 1
    torch.testing.assert_close(found, by_segment(query, key, value, run, window, 0.3))


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.tuples(*[st.integers(0, 9)] * 3), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 12),
    rows_only=st.booleans(),
)
def test_a_mismatched_segment_attends_to_its_prompt_and_itself(lengths, window, rows_only) -> None:
    prompts, completions, others = (list(column) for column in zip(*lengths, strict=True))
    wholes = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    starts = np.cumsum([0, *wholes[:-1]]).tolist()
    rows = torch.from_numpy(interleaved_ranges(starts, prompts))
    if rows_only:
        store = PromptStore(
            starts=np.cumsum([0, *prompts[:-1]]).tolist(), num_rows=sum(prompts), rows=rows
        )
    else:
        store = PromptStore(starts=starts, num_rows=sum(wholes))
    layer = Layer(layer_idx=3)
    first = [heads(sum(wholes), count, seed=count) for count in (HEADS, KV_HEADS, KV_HEADS)]
    packed_attention(layer, *first, None, packed_run=PackedRun(lengths=wholes, store=store))

    own = [heads(sum(others), n, seed=9 + i) for i, n in enumerate((HEADS, KV_HEADS, KV_HEADS))]
    run = PackedRun.after_prompts(store, prompts, others, torch.device("cpu"))
    found, _ = packed_attention(
        layer, *own, None, scaling=0.3, sliding_window=window, packed_run=run
    )

    def with_prompts(kept: Tensor, continued: Tensor) -> Tensor:
        parts = zip(
            kept.index_select(2, rows).split(prompts, 2), continued.split(others, 2), strict=True
        )
        return torch.cat([piece for pair in parts for piece in pair], dim=2)

    key, value = with_prompts(first[1], own[1]), with_prompts(first[2], own[2])
    torch.testing.assert_close(found, by_segment(own[0], key, value, run, window, 0.3))


def test_the_store_holds_detached_tensors_and_ignores_checkpointing() -> None:
    store = PromptStore(starts=[0], num_rows=5)
    run = PackedRun(lengths=[5], store=store)
    key = heads(5, KV_HEADS).requires_grad_()
    packed_attention(Layer(), heads(5), key, heads(5, KV_HEADS), None, packed_run=run)
    kept, _ = store.layers[0]
    assert not kept.requires_grad
    assert kept.data_ptr() == key.data_ptr()  # without `rows` nothing is copied
    PackedRun.after_prompts(store, [5], [2], torch.device("cpu"))
    store.layers.clear()
    # As activation checkpointing does in backward:
    packed_attention(Layer(), heads(5), key, heads(5, KV_HEADS), None, packed_run=run)
    assert not store.layers


def test_gradients_stay_inside_their_segment() -> None:
    query, key, value = (heads(7, n, seed=n).requires_grad_() for n in (HEADS, KV_HEADS, KV_HEADS))
    found, _ = packed_attention(
        Layer(), query, key, value, None, packed_run=PackedRun(lengths=[3, 4])
    )
    found[:, :3].sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert tensor.grad[:, :, :3].abs().sum() > 0
        assert tensor.grad[:, :, 3:].abs().sum() == 0


def test_the_working_type_is_that_of_the_values() -> None:
    # Under autocast rotary embeddings leave queries and keys in float32.
    query, key, value = heads(5).float(), heads(5, KV_HEADS).float(), heads(5, KV_HEADS).bfloat16()
    found, _ = packed_attention(Layer(), query, key, value, None, packed_run=PackedRun(lengths=[5]))
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (Layer(), {"softcap": 50.0}, "its attention uses 'softcap'"),
        (Layer(), {"s_aux": torch.zeros(4)}, "its attention uses 's_aux'"),
        (Layer(), {"position_bias": torch.zeros(4)}, "its attention uses 'position_bias'"),
        (Layer(), {"past_key_values": object()}, "its attention uses 'past_key_values'"),
        (Layer(), {"is_causal": False}, "not causal"),
        (Layer(), {"attention_mask": torch.ones(1, 1, 5, 5)}, "mask of its own"),
        (Layer(), {"packed_run": None}, "without the run's segments"),
        (Layer(layer_idx=None), {}, "not numbered"),
        (Layer(sliding_window=4), {}, "a sliding window that its layers do not pass on"),
    ],
)
def test_unsupported_options_are_rejected(
    layer: Layer, options: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"attention_mask": None, "packed_run": PackedRun(lengths=[5])}
    with pytest.raises(UnsupportedAttentionError, match=message):
        packed_attention(
            layer, heads(5), heads(5, KV_HEADS), heads(5, KV_HEADS), **(arguments | options)
        )


@pytest.mark.parametrize(
    ("layer", "options", "window"),
    [
        (Layer(), {"softcap": None, "output_attentions": False, "is_causal": True}, None),
        (Layer(sliding_window=3), {"sliding_window": None}, None),
        (Layer(sliding_window=3, layer_types=["sliding_attention"]), {}, 3),
        (Layer(sliding_window=3, layer_types=["full_attention"]), {}, None),
    ],
)
def test_the_window_comes_from_the_option_or_the_config(
    layer: Layer, options: dict[str, Any], window: int | None
) -> None:
    query, key, value = heads(6), heads(6, KV_HEADS, seed=1), heads(6, KV_HEADS, seed=2)
    run = PackedRun(lengths=[6])
    found, _ = packed_attention(layer, query, key, value, None, packed_run=run, **options)
    expected = by_segment(query, key, value, run, window, HEAD_SIZE**-0.5)
    torch.testing.assert_close(found, expected)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 4)), min_size=1, max_size=5))
def test_interleaved_ranges(ranges: list[tuple[int, int]]) -> None:
    firsts, seconds = ranges, [(start + 100, length) for start, length in ranges[::-1]]
    expected = [
        row
        for pair in zip(firsts, seconds, strict=True)
        for start, length in pair
        for row in range(start, start + length)
    ]
    arguments = [list(column) for pairs in (firsts, seconds) for column in zip(*pairs, strict=True)]
    assert interleaved_ranges(*arguments).tolist() == expected


def test_masks_and_boundaries_are_made_once_per_run() -> None:
    run = PackedRun(lengths=[2, 2])
    assert run.mask(2, 5, None, heads(1)) is run.mask(2, 5, None, heads(1))
    boundaries = run.boundaries("keys", torch.device("cpu"))
    assert boundaries is run.boundaries("keys", torch.device("cpu"))
    assert boundaries.tolist() == [0, 2, 4]
    assert boundaries.dtype == torch.int32
