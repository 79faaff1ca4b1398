"""Tests of the Triton kernels on a CPU, under Triton's interpreter; `test_triton.py` runs them.

An environment variable selects the interpreter at import, so these tests need their own process.
The interpreter's `tl.dot` is wrong for bfloat16, hence float32 and float16 only; tiles are tiny
because one iteration of a kernel's loop takes milliseconds.
"""

import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError("run by tests/kernels/test_triton.py, which sets TRITON_INTERPRET=1")

from kto_kernels.linear_logps import fused, torch_tiles, triton_tiles
from kto_kernels.linear_logps.plan import Mode
from kto_kernels.linear_logps.running import Running
from kto_kernels.linear_logps.tiles import tile_operations
from tests.kernels.cases import (
    HEADS,
    TRAINED,
    assert_as_good_as_eager,
    assert_close_to_truth,
    eagerly,
    make_case,
    ours,
    relative_error,
    results,
    small_plan,
)

CPU = torch.device("cpu")
BLOCKS = fused.Blocks(
    tokens=16, vocabulary=32, width=16, num_warps=4, num_stages=2, descriptors=False
)


def test_the_triton_kernels_are_used() -> None:
    assert tile_operations(CPU) is triton_tiles


@pytest.mark.parametrize(("dtype", "head"), [(torch.float32, "capped"), (torch.float16, "scaled")])
@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.name.lower())
def test_row_kernels_in_every_mode(mode, dtype, head, monkeypatch) -> None:
    monkeypatch.setattr(triton_tiles, "MAX_BLOCK", 32)  # so that a row takes several blocks
    case = make_case(9, 24, 110, dtype=dtype, head=HEADS[head])
    plan = small_plan(case, mode, rows=6, columns=70)
    trained, frozen = mode in TRAINED, mode is Mode.FROZEN_HEAD
    found = results(lambda leaves: ours(leaves, plan), case, trained=trained, frozen=frozen)
    assert_as_good_as_eager(case, found, mode=mode)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(
    ("dtype", "with_bias"), [(torch.float32, False), (torch.bfloat16, True)], ids=str
)
def test_row_kernels_equal_torch_tiles(dtype, with_bias, head) -> None:
    rows, width, start = 5, 70, 30
    targets = torch.tensor([0, 30, 65, 99, 100])  # before, first, inside, last, after
    bias = torch.randn(width) if with_bias else None
    if bias is not None:
        bias[3:9] = -torch.inf
    found = []
    for operations in (torch_tiles, triton_tiles):
        torch.manual_seed(3)
        running = Running.start(rows, CPU, statistics=True)
        running.max.copy_(torch.tensor([-torch.inf, -5.0, 0.0, 3.0, 50.0]))
        running.others.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]))
        products = torch.randn(rows, width) * 5
        weights = products if dtype == torch.float32 else torch.empty(rows, width, dtype=dtype)
        columns = {"start": start, "bias": bias, "head": head}
        shrink = operations.fold_(products, running, targets, weights=weights, **columns)
        gradient = torch.empty(rows, width, dtype=dtype)
        operations.unit_gradient_(
            torch.randn(rows, width),
            running.max + 1,
            running.others,
            targets,
            out=gradient,
            **columns,
        )
        shrunk = operations.shrink_rows_(torch.randn(rows, 9), shrink)
        found.append((shrink, weights, gradient, shrunk, *_tensors(running)))
    for torch_s, triton_s in zip(*found, strict=True):
        # The interpreter truncates float32 to bfloat16; PyTorch rounds.
        tolerance = 2**-7 if triton_s.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(triton_s, torch_s, rtol=tolerance, atol=1e-5 * 8, equal_nan=True)


def _tensors(running: Running):
    yield from (running.max, running.others, running.target)
    yield from (running.logit_sum, running.weighted_sum)


@pytest.mark.parametrize(
    ("head", "num_splits", "descriptors"),
    [("plain", 1, False), ("plain", 3, True), ("scaled", 3, False), ("capped", 2, True)],
)
def test_fused_kernel(head, num_splits, descriptors) -> None:
    case = make_case(37, 40, 203, head=HEADS[head], bias=num_splits == 3)
    exact, logps = case.to(torch.float64), fused_logps(case, num_splits, descriptors=descriptors)
    truth = results(eagerly, exact, trained=False)["logps"]
    reference = results(eagerly, case, trained=False)["logps"]
    assert relative_error(logps, truth) <= 2 * relative_error(reference, truth)


def test_fused_kernel_in_the_public_function() -> None:
    case = make_case(20, 32, 150)
    plan = small_plan(case, Mode.GRADIENT_FREE, fused=True)
    assert_as_good_as_eager(case, {"logps": ours(case, plan)}, mode=Mode.GRADIENT_FREE)


def test_fused_kernel_in_half_precision() -> None:
    case = make_case(20, 32, 150, dtype=torch.float16)
    truth = results(eagerly, case.to(torch.float64), trained=False)["logps"]
    assert relative_error(fused_logps(case, 2), truth) < 1e-5  # logits are never rounded


def test_fused_kernel_with_a_split_of_minus_infinity() -> None:
    case = make_case(5, 16, 96)
    case.bias[32:] = -torch.inf
    case.bias[:32] -= 1e4
    case.targets = torch.arange(5)
    truth = results(eagerly, case.to(torch.float64), trained=False)
    assert_close_to_truth(case, {"logps": fused_logps(case, 3)}, truth)


def test_targets_outside_the_vocabulary_give_nan() -> None:
    case = make_case(3, 16, 96)
    case.targets = torch.tensor([-100, 5, 96])
    assert fused_logps(case, 2).isnan().tolist() == [True, False, True]
    running = Running.start(3, CPU, statistics=False)
    triton_tiles.fold_(
        case.hidden @ case.weight.t(),
        running,
        case.targets,
        start=0,
        bias=None,
        head=case.head,
        weights=None,
    )
    assert running.finish(case.head).logps.isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("tokens", [0, 1])
def test_fused_kernel_of_few_tokens(tokens) -> None:
    case = make_case(tokens, 1, 1, bias=False)
    assert fused_logps(case, 1).tolist() == [0.0] * tokens


def fused_logps(case, num_splits, *, descriptors=False):
    bias = None if case.bias is None else case.bias.float()
    blocks = replace(BLOCKS, descriptors=descriptors)
    return fused.fused_logps(
        case.hidden,
        case.weight,
        case.targets,
        bias,
        case.head,
        blocks=blocks,
        num_splits=num_splits,
    )
