"""Packed attention against its definition in float64, segment by segment."""

from contextlib import suppress
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kto_lightning.models.attention import UnsupportedAttentionError, packed_attention
from kto_lightning.models.packed_run import CHECKPOINTING, PackedRun, PromptStore, current_run
from kto_lightning.models.row_indices import interleaved_ranges
from tests.support.attention import by_segment, defined_attention

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


def attend(
    run: PackedRun,
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    with run.active():
        found, weights = packed_attention(layer, query, key, value, mask, **options)
    assert weights is None
    return found


segment_lengths = st.lists(st.integers(0, 9), min_size=1, max_size=4)
softcaps = st.none() | st.floats(0.5, 4.0)
SINKS = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64)


@settings(deadline=None, max_examples=30)
@given(
    lengths=segment_lengths,
    window=st.none() | st.integers(1, 12),
    kv_heads=st.sampled_from((1, 2, 4)),
    softcap=softcaps,
    sinks=st.sampled_from((None, SINKS)),
)
def test_segments_attend_to_themselves_alone(lengths, window, kv_heads, softcap, sinks) -> None:
    tokens = sum(lengths)
    query, key, value = (
        heads(tokens),
        heads(tokens, kv_heads, seed=1),
        heads(tokens, kv_heads, seed=2),
    )
    run = PackedRun(lengths=lengths)
    options = {"scaling": 0.3, "softcap": softcap}
    found = attend(run, Layer(), query, key, value, sliding_window=window, s_aux=sinks, **options)
    assert run.num_attention_calls == 1
    expected = by_segment(query, key, value, run, window=window, sinks=sinks, **options)
    torch.testing.assert_close(found, expected)


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.tuples(*[st.integers(0, 9)] * 3), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 12),
    rows_only=st.booleans(),
    softcap=softcaps,
)
def test_a_mismatched_segment_attends_to_its_prompt_and_itself(
    lengths, window, rows_only, softcap
) -> None:
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
    attend(PackedRun(lengths=wholes, store=store), layer, *first)

    own = [heads(sum(others), n, seed=9 + i) for i, n in enumerate((HEADS, KV_HEADS, KV_HEADS))]
    run = PackedRun.after_prompts(store, prompts, others, torch.device("cpu"))
    found = attend(run, layer, *own, sliding_window=window, softcap=softcap)

    def with_prompts(kept: Tensor, continued: Tensor) -> Tensor:
        parts = zip(
            kept.index_select(2, rows).split(prompts, 2), continued.split(others, 2), strict=True
        )
        return torch.cat([piece for pair in parts for piece in pair], dim=2)

    key, value = with_prompts(first[1], own[1]), with_prompts(first[2], own[2])
    expected = by_segment(own[0], key, value, run, window=window, softcap=softcap)
    torch.testing.assert_close(found, expected)


def test_the_store_holds_detached_tensors_and_ignores_checkpointing() -> None:
    store, layer = PromptStore(starts=[0], num_rows=5), Layer()
    run = PackedRun(lengths=[5], store=store)
    key = heads(5, KV_HEADS).requires_grad_()
    attend(run, layer, heads(5), key, heads(5, KV_HEADS))
    ((kept, _),) = store.layers.values()
    assert not kept.requires_grad
    assert kept.data_ptr() == key.data_ptr()  # without `rows` nothing is copied
    PackedRun.after_prompts(store, [5], [2], torch.device("cpu"))
    store.layers.clear()
    # As activation checkpointing does in backward:
    attend(run, layer, heads(5), key, heads(5, KV_HEADS))
    assert not store.layers


def test_each_call_of_a_layer_has_keys_of_its_own_in_the_store() -> None:
    """DiffLlama's layers attend twice, those of HRM once a cycle."""
    store = PromptStore(starts=[0], num_rows=3)
    calls = [(layer, seed) for seed, layer in enumerate([Layer(), Layer()] * 2)]
    tensors = [[heads(3, n, seed=seed) for n in (HEADS, KV_HEADS, KV_HEADS)] for _, seed in calls]
    run = PackedRun(lengths=[3], store=store)
    for (layer, _), (query, key, value) in zip(calls, tensors, strict=True):
        attend(run, layer, query, key, value)
    assert run.num_attention_calls == 4
    after = PackedRun.after_prompts(store, [3], [1], torch.device("cpu"))
    own = heads(1), heads(1, KV_HEADS, seed=8), heads(1, KV_HEADS, seed=9)
    for (layer, _), (_, key, value) in zip(calls, tensors, strict=True):
        found = attend(after, layer, *own)
        whole = torch.cat([key, own[1]], dim=2), torch.cat([value, own[2]], dim=2)
        torch.testing.assert_close(found, defined_attention(own[0], *whole).transpose(1, 2))
    with pytest.raises(UnsupportedAttentionError, match="more often for y' than for y"):
        attend(after, calls[0][0], *own)


def test_gradients_stay_inside_their_segment() -> None:
    query, key, value = (heads(7, n, seed=n).requires_grad_() for n in (HEADS, KV_HEADS, KV_HEADS))
    found = attend(PackedRun(lengths=[3, 4]), Layer(), query, key, value)
    found[:, :3].sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert tensor.grad[:, :, :3].abs().sum() > 0
        assert tensor.grad[:, :, 3:].abs().sum() == 0


def test_gradients_of_capped_scores_and_of_sinks() -> None:
    tensors = [heads(7, n, seed=n) for n in (HEADS, KV_HEADS, KV_HEADS)]
    run = PackedRun(lengths=[3, 4])

    def found(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        return attend(run, Layer(), query, key, value, s_aux=sinks, softcap=1.5)

    def expected(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        return by_segment(query, key, value, run, sinks=sinks, softcap=1.5)

    direction = heads(7).transpose(1, 2)
    sides = []
    for function in (found, expected):
        leaves = [tensor.clone().requires_grad_() for tensor in (*tensors, SINKS)]
        sides.append(torch.autograd.grad(function(*leaves), leaves, direction))
    torch.testing.assert_close(*sides)


def test_dropout_applies_to_capped_scores() -> None:
    tensors = [heads(40, n, seed=n) for n in (HEADS, KV_HEADS, KV_HEADS)]
    run = PackedRun(lengths=[40])
    torch.manual_seed(0)
    thinned, again = (attend(run, Layer(), *tensors, softcap=2.0, dropout=0.5) for _ in range(2))
    assert not torch.equal(thinned, again)
    assert (attend(run, Layer(), *tensors, softcap=2.0) - thinned).abs().mean() > 0.1


def test_the_working_type_is_that_of_the_values() -> None:
    # Under autocast rotary embeddings leave queries and keys in float32.
    tensors = heads(5).float(), heads(5, KV_HEADS).float(), heads(5, KV_HEADS).bfloat16()
    run = PackedRun(lengths=[5])
    assert attend(run, Layer(), *tensors).dtype == torch.bfloat16
    assert attend(run, Layer(), *tensors, s_aux=SINKS.float()).dtype == torch.bfloat16


def test_a_run_is_active_in_its_context_and_thread_alone() -> None:
    outer, inner, seen = PackedRun(lengths=[1]), PackedRun(lengths=[2]), []
    with outer.active():
        with suppress(RuntimeError), inner.active():
            seen.append(current_run())
            raise RuntimeError
        assert current_run() is outer
        thread = Thread(target=lambda: seen.append(current_run()))
        thread.start()
        thread.join()
    assert current_run() is None
    assert seen == [inner, None]


def test_checkpointing_recomputes_in_the_run_of_the_forward() -> None:
    """Backward comes after the run, may be in another thread, and other runs come between."""
    tensors = [heads(7, n, seed=n).requires_grad_() for n in (HEADS, KV_HEADS, KV_HEADS)]
    run, layer = PackedRun(lengths=[3, 4]), Layer()
    expected = torch.autograd.grad(attend(run, layer, *tensors).sum(), tensors)
    with run.active():
        found, _ = checkpoint(packed_attention, layer, *tensors, None, **CHECKPOINTING)
    gradients: list[Any] = []

    def backward() -> None:
        with PackedRun(lengths=[7]).active():
            gradients.append(torch.autograd.grad(found.sum(), tensors, retain_graph=True))

    thread = Thread(target=backward)
    thread.start()
    thread.join()
    backward()
    torch.testing.assert_close(gradients, [expected, expected])


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (Layer(), {"position_bias": torch.zeros(4)}, "its attention uses 'position_bias'"),
        (Layer(), {"past_key_values": object()}, "its attention uses 'past_key_values'"),
        (Layer(), {"is_causal": False}, "not causal"),
        (Layer(), {"mask": torch.ones(1, 1, 5, 5)}, "mask of its own"),
        (Layer(None, layer_types=["sliding_attention", "full_attention"]), {}, "not numbered"),
        (Layer(2, layer_types=["sliding_attention", "full_attention"]), {}, "not numbered"),
        (Layer(layer_types=["chunked_attention"]), {}, "layers of type chunked_attention"),
        (Layer(sliding_window=4), {}, "a sliding window that its layers do not pass on"),
    ],
)
def test_unsupported_options_are_rejected(
    layer: Layer, options: dict[str, Any], message: str
) -> None:
    tensors = heads(5), heads(5, KV_HEADS), heads(5, KV_HEADS)
    with pytest.raises(UnsupportedAttentionError, match=message):
        attend(PackedRun(lengths=[5]), layer, *tensors, **options)


def test_attention_outside_of_a_run_is_rejected() -> None:
    with pytest.raises(UnsupportedAttentionError, match="without the run's segments"):
        packed_attention(Layer(), heads(5), heads(5, KV_HEADS), heads(5, KV_HEADS), None)


@pytest.mark.parametrize(
    ("layer", "options", "window"),
    [
        (Layer(), {"softcap": None, "output_attentions": False, "is_causal": True}, None),
        (Layer(sliding_window=3), {"sliding_window": None}, None),
        (Layer(sliding_window=3, layer_types=["sliding_attention"]), {}, 3),
        (Layer(sliding_window=3, layer_types=["full_attention"]), {}, None),
        (Layer(None), {}, None),
        (Layer(None, sliding_window=3, layer_types=["sliding_attention"] * 2), {}, 3),
    ],
)
def test_the_window_comes_from_the_option_or_the_config(
    layer: Layer, options: dict[str, Any], window: int | None
) -> None:
    query, key, value = heads(6), heads(6, KV_HEADS, seed=1), heads(6, KV_HEADS, seed=2)
    run = PackedRun(lengths=[6])
    found = attend(run, layer, query, key, value, **options)
    expected = by_segment(query, key, value, run, window=window)
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
