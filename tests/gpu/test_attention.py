"""Attention in half precision by a GPU's kernels, against its definition in float64.

Matched and mismatched run one after another, as in a step: the mismatched one attends to keys and
values that the matched one has left, and its last query stands at its last key.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kto_lightning.models import attention, flex_attention
from kto_lightning.models.attention import packed_attention
from kto_lightning.models.packed_run import PackedRun, PromptStore
from kto_lightning.models.row_indices import interleaved_ranges
from tests.support.attention import by_segment
from tests.support.tolerances import assert_errs_like_plain

HEADS, KV_HEADS = 4, 2
LENGTHS = [(150, 60, 90), (1, 70, 3), (90, 1, 130), (5, 20, 1)]
"""Tokens of prompt, completion and mismatched completion; blocks of the kernels have 64 or 128."""
PROMPTS, COMPLETIONS, OTHERS = (list(column) for column in zip(*LENGTHS, strict=True))
WHOLES = [p + n for p, n in zip(PROMPTS, COMPLETIONS, strict=True)]
STARTS = np.cumsum([0, *WHOLES[:-1]]).tolist()
SINKS = torch.tensor([-1.0, 0.0, 0.5, 2.0])
SCORES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scaling": 0.15},
    "capped": {"softcap": 2.0},
    "sinks": {"sinks": SINKS},
}


class Layer(nn.Module):
    """The attributes of a layer that an attention function reads."""

    layer_idx, config = 0, SimpleNamespace()


def inputs_of(tokens: int, head_size: int, dtype: torch.dtype, *, seed: int) -> list[Tensor]:
    """Queries, keys and values, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, count, tokens, head_size) for count in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def attend_twice(
    matched: list[Tensor], mismatched: list[Tensor], *, sinks: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Both runs by `packed_attention`."""
    layer, device = Layer(), matched[0].device
    store = PromptStore(starts=STARTS, num_rows=sum(WHOLES))
    first = PackedRun(lengths=WHOLES, store=store)
    with first.active():
        found, _ = packed_attention(layer, *matched, None, s_aux=sinks, **options)
    second = PackedRun.after_prompts(store, PROMPTS, OTHERS, device)
    with second.active(), torch.no_grad():
        other, _ = packed_attention(layer, *mismatched, None, s_aux=sinks, **options)
    return found, other


def define_twice(
    matched: list[Tensor], mismatched: list[Tensor], *, sliding_window: int | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Both runs by the definition."""
    options["window"] = sliding_window
    rows = torch.from_numpy(interleaved_ranges(STARTS, PROMPTS)).to(matched[0].device)

    def after_prompts(kept: Tensor, own: Tensor) -> Tensor:
        prompts = kept.detach().index_select(2, rows).split(PROMPTS, 2)
        parts = zip(prompts, own.split(OTHERS, 2), strict=True)
        return torch.cat([piece for pair in parts for piece in pair], dim=2)

    query, *own = mismatched
    keys_and_values = [after_prompts(*pair) for pair in zip(matched[1:], own, strict=True)]
    run = PackedRun(lengths=OTHERS, prefix_lengths=PROMPTS)
    found = by_segment(*matched, PackedRun(lengths=WHOLES), **options)
    with torch.no_grad():
        return found, by_segment(query, *keys_and_values, run, **options)


def run_twice(
    attend: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[list[Tensor], list[Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    **options: Any,
) -> dict[str, Tensor]:
    """What both runs give, and the gradients of the first, on the CPU."""
    leaves, mismatched = ([tensor.to(device, dtype) for tensor in side] for side in inputs)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    if options.get("sinks") is not None:
        options["sinks"] = options["sinks"].to(device, dtype, copy=True).requires_grad_()
    found, other = attend(leaves, mismatched, **options)
    wanted = [*leaves, *([options["sinks"]] if options.get("sinks") is not None else [])]
    generator = torch.Generator().manual_seed(9)
    direction = torch.randn(found.shape, generator=generator)
    gradients = torch.autograd.grad(found, wanted, direction.to(device, dtype))
    names = ("matched", "mismatched", "queries", "keys", "values", "sinks")
    values = (found.detach(), other, *gradients)
    return {name: value.cpu() for name, value in zip(names, values, strict=False)}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of them were called."""
    called: list[str] = []

    def record(name: str) -> None:
        function = getattr(attention, name)

        def recorded(*arguments: Any, **options: Any) -> Any:
            called.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(attention, name, recorded)

    record("_attend_varlen")
    record("attend_flex")
    return called


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by the compiler
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("window", [None, 48], ids=["", "window"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_size", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_both_runs_and_every_gradient_err_like_plain_code(
    head_size: int,
    dtype: torch.dtype,
    window: int | None,
    scores: str,
    device: torch.device,
    kernels: list[str],
) -> None:
    options = SCORES[scores] | {"sliding_window": window}
    inputs = (
        inputs_of(sum(WHOLES), head_size, dtype, seed=0),
        inputs_of(sum(OTHERS), head_size, dtype, seed=1),
    )
    found = run_twice(attend_twice, inputs, device, dtype, **options)
    plain = run_twice(define_twice, inputs, device, dtype, **options)
    truth = run_twice(define_twice, inputs, torch.device("cpu"), torch.float64, **options)
    assert found.keys() == truth.keys()
    eps = torch.finfo(dtype).eps
    for name, value in truth.items():
        assert_errs_like_plain(found[name], plain[name], value, name=name, eps=eps)
    kernel = "attend_flex" if {"softcap", "sinks"} & options.keys() else "_attend_varlen"
    assert kernels == [kernel] * 2 * (device.type == "cuda")
    assert not flex_attention._failures  # after which it attends segment by segment


def test_a_shift_of_the_queries_would_be_seen() -> None:
    """Aligned at the beginning, as other libraries do, the mismatched run is far off."""
    inputs = (
        inputs_of(sum(WHOLES), 64, torch.float64, seed=0),
        inputs_of(sum(OTHERS), 64, torch.float64, seed=1),
    )
    _, truth = define_twice(*inputs, sliding_window=None)
    shifted = [inputs[1][0].roll(1, 2), *inputs[1][1:]]
    _, other = define_twice(inputs[0], shifted, sliding_window=None)
    assert (other - truth).norm() > 0.1 * truth.norm()


@pytest.mark.parametrize("head_size", [8, 80, 256])
def test_head_sizes_of_other_models(head_size: int, device: torch.device) -> None:
    inputs = (
        inputs_of(sum(WHOLES), head_size, torch.bfloat16, seed=0),
        inputs_of(sum(OTHERS), head_size, torch.bfloat16, seed=1),
    )
    options: dict[str, Any] = {"sliding_window": None}
    found = run_twice(attend_twice, inputs, device, torch.bfloat16, **options)
    plain = run_twice(define_twice, inputs, device, torch.bfloat16, **options)
    truth = run_twice(define_twice, inputs, torch.device("cpu"), torch.float64, **options)
    for name, value in truth.items():
        assert_errs_like_plain(
            found[name], plain[name], value, name=name, eps=torch.finfo(torch.bfloat16).eps
        )
