"""FlexAttention in a run's segments, against the path that attends segment by segment.

The kernel needs a GPU. Here its definition runs, which a compiler that changes nothing has traced.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo import exc
from torch._subclasses import FakeTensorMode
from torch.nn.attention import flex_attention as torch_flex

from kto_lightning.models import flex_attention
from kto_lightning.models.attention import _attend_by_segment, _attend_with_scores
from kto_lightning.models.flex_attention import attend_flex, can_use_flex, visible_blocks
from kto_lightning.models.packed_run import PackedRun, PromptStore
from tests.support.tolerances import assert_errs_like_plain

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 16
SINKS = torch.tensor([-1.0, 0.0, 0.5, 2.0])
NO_OPTIONS: dict[str, Any] = {"scaling": None, "window": None, "softcap": None, "sinks": None}
CASES = {
    "capped, with sinks, in a window": {"softcap": 1.5, "sinks": SINKS, "window": 40},
    "scaled, with sinks": {"scaling": 0.3, "sinks": SINKS},
}


@pytest.fixture(scope="module")
def graphs() -> Iterator[list[Any]]:
    """What was compiled."""
    made: list[Any] = []

    def compiler(graph: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        made.append(graph)
        return graph.forward

    attend = inspect.unwrap(flex_attention._attend)  # from the check of its types
    compiled = torch.compile(attend, dynamic=True, fullgraph=True, backend=compiler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "_compiled", lambda: compiled)
        # It refuses a gradient on the CPU, where the kernel has none; its definition has.
        patch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
        # The trace of a compilation, which pytest would collect, takes longer than the rest.
        patch.setattr(logging.getLogger("torch.__trace"), "handlers", [])
        yield made
    torch._dynamo.reset()


def matched_run(*lengths: int) -> PackedRun:
    return PackedRun(lengths=list(lengths))


def mismatched_run(*lengths: tuple[int, int]) -> PackedRun:
    """Of prompts and completions of these lengths."""
    prompts, completions = (list(column) for column in zip(*lengths, strict=True))
    store = PromptStore(starts=np.cumsum([0, *prompts[:-1]]).tolist(), num_rows=sum(prompts))
    return PackedRun.after_prompts(store, prompts, completions, torch.device("cpu"))


def random_heads(count: int, tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, tokens, HEAD_SIZE, generator=generator)


def inputs_of(run: PackedRun) -> tuple[Tensor, Tensor, Tensor]:
    key, value = (random_heads(KV_HEADS, sum(run.kv_lengths), seed=seed) for seed in (1, 2))
    return random_heads(HEADS, sum(run.lengths), seed=0), key, value


def by_segment(query: Tensor, key: Tensor, value: Tensor, run: PackedRun, **options: Any) -> Tensor:
    window = options.pop("window")
    attend = partial(_attend_with_scores, dropout=0.0, **options)
    return _attend_by_segment(query, key, value, run, window, attend, always_masked=True)


def with_gradients(
    attend: Callable[..., Tensor | None], run: PackedRun, dtype: torch.dtype, **options: Any
) -> list[Tensor]:
    """What attention gives, and its gradients to queries, keys, values and sinks."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs_of(run)]
    options = NO_OPTIONS | options
    if options["sinks"] is not None:
        options["sinks"] = options["sinks"].clone().to(dtype).requires_grad_()
        leaves.append(options["sinks"])
    found = attend(*leaves[:3], run, **options)
    assert found is not None
    direction = random_heads(HEADS, found.shape[1], seed=9).transpose(1, 2).to(dtype)
    return [found, *torch.autograd.grad(found, leaves, direction)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "run",
    [matched_run(100, 0, 60, 130), mismatched_run((150, 60), (0, 70), (90, 30), (7, 0))],
    ids=["matched", "mismatched"],
)
def test_it_gives_what_segments_give_with_every_gradient(
    case: str, run: PackedRun, graphs: list[Any]
) -> None:
    found = with_gradients(attend_flex, run, torch.float32, **CASES[case])
    plain = with_gradients(by_segment, run, torch.float32, **CASES[case])
    truth = with_gradients(by_segment, run, torch.float64, **CASES[case])
    names = ("attention", "queries", "keys", "values", "sinks")
    for name, *sides in zip(names, found, plain, truth, strict=False):
        assert_errs_like_plain(*sides, name=name)


# The compiler reads `grad` of what is not a leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_new_lengths_and_windows_compile_nothing(graphs: list[Any]) -> None:
    runs = [matched_run(100, 60, 130), matched_run(300), matched_run(*[50] * 9)]
    after_prompts = [mismatched_run((150, 60), (90, 100)), mismatched_run((9, 400), (700, 33))]
    with torch.no_grad():
        for group in (runs, after_prompts):
            before = len(graphs)
            for run in group:
                for window in (None, 7, 40):
                    options = dict(NO_OPTIONS, softcap=1.5, window=window)
                    attend_flex(*inputs_of(run), run, **options)
            assert len(graphs) - before <= 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_the_mask_is_made_once_for_a_run_and_a_window(graphs: list[Any]) -> None:
    run, masks = matched_run(100, 60), []
    with torch.no_grad():
        for window in (None, 40) * 2:
            options = dict(NO_OPTIONS, softcap=1.5, window=window)
            attend_flex(*inputs_of(run), run, **options)
            masks.append(run.block_masks[window])
    assert masks[:2] == masks[2:]
    assert masks[0] is not masks[1]


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 300),
)
def test_every_visible_pair_is_in_a_block(
    lengths: list[tuple[int, int]], window: int | None
) -> None:
    run = mismatched_run(*lengths)
    first, last = run.visible_keys(window)
    if not len(first):
        return
    num_keys = sum(run.kv_lengths)
    visible = (first[:, None] <= np.arange(num_keys)) & (np.arange(num_keys) <= last[:, None])
    masks = [
        run.mask(q, kv, window, SINKS) == 0
        for q, kv in zip(run.lengths, run.kv_lengths, strict=True)
    ]
    np.testing.assert_array_equal(visible, torch.block_diag(*masks).numpy())
    partial_blocks, full_blocks = visible_blocks(first, last, num_keys)
    assert not (partial_blocks & full_blocks).any()
    for row, column in np.ndindex(partial_blocks.shape):
        block = visible[128 * row :, 128 * column :][:128, :128]
        if full_blocks[row, column]:
            assert block.shape[1] == 128
            assert block.all()
        elif not partial_blocks[row, column]:
            assert not block.any()


def test_blocks_of_which_no_query_sees_a_key_are_skipped() -> None:
    run = matched_run(*[256] * 4)
    partial_blocks, full_blocks = visible_blocks(*run.visible_keys(None), 1024)
    assert (partial_blocks == np.eye(8, dtype=bool)).all()
    assert full_blocks.sum() == 4


def test_a_kernel_that_cannot_be_compiled_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*arguments: Any) -> None:
        raise exc.InternalTorchDynamoError("no room\nfor more lines")

    monkeypatch.setattr(flex_attention, "_compiled", lambda: failing)
    monkeypatch.setattr(flex_attention, "_failures", [])
    run, options = matched_run(10), dict(NO_OPTIONS, softcap=1.5)
    with pytest.warns(UserWarning, match="cannot be compiled on this machine.*no room$"):
        assert attend_flex(*inputs_of(run), run, **options) is None
    assert flex_attention._failures


@pytest.mark.parametrize(
    ("changes", "usable"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"device": "cpu"}, False),
        ({"tokens": 128}, False),
        ({"size": 8}, False),
        ({"size": 320}, False),
        ({"dropout": 0.1}, False),
    ],
    ids=str,
)
def test_what_the_kernel_takes(changes: dict[str, Any], usable: bool) -> None:
    options = {"dtype": torch.bfloat16, "device": "cuda", "tokens": 129, "size": 64, "dropout": 0.0}
    options |= changes
    shape = 1, HEADS, options["tokens"], options["size"]
    with FakeTensorMode():
        query = torch.empty(shape, dtype=options["dtype"], device=options["device"])
    assert can_use_flex(query, query, options["dropout"]) is usable
