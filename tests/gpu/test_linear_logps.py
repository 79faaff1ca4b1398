"""The log-prob kernels on a GPU: numbers, memory, offsets beyond 2³¹, no synchronisation."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from kto_kernels import linear_logps
from kto_kernels.linear_logps.plan import Mode, Needs, make_plan
from tests.kernels.cases import (
    HEADS,
    TRAINED,
    assert_as_good_as_eager,
    eagerly,
    make_case,
    ours,
    relative_error,
    results,
    small_plan,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WITH_GRADIENT = [Mode.FROZEN_HEAD, *TRAINED]


def make_gpu_case(*shape, **options):
    return make_case(*shape, **options).to(device="cuda")


def run(case, plan):
    trained, frozen = plan.mode in TRAINED, plan.mode is Mode.FROZEN_HEAD
    return results(lambda leaves: ours(leaves, plan), case, trained=trained, frozen=frozen)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.name.lower())
def test_error_is_at_most_twice_that_of_eager(mode, dtype, head) -> None:
    case = make_gpu_case(507, 252, 10_007, dtype=dtype, head=head)
    plan = small_plan(case, mode, rows=200, columns=3000, fused=False)
    assert_as_good_as_eager(case, run(case, plan), mode=mode)


@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("width", [256, 252, 72])
def test_error_with_the_planned_tiles(mode, width) -> None:
    case = make_gpu_case(507, width, 32_003, dtype=torch.bfloat16)
    everything = Needs(hidden=True, weight=True, bias=True)
    plan = replace(make_plan(case.hidden, case.weight, everything), mode=mode)
    assert_as_good_as_eager(case, run(case, plan), mode=mode)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 1000), (507, 256, 32_003), (130, 252, 513)], ids=str)
@pytest.mark.parametrize("num_splits", [None, 1, 5])
def test_fused_kernel(shape, dtype, head, num_splits) -> None:
    from kto_kernels.linear_logps import fused

    case = make_gpu_case(*shape, dtype=dtype, head=head)
    bias = case.bias.float()
    tensors = case.hidden, case.weight, case.targets, bias
    logps = fused.fused_logps(*tensors, head, num_splits=num_splits)
    truth = eagerly(case.to(torch.float64))
    # With float32 accumulators and unrounded logits it is better than eager in half precision.
    allowed = 2 * relative_error(eagerly(case), truth) if dtype == torch.float32 else 1e-4
    assert relative_error(logps, truth) <= allowed
    assert torch.equal(logps, fused.fused_logps(*tensors, head, num_splits=num_splits))


def test_fused_and_tiled_log_probs_agree() -> None:
    # So that policy (with gradient) and reference (without) start at log-ratios of 0.
    case = make_gpu_case(507, 512, 32_003, dtype=torch.bfloat16)
    plan = small_plan(case, Mode.GRADIENT_FREE, rows=507, columns=8192)
    tiled, fused = (ours(case, replace(plan, fused=fused)) for fused in (False, True))
    torch.testing.assert_close(tiled, fused, rtol=1e-5, atol=1e-4)
    for mode in WITH_GRADIENT:
        assert torch.equal(run(case, replace(plan, mode=mode))["logps"], tiled)


@pytest.mark.parametrize("mode", WITH_GRADIENT, ids=lambda mode: mode.name.lower())
def test_the_same_inputs_give_the_same_bits(mode) -> None:
    case = make_gpu_case(507, 256, 32_003, dtype=torch.bfloat16)
    plan = small_plan(case, mode, rows=200, columns=9000)
    once, again = run(case, plan), run(case, plan)
    for name, value in once.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("trained", [False, True])
def test_no_device_synchronisation(trained, monkeypatch) -> None:
    case = make_gpu_case(300, 256, 32_003, dtype=torch.bfloat16)
    tensors = (case.hidden, case.weight, case.bias) if trained else (case.hidden,)
    for tensor in tensors:
        tensor.requires_grad_()

    def step() -> None:
        with torch.no_grad():
            linear_logps(case.hidden, case.weight, case.targets, bias=case.bias)
        linear_logps(case.hidden, case.weight, case.targets, bias=case.bias).sum().backward()

    for budget in ("0", "1000"):
        monkeypatch.setenv("KTO_KERNELS_LOGITS_MIB", budget)
        step()  # compiles, which synchronises
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_autocast() -> None:
    case = make_gpu_case(300, 256, 32_003, bias=False)

    def under_autocast(function):
        def call(leaves):
            with torch.autocast("cuda", torch.bfloat16):
                return function(leaves)

        return call

    truth = results(eagerly, case.to(torch.float64), trained=True)
    theirs = results(under_autocast(eagerly), case, trained=True)
    mine = results(under_autocast(ours), case, trained=True)
    for name, value in mine.items():
        assert value.dtype == torch.float32
        assert relative_error(value, truth[name]) <= 2 * relative_error(theirs[name], truth[name])


@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.name.lower())
def test_peak_memory(mode, monkeypatch) -> None:
    tokens, width, vocabulary = 4096, 512, 151_936
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, vocabulary, (tokens,), device="cuda")
    hidden.requires_grad_(mode is not Mode.GRADIENT_FREE)
    weight.requires_grad_(mode in TRAINED)
    monkeypatch.setenv("KTO_KERNELS_LOGITS_MIB", "4096" if mode is Mode.KEPT else "0")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logps = linear_logps(hidden, weight, targets)
    if logps.requires_grad:
        logps.sum().backward()
    spent = (torch.cuda.max_memory_allocated() - before) / 2**20
    tile = 512 * 1.5  # float32 products and bfloat16 weights
    gradients = vocabulary * width * 2 / 2**20 if mode in TRAINED else 0
    kept = tokens * vocabulary * 2 / 2**20 if mode is Mode.KEPT else 0
    rows = 8 * tokens * width * 4 / 2**20
    assert spent <= tile + gradients + kept + rows + 32


def test_offsets_beyond_31_bits() -> None:
    from kto_kernels.linear_logps import torch_tiles, triton_tiles
    from kto_kernels.linear_logps.head import Head
    from kto_kernels.linear_logps.running import Running

    rows, columns = 70_000, 32_768
    if torch.cuda.get_device_properties(0).total_memory < 32 * 2**30:
        pytest.skip("needs 32 GiB")
    targets = torch.randint(0, columns, (rows,), device="cuda")
    products = torch.empty(rows, columns, device="cuda").normal_()
    assert products.numel() > 2**31
    tail = slice(rows - 100, rows)
    expected_products, found = products[tail].clone(), []
    for operations, tile, part in (
        (torch_tiles, expected_products, tail),
        (triton_tiles, products, slice(0, rows)),
    ):
        running = Running.start(part.stop - part.start, products.device, statistics=False)
        options = {"start": 0, "bias": None, "head": Head(), "weights": tile}
        operations.fold_(tile, running, targets[part], **options)
        found.append((running.others[-100:], running.target[-100:], tile[-100:]))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_targets_outside_the_vocabulary_give_nan() -> None:
    case = make_gpu_case(4, 64, 1000, dtype=torch.bfloat16)
    case.targets = torch.tensor([-100, 0, 999, 1000], device="cuda")
    expected = [True, False, False, True]
    for mode in (Mode.GRADIENT_FREE, Mode.FROZEN_HEAD):
        assert ours(case, small_plan(case, mode)).isnan().tolist() == expected
    plan = small_plan(case, Mode.GRADIENT_FREE, fused=True)
    assert ours(case, plan).isnan().tolist() == expected
