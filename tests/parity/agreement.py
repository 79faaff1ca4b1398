"""When two traces are the same: the tolerances of the project's second invariant.

Log-probs, loss and gradient norm: 1e-5 relative on the first two steps and 5e-4 later. z0 and
rewards are differences of log-probs that nearly cancel, so that what rounding leaves of them is not
relative: they may differ by that much or by 4·eps·|log-prob| (β times it for rewards), whichever is
larger. After SGD, the weights agree to 1e-4 of the largest movement.
"""

import math

import torch
from torch import Tensor

from tests.parity.trl_trace import Trace

EARLY, LATER = 1e-5, 5e-4
NUM_EARLY_STEPS = 2
_FOUR_EPS = 4 * torch.finfo(torch.float32).eps
RELATIVE_COLUMNS = (
    "train/loss",
    "train/logps/desirable",
    "train/logps/undesirable",
    "train/grad_norm",
)


def assert_traces_agree(ours: Trace, theirs: Trace, *, beta: float) -> None:
    """Every column of every step; a class that is absent must be absent (NaN) in both.

    `theirs` gives the size of the mismatched log-probs. z0 before its clamp is compared where both
    have it.
    """
    num_steps = len(theirs.columns["train/loss"])
    assert len(ours.columns["train/loss"]) == num_steps
    for step in range(num_steps):
        row = {name: values[step] for name, values in theirs.columns.items()}
        relative = EARLY if step < NUM_EARLY_STEPS else LATER
        for name, allowed in _allowed(row, beta, relative).items():
            got, expected = ours.columns[name][step], row[name]
            where = f"step {step + 1}, {name}: got {got!r}, expected {expected!r} ± {allowed:.2g}"
            assert math.isnan(got) == math.isnan(expected), where
            assert math.isnan(expected) or abs(got - expected) <= allowed, where


def _allowed(row: dict[str, float], beta: float, relative: float) -> dict[str, float]:
    """How far each column may be from the value in `row`."""
    allowed = {name: relative * abs(row[name]) for name in RELATIVE_COLUMNS}
    allowed["train/lr"] = 1e-9 * row["train/lr"]
    rounding = {
        "train/z0": _FOUR_EPS * row["mismatched_logps"],
        "train/z0_raw": _FOUR_EPS * row["mismatched_logps"],
        "train/reward/desirable": beta * _FOUR_EPS * abs(row["train/logps/desirable"]),
        "train/reward/undesirable": beta * _FOUR_EPS * abs(row["train/logps/undesirable"]),
    }
    for name, absolute in rounding.items():
        allowed[name] = max(relative * abs(row[name]), absolute)
    allowed["train/reward/margin"] = (
        allowed["train/reward/desirable"] + allowed["train/reward/undesirable"]
    )
    if math.isnan(row["train/z0_raw"]):
        del allowed["train/z0_raw"]
    return allowed


def assert_weights_agree(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], initial: dict[str, Tensor]
) -> None:
    """Weights after SGD: to 1e-4 of the largest movement, which must be at least 1e-3."""
    assert ours.keys() == theirs.keys() == initial.keys()
    movement = largest_difference(theirs, initial)
    assert movement >= 1e-3, f"the weights moved by {movement:.2g} at most, too little to compare"
    difference = largest_difference(ours, theirs)
    assert difference <= 1e-4 * movement, (
        f"{difference:.2g} apart after a movement of {movement:.2g}"
    )


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest absolute difference of any weight; NaN if any is NaN."""
    differences = [(a[name].double() - b[name].double()).abs().max() for name in a]
    return torch.stack(differences).max().item()
