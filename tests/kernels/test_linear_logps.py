"""Log-probs and gradients of every mode, against float64."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kto_kernels import linear_logps, linear_logps_with_statistics
from kto_kernels.linear_logps import eager
from kto_kernels.linear_logps.plan import Mode
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
from tests.support.tolerances import EPS, assert_errs_like_plain

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WITH_GRADIENT = [Mode.FROZEN_HEAD, *TRAINED]
OURS_EAGER_TRUTH = (
    (linear_logps, torch.float32),
    (eager.linear_logps, torch.float32),
    (eager.linear_logps, torch.float64),
)


def run(case, mode, **tiling):
    plan = small_plan(case, mode, **tiling)
    return results(
        lambda leaves: ours(leaves, plan),
        case,
        trained=mode in TRAINED,
        frozen=mode is Mode.FROZEN_HEAD,
    )


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.name.lower())
def test_error_is_at_most_twice_that_of_eager(mode, dtype, head) -> None:
    case = make_case(dtype=dtype, head=head)
    assert_as_good_as_eager(case, run(case, mode), mode=mode)


@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("bias", [True, False])
def test_reads_no_uninitialised_memory(mode, bias) -> None:
    case = make_case(bias=bias, head=HEADS["capped"])
    expected = run(case, mode)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        found = run(case, mode)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 33),
    vocabulary=st.integers(1, 300),
    rows=st.integers(1, 48),
    columns=st.integers(1, 310),
    mode=st.sampled_from(list(Mode)),
    head=st.sampled_from(list(HEADS.values())),
    bias=st.booleans(),
)
def test_any_shape_in_any_tiles(tokens, width, vocabulary, rows, columns, mode, head, bias) -> None:
    case = make_case(tokens, width, vocabulary, head=head, bias=bias)
    truth = results(eagerly, case.to(torch.float64), trained=True)
    found = run(case, mode, rows=rows, columns=columns)
    assert_close_to_truth(case, found, truth, num_tiles=math.ceil(vocabulary / columns))


def test_matches_values_computed_by_hand() -> None:
    # Two tokens of the vocabulary with logits (ln 3, 0): p = (3/4, 1/4).
    hidden = torch.tensor([[math.log(3.0), 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 5.0], [0.0, 2.0]], requires_grad=True)
    logps = linear_logps(hidden, weight, torch.tensor([0]))
    logps.backward()
    assert logps.item() == pytest.approx(math.log(0.75))
    # (1 − p_0) W_0 − p_1 W_1 = (1/4)(1, 5) − (1/4)(0, 2)
    assert hidden.grad.tolist() == [pytest.approx([0.25, 0.75])]
    # (1[v = y] − p_v) h
    step = 0.25 * math.log(3.0)
    assert weight.grad[0].tolist() == pytest.approx([step, 0.0])
    assert weight.grad[1].tolist() == pytest.approx([-step, 0.0])


@pytest.mark.parametrize("mode", WITH_GRADIENT, ids=lambda mode: mode.name.lower())
def test_a_near_certain_token_has_a_gradient(mode) -> None:
    # 1 − p(target) = e⁻²⁰, which is 0 if computed from p(target) in float32.
    case = make_case(1, 2, 2, bias=False)
    case.hidden = torch.tensor([[20.0, 0.0]])
    case.weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    case.targets = torch.tensor([0])
    case.gradient = torch.ones(1)
    found = run(case, mode)["hidden"]
    truth = results(eagerly, case.to(torch.float64), trained=False, frozen=True)["hidden"]
    # e⁻²⁰ has the rounding of 20 as its relative error.
    torch.testing.assert_close(found.double(), truth, rtol=4 * EPS * 20, atol=0)


def test_every_mode_and_run_gives_the_same_bits() -> None:
    case = make_case(300, 64, 5003)
    forwards = [run(case, mode, rows=128, columns=2048)["logps"] for mode in Mode]
    for logps in forwards[1:]:
        assert torch.equal(logps, forwards[0])
    for mode in WITH_GRADIENT:
        once, again = run(case, mode), run(case, mode)
        for name, value in once.items():
            assert torch.equal(value, again[name]), (mode, name)


@pytest.mark.parametrize("mode", WITH_GRADIENT, ids=lambda mode: mode.name.lower())
def test_a_second_backward_adds_the_same_gradient(mode) -> None:
    case = make_case()
    case.hidden.requires_grad_()
    logps = ours(case, small_plan(case, mode))
    logps.backward(case.gradient, retain_graph=True)
    once = case.hidden.grad.clone()
    logps.backward(case.gradient)
    assert torch.equal(case.hidden.grad, 2 * once)


def test_no_tokens() -> None:
    hidden = torch.zeros(0, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    bias = torch.randn(50, requires_grad=True)
    logps = linear_logps(hidden, weight, torch.zeros(0, dtype=torch.long), bias=bias)
    assert logps.shape == (0,)
    logps.sum().backward()
    assert hidden.grad.shape == (0, 8)
    assert not weight.grad.any()
    assert not bias.grad.any()
    frozen = linear_logps(hidden, weight.detach(), torch.zeros(0, dtype=torch.long))
    frozen.sum().backward()


def test_tied_weights_get_both_gradients() -> None:
    case = make_case(40, 16, 90, bias=False)
    found = []
    for function, dtype in OURS_EAGER_TRUTH:
        table = case.weight.to(dtype, copy=True).requires_grad_()
        hidden = torch.tanh(table[case.targets.roll(1)])
        function(hidden, table, case.targets).backward(case.gradient.to(dtype))
        found.append(table.grad)
    assert_errs_like_plain(*found)


def test_an_adapter_on_the_head() -> None:
    case = make_case(40, 16, 90, bias=False)
    found, adapter = [], (torch.randn(4, 16), torch.randn(90, 4))
    for function, dtype in OURS_EAGER_TRUTH:
        down, up = (matrix.to(dtype, copy=True).requires_grad_() for matrix in adapter)
        hidden, weight = case.hidden.to(dtype), case.weight.to(dtype) + 0.5 * up @ down
        function(hidden, weight, case.targets).backward(case.gradient.to(dtype))
        found.append((down.grad, up.grad))
    for gradients in zip(*found, strict=True):
        assert_errs_like_plain(*gradients)


@pytest.mark.parametrize("trained", [True, False])
def test_autocast_multiplies_in_its_type_and_returns_float32(trained) -> None:
    case = make_case(bias=False)

    def under_autocast(function):
        def call(leaves):
            with torch.autocast("cpu", torch.bfloat16):
                return function(leaves)

        return call

    truth = results(eagerly, case.to(torch.float64), trained=trained, frozen=True)
    theirs = results(under_autocast(eagerly), case, trained=trained, frozen=True)
    mine = results(under_autocast(ours), case, trained=trained, frozen=True)
    assert mine["logps"].dtype == mine["hidden"].dtype == torch.float32
    for name, value in mine.items():
        error, eager_error = (relative_error(x, truth[name]) for x in (value, theirs[name]))
        assert 1e-5 < error <= 2 * eager_error, name  # products were in bfloat16


@pytest.mark.parametrize("mode", TRAINED, ids=lambda mode: mode.name.lower())
def test_a_loss_scale_does_not_overflow_half_precision(mode) -> None:
    case = make_case(bias=False)
    plan = small_plan(case, mode, compute_dtype=torch.float16)
    plain = results(lambda leaves: ours(leaves, plan), case, trained=True)["weight"]
    case.gradient = case.gradient * 2**20
    scaled = results(lambda leaves: ours(leaves, plan), case, trained=True)["weight"]
    torch.testing.assert_close(scaled, plain * 2**20)


@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.name.lower())
def test_half_precision_parameters_with_float32_products(mode) -> None:
    # As on a CPU without bfloat16 instructions: parameters are cast one slice at a time.
    case = make_case(dtype=torch.bfloat16)
    found = run(case, mode, compute_dtype=torch.float32)
    for name in found.keys() - {"logps"}:
        assert found[name].dtype == torch.bfloat16
    assert_as_good_as_eager(case, found, mode=mode)


def test_targets_of_any_integer_type() -> None:
    case = make_case()
    for dtype in (torch.int32, torch.int16):
        expected = linear_logps(case.hidden, case.weight, case.targets)
        assert torch.equal(linear_logps(case.hidden, case.weight, case.targets.to(dtype)), expected)


def test_tensors_that_are_not_contiguous() -> None:
    case = make_case(bias=False)
    hidden = case.hidden.t().contiguous().t().requires_grad_()
    weight = case.weight.t().contiguous().t().requires_grad_()
    logps = linear_logps(hidden, weight, case.targets)
    logps.sum().backward()  # its gradient is an expanded 1
    found = {"logps": logps.detach(), "hidden": hidden.grad, "weight": weight.grad}
    whole = replace(case, gradient=torch.ones(123))
    assert_as_good_as_eager(whole, found, mode=Mode.KEPT)


def test_masked_vocabulary_and_huge_logits() -> None:
    case = make_case(30, 16, 700)
    case.bias[400:] = -torch.inf
    case.bias[:300] = -torch.inf  # whole tiles without a finite logit, first and last
    case.targets = torch.randint(300, 400, (30,))
    for shift in (0.0, -1e4, 1e4):
        shifted = replace(case, bias=case.bias + shift)
        truth = results(eagerly, shifted.to(torch.float64), trained=True)
        for mode in WITH_GRADIENT:
            assert_close_to_truth(shifted, run(shifted, mode, columns=100), truth)


def test_a_target_of_probability_zero() -> None:
    case = make_case(4, 16, 60)
    case.bias[int(case.targets[0])] = -torch.inf
    case.targets[1:] = (case.targets[0] + 1) % 60
    logps = ours(case)
    assert logps[0] == -torch.inf
    assert logps[1:].isfinite().all()


@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_statistics(mode, head) -> None:
    from kto_kernels.linear_logps.function import _score

    case = make_case(head=head)
    case.hidden.requires_grad_(mode is not Mode.GRADIENT_FREE)
    logps, entropy, mean_logit = _score(
        case.hidden,
        case.weight,
        case.targets,
        case.bias,
        head,
        statistics=True,
        plan=small_plan(case, mode),
    )
    plain, truth = (
        eager.eager_logits(c.hidden, c.weight, bias=c.bias, **c.options())
        for c in (case, case.to(torch.float64))
    )
    entropies = (torch.distributions.Categorical(logits=z).entropy() for z in (plain, truth))
    assert_errs_like_plain(entropy, *entropies)
    assert_errs_like_plain(mean_logit, plain.mean(dim=1), truth.mean(dim=1))
    assert not entropy.requires_grad
    assert not mean_logit.requires_grad
    assert torch.equal(logps, ours(case, small_plan(case, mode)))
    assert logps.requires_grad == (mode is not Mode.GRADIENT_FREE)


def test_statistics_of_the_public_function() -> None:
    hidden = torch.zeros(3, 8, requires_grad=True)
    weight = torch.randn(7, 8)
    statistics = linear_logps_with_statistics(hidden, weight, torch.tensor([0, 3, 6]))
    uniform = torch.full((3,), math.log(7))
    torch.testing.assert_close(statistics.entropy, uniform)
    torch.testing.assert_close(statistics.logps, -uniform)
    assert not statistics.mean_logit.any()


class TestErrors:
    hidden, weight = torch.zeros(3, 4), torch.zeros(10, 4)
    targets = torch.tensor([0, 1, 2])

    def test_target_outside_the_vocabulary(self) -> None:
        with pytest.raises(IndexError, match=r"targets must lie in \[0, 10\), got -100 to 1"):
            linear_logps(self.hidden, self.weight, torch.tensor([0, 1, -100]))

    def test_types_that_differ(self) -> None:
        with pytest.raises(TypeError, match=r"hidden is torch\.bfloat16 and weight torch\.float32"):
            linear_logps(self.hidden.bfloat16(), self.weight, self.targets)

    def test_double_precision(self) -> None:
        with pytest.raises(TypeError, match="must be float32, bfloat16 or float16"):
            linear_logps(self.hidden.double(), self.weight.double(), self.targets)

    @pytest.mark.parametrize("softcap", [0.0, -30.0, math.inf])
    def test_softcap(self, softcap) -> None:
        with pytest.raises(ValueError, match="softcap must be a positive finite number"):
            linear_logps(self.hidden, self.weight, self.targets, softcap=softcap)

    def test_logit_scale(self) -> None:
        with pytest.raises(ValueError, match="logit_scale must be a finite number, got nan"):
            linear_logps(self.hidden, self.weight, self.targets, logit_scale=math.nan)
