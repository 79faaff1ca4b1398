"""The mode of a call, its cost in matrix products, and the tensors that it keeps."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kto_kernels import linear_logps
from kto_kernels.linear_logps import plan as planning
from kto_kernels.linear_logps.plan import Mode, Needs, choose_mode, make_plan
from tests.kernels.cases import Case, make_case, ours, small_plan

NOTHING = Needs(hidden=False, weight=False, bias=False)
SHAPE = {"tokens": 100, "vocabulary": 1000, "itemsize": 2}


@pytest.mark.parametrize(
    ("needs", "budget", "mode"),
    [
        (NOTHING, 0, Mode.GRADIENT_FREE),
        (replace(NOTHING, hidden=True), 0, Mode.FROZEN_HEAD),
        (replace(NOTHING, hidden=True, weight=True), 200_000, Mode.KEPT),
        (replace(NOTHING, hidden=True, weight=True), 199_999, Mode.RECOMPUTED),
        (replace(NOTHING, weight=True), 200_000, Mode.KEPT),
        (replace(NOTHING, hidden=True, bias=True), 0, Mode.RECOMPUTED),
    ],
)
def test_mode_follows_from_needs_and_budget(needs, budget, mode) -> None:
    assert choose_mode(needs, budget=budget, **SHAPE) is mode


def test_no_gradient_is_needed_under_no_grad() -> None:
    parameter = torch.zeros(2, 2, requires_grad=True)
    with torch.no_grad():
        assert Needs.of(parameter, parameter, None) == NOTHING
    assert Needs.of(parameter.detach(), parameter * 2, None) == replace(NOTHING, weight=True)


def test_budget_from_the_environment(monkeypatch) -> None:
    cpu = torch.device("cpu")
    assert planning.budget_bytes(cpu) == planning.CPU_BUDGET_MIB * 2**20
    monkeypatch.setenv(planning.BUDGET_VARIABLE, "3")
    assert planning.budget_bytes(cpu) == 3 * 2**20
    monkeypatch.setenv(planning.BUDGET_VARIABLE, "3.5")
    with pytest.raises(ValueError, match=r"must be a whole number of MiB, got '3\.5'"):
        planning.budget_bytes(cpu)


@pytest.mark.parametrize(
    ("tokens", "vocabulary"), [(0, 1), (1, 1), (1, 151_936), (257, 128_256), (100_000, 50_257)]
)
def test_tiles_cover_all_logits_evenly(tokens, vocabulary) -> None:
    plan = make_plan(torch.empty(tokens, 1), torch.empty(vocabulary, 1), NOTHING)
    for total, parts in (
        (tokens, plan.row_slices(tokens)),
        (vocabulary, plan.column_slices(vocabulary)),
    ):
        assert [index for part in parts for index in (part.start, part.stop)][1:-1:2] == [
            part.start for part in parts[1:]
        ]
        assert (parts[-1].stop if parts else 0) == total
        sizes = [part.stop - part.start for part in parts]
        assert max(sizes, default=0) - min(sizes, default=0) <= 64 * len(parts)
    assert plan.rows * plan.columns <= 2 * planning.CPU_TILE_ELEMENTS


@pytest.mark.parametrize(("memory_gib", "tile_mib"), [(8, 128), (24, 384), (140, 512)])
@pytest.mark.parametrize("tokens", [1, 100, 8192, 100_000])
@pytest.mark.parametrize("vocabulary", [1, 32_000, 262_144])
def test_tiles_of_a_gpu(tokens, vocabulary, memory_gib, tile_mib) -> None:
    rows, columns = planning.cuda_tile(
        planning.dispatch_for(4096),
        tokens=tokens,
        vocabulary=vocabulary,
        memory=memory_gib * 2**30,
    )
    assert rows <= min(tokens, planning.CUDA_TILE_ROWS)
    assert columns <= vocabulary
    assert rows * columns * 4 <= tile_mib * 2**20 * 1.05
    fills = rows * columns * 4 >= tile_mib * 2**20 * 0.5
    assert fills or columns == vocabulary or rows * vocabulary * 4 < 2 * tile_mib * 2**20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cpus_without_instructions_for_a_type_multiply_in_float32(dtype) -> None:
    tensor = torch.zeros(2, 2, dtype=dtype)
    for supported, expected in ((True, dtype), (False, torch.float32)):
        with mock.patch.object(planning, "_cpu_multiplies", return_value=supported):
            assert planning.compute_dtype(tensor, tensor) is expected


def score(case: Case, mode: Mode) -> None:
    """Run forward, and backward if the mode has one."""
    case.hidden.requires_grad_(mode is not Mode.GRADIENT_FREE)
    case.weight.requires_grad_(mode in (Mode.KEPT, Mode.RECOMPUTED))
    logps = ours(case, small_plan(case, mode))
    if logps.requires_grad:
        logps.sum().backward()


@pytest.mark.parametrize(
    ("mode", "products"),
    [(Mode.GRADIENT_FREE, 1), (Mode.FROZEN_HEAD, 2), (Mode.KEPT, 3), (Mode.RECOMPUTED, 4)],
)
def test_cost_in_matrix_products(mode, products) -> None:
    case = make_case(bias=False)
    (tokens, width), vocabulary = case.hidden.shape, case.weight.shape[0]
    with FlopCounterMode(display=False) as counter:
        score(case, mode)
    assert counter.get_total_flops() == products * 2 * tokens * width * vocabulary


class LargestTensor(TorchDispatchMode):
    """Records the largest storage that an operation returns, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("mode", [Mode.GRADIENT_FREE, Mode.FROZEN_HEAD, Mode.RECOMPUTED])
def test_no_tensor_is_larger_than_a_tile(mode) -> None:
    case = make_case(200, 8, 1000, bias=False)
    with LargestTensor() as largest:
        score(case, mode)
    tile, weight = 50 * 300 * 4, 1000 * 8 * 4
    assert largest.bytes <= max(tile, weight)


@pytest.mark.parametrize(
    ("mode", "elements"),
    [
        (Mode.FROZEN_HEAD, 200 * 8),  # ∂ log p / ∂h alone
        (Mode.RECOMPUTED, 200 * 8 + 1000 * 8 + 3 * 200),  # inputs, three numbers per row
        (Mode.KEPT, 200 * 8 + 1000 * 8 + 3 * 200 + 200 * 1000),
    ],
)
def test_tensors_kept_for_backward(mode, elements) -> None:
    case = make_case(200, 8, 1000, bias=False)
    case.hidden.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda packed: packed):
        ours(case, small_plan(case, mode))
    assert sum(tensor.numel() for tensor in kept if tensor is not None) == elements


def test_the_public_function_respects_the_budget(monkeypatch) -> None:
    case = make_case(200, 8, 10_000, bias=False)
    case.weight.requires_grad_()
    flops = {}
    for budget in ("0", "64"):
        monkeypatch.setenv(planning.BUDGET_VARIABLE, budget)
        case.hidden.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            linear_logps(case.hidden, case.weight, case.targets).sum().backward()
        flops[budget] = counter.get_total_flops()
    assert flops["0"] / flops["64"] == pytest.approx(4 / 3)
