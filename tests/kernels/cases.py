"""Test cases for the log-prob kernels, their float64 results, and the tolerance."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kto_kernels.linear_logps import eager
from kto_kernels.linear_logps.function import _score
from kto_kernels.linear_logps.head import Head
from kto_kernels.linear_logps.plan import Mode, Needs, make_plan
from tests.support.tolerances import EPS, FACTOR, relative_error

TRAINED = (Mode.KEPT, Mode.RECOMPUTED)
HEADS = {
    "plain": Head(),
    "scaled": Head(logit_scale=0.7),
    "capped": Head(logit_scale=1.3, softcap=4.0),
}


@dataclass(kw_only=True)
class Case:
    """Inputs of one call, and the gradient of the loss with respect to its log-probs."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    gradient: Tensor
    bias: Tensor | None = None
    head: Head = field(default_factory=Head)

    def options(self) -> dict:
        return {"logit_scale": self.head.logit_scale, "softcap": self.head.softcap}

    def to(self, dtype: torch.dtype | None = None, device: str | None = None) -> "Case":
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(device=device, dtype=dtype)

        return replace(
            self,
            hidden=move(self.hidden),
            weight=move(self.weight),
            bias=move(self.bias),
            targets=self.targets.to(device=device),
            gradient=self.gradient.to(device=device),
        )


def make_case(
    tokens: int = 123,
    width: int = 72,
    vocabulary: int = 1507,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    head: Head | None = None,
) -> Case:
    """Ragged shapes by default; a quarter of the rows have p(target) close to 1, as in training."""
    weight = torch.randn(vocabulary, width) * 2 / width**0.5
    targets = torch.randint(0, vocabulary, (tokens,))
    hidden = torch.randn(tokens, width)
    confident = tokens // 4
    hidden[:confident] += 4 * weight[targets[:confident]]
    case = Case(
        hidden=hidden,
        weight=weight,
        targets=targets,
        gradient=torch.randn(tokens),
        bias=torch.randn(vocabulary) if bias else None,
        head=head or Head(),
    )
    return case.to(dtype)


def small_plan(case: Case, mode: Mode, *, rows: int = 50, columns: int = 300, **changes):
    """A plan of many ragged tiles."""
    everything = Needs(hidden=True, weight=True, bias=case.bias is not None)
    plan = make_plan(case.hidden, case.weight, everything)
    return replace(plan, mode=mode, rows=rows, columns=columns, **changes)


def ours(case: Case, plan=None) -> Tensor:
    return _score(case.hidden, case.weight, case.targets, case.bias, case.head, plan=plan)[0]


def eagerly(case: Case) -> Tensor:
    return eager.linear_logps(
        case.hidden, case.weight, case.targets, bias=case.bias, **case.options()
    )


def results(
    function: Callable[[Case], Tensor], case: Case, *, trained: bool, frozen: bool = False
) -> dict[str, Tensor]:
    """The log-probs, and the gradients of all inputs, of the hidden states alone, or none."""
    leaves = replace(case)
    if trained or frozen:
        leaves.hidden = case.hidden.detach().clone().requires_grad_()
    if trained:
        leaves.weight = case.weight.detach().clone().requires_grad_()
        leaves.bias = None if case.bias is None else case.bias.detach().clone().requires_grad_()
    logps = function(leaves)
    found = {"logps": logps.detach()}
    if trained or frozen:
        logps.backward(case.gradient.to(logps.dtype))
    for name in ("hidden", "weight", "bias"):
        tensor = getattr(leaves, name)
        if tensor is not None and tensor.grad is not None:
            found[name] = tensor.grad
    return found


def assert_as_good_as_eager(case: Case, found: dict[str, Tensor], *, mode: Mode) -> None:
    """Against float64, the error is at most twice that of eager in the kernel's type."""
    trained, frozen = mode in TRAINED, mode is Mode.FROZEN_HEAD
    truth = results(eagerly, case.to(torch.float64), trained=trained, frozen=frozen)
    reference = results(eagerly, case, trained=trained, frozen=frozen)
    assert found.keys() == truth.keys()
    for name, value in found.items():
        assert value.shape == truth[name].shape
        error = relative_error(value, truth[name])
        allowed = FACTOR * relative_error(reference[name], truth[name])
        assert error <= allowed, f"{name}: off by {error:.2e}, eager by {allowed / FACTOR:.2e}"


def assert_close_to_truth(
    case: Case, found: dict[str, Tensor], truth: dict[str, Tensor], *, num_tiles: int = 1
) -> None:
    """At most twice what eager errs, and what one rounding of every logit makes of each result.

    A case of a few numbers may be one that eager has exactly, so its error alone bounds nothing.
    Rounding the terms of a logit moves it by e = eps·max(|h|·|W| + |b|), a log-prob by at most 2e,
    and by as much, relative to the gradient g that comes back, its gradient g(1[v = y] − p_v).
    Folding `num_tiles` tiles of the vocabulary one after another rounds the running sum as often,
    by eps of itself each time; its logarithm, at most max + log V, is rounded once.
    """
    reference = results(eagerly, case, trained=True)
    hidden, weight = case.hidden.double().abs(), case.weight.double().abs()
    bias = torch.zeros(()) if case.bias is None else case.bias.double().abs()
    terms = hidden @ weight.T + bias.where(bias.isfinite(), 0.0)  # −∞ is exact
    scale = abs(case.head.logit_scale)
    sum_roundings = num_tiles + math.log(len(case.weight))
    moved = EPS * (sum_roundings + scale * float(terms.max()))
    gradient = case.gradient.double().abs()
    reach = {
        "logps": 1.0,
        "hidden": scale * float(gradient.max() * weight.max()),
        "weight": scale * float((gradient @ hidden).max()),
        "bias": scale * float(gradient.sum()),
    }
    for name, value in found.items():
        error, allowed = (
            float((side[name].double() - truth[name]).abs().max()) for side in (found, reference)
        )
        allowed = FACTOR * (allowed + moved * reach[name])
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"
        assert value.shape == truth[name].shape
