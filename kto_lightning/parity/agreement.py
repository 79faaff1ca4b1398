"""Comparison of two traces: tolerances of every column and of the weights.

Log-probs, loss and gradient norm: 1e-5 relative in the first two steps and 5e-4 later. z0 and
rewards are differences of log-probs that nearly cancel, so their rounding error is not relative to
them: they may differ by the same or by 4·eps·|log-prob| (times β for rewards), whichever is larger.
Token counts are equal. After SGD the weights agree to 1e-4 of the largest update; AdamW divides
every gradient by its own size, which turns the rounding error of one near 0 into a full step.

Some models (linear attention with far from usual weights) are more sensitive than that. What a run
of TRL with every weight moved by its rounding says of it is in `Sensitivity`, by which all
tolerances are multiplied.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kto_lightning.parity.trace import Trace

EARLY, LATER = 1e-5, 5e-4
NUM_EARLY_STEPS = 2
WEIGHTS, MIN_MOVEMENT = 1e-4, 1e-3
_FACTOR_OF_ROUNDING = 4.0
MOST_SENSITIVE = 200.0
"""Larger multiples of the tolerances would let faults pass."""
_FOUR_EPS = 4 * torch.finfo(torch.float32).eps
_RELATIVE_COLUMNS = (
    "train/loss",
    "train/logps/desirable",
    "train/logps/undesirable",
    "train/grad_norm",
)
_IN_EVERY_BATCH = ("train/loss", "train/grad_norm", "train/z0", "train/lr", "train/tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One column, at the step with the largest difference relative to its tolerance."""

    name: str
    step: int
    """From 1."""
    ours: float
    theirs: float
    difference: float
    """Absolute; infinite if only one side has a value, or if a value that every batch has is
    missing or not finite."""
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.difference <= self.allowed

    def __str__(self) -> str:
        expected = f"expected {self.theirs!r} ± {self.allowed:.2g}"
        return f"step {self.step}, {self.name}: got {self.ours!r}, {expected}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """How many times the tolerances rounding needs, at least 1 and at most `MOST_SENSITIVE`."""

    columns: dict[str, float]
    weights: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Movement:
    """The update of the weights by training, and the difference of both sides afterwards."""

    largest: float
    """The largest update of a weight on TRL's side."""
    difference: float
    """The largest difference of a weight between both sides."""
    tolerance: float = WEIGHTS
    """Of `difference`, relative to `largest`."""

    @property
    def is_enough(self) -> bool:
        """Whether the update is large against rounding: float32 rounds a weight of 1 by 6e-8."""
        return self.largest >= MIN_MOVEMENT

    @property
    def share(self) -> float:
        return self.difference / self.largest if self.largest else math.inf

    @property
    def agrees(self) -> bool:
        return self.share <= self.tolerance


def compare(
    ours: Trace, theirs: Trace, *, beta: float, sensitivity: Sensitivity | None = None
) -> list[Comparison]:
    """Compare every column; a class that is absent on one side must be absent on both.

    Args:
        theirs: TRL's trace, whose mismatched log-probs give the tolerance of z0. z0 before the
            clamp is compared where TRL computes it.
        sensitivity: of the model; None: 1.

    Raises:
        ValueError: if the numbers of steps differ.
    """
    num_steps = len(theirs.columns["train/loss"])
    if any(len(ours.columns[name]) != num_steps for name in _RELATIVE_COLUMNS):
        raise ValueError(f"TRL's trace has {num_steps} steps, ours has another number")
    rows = [
        dict(zip(theirs.columns, values, strict=True))
        for values in zip(*theirs.columns.values(), strict=True)
    ]
    factors = {} if sensitivity is None else sensitivity.columns
    worst: dict[str, Comparison] = {}
    for step, row in enumerate(rows, start=1):
        relative = EARLY if step <= NUM_EARLY_STEPS else LATER
        for name, usual in _allowed(row, beta, relative).items():
            allowed = usual * factors.get(name, 1.0)
            found = _compare_step(name, step, ours.columns[name][step - 1], row[name], allowed)
            if found is not None and (name not in worst or _excess(found) > _excess(worst[name])):
                worst[name] = found
    return list(worst.values())


def measure_sensitivity(
    moved: Trace, theirs: Trace, moved_update: Movement, *, beta: float
) -> Sensitivity:
    """Compare two runs of TRL.

    Args:
        moved: with every weight multiplied by 1 ± eps.
        theirs: with the weights as they are.
        moved_update: the difference of their updates.
    """
    found = compare(moved, theirs, beta=beta)
    return Sensitivity(
        columns={comparison.name: _bounded(_excess(comparison)) for comparison in found},
        weights=_bounded(moved_update.share / WEIGHTS if moved_update.is_enough else 0.0),
    )


def _bounded(excess: float) -> float:
    return min(max(_FACTOR_OF_ROUNDING * excess, 1.0), MOST_SENSITIVE)


def _compare_step(
    name: str, step: int, ours: float, theirs: float, allowed: float
) -> Comparison | None:
    """None if neither side has a value."""
    difference = abs(ours - theirs)
    if math.isnan(ours) and math.isnan(theirs) and name not in _IN_EVERY_BATCH:
        return None
    if not math.isfinite(difference):
        difference, allowed = math.inf, 0.0
    return Comparison(
        name=name, step=step, ours=ours, theirs=theirs, difference=difference, allowed=allowed
    )


def _excess(comparison: Comparison) -> float:
    if comparison.allowed:
        return comparison.difference / comparison.allowed
    return math.inf if comparison.difference else 0.0


def _allowed(row: dict[str, float], beta: float, relative: float) -> dict[str, float]:
    """Tolerance of each column for the values in `row`."""
    allowed = {"train/tokens": 0.0} if "train/tokens" in row else {}
    allowed |= {name: relative * abs(row[name]) for name in _RELATIVE_COLUMNS}
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


def movement(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], initial: dict[str, Tensor]
) -> Movement:
    """Compare weights after training.

    Raises:
        ValueError: if the names of the weights differ.
    """
    if not ours.keys() == theirs.keys() == initial.keys():
        names = sorted((ours.keys() ^ theirs.keys()) | (theirs.keys() ^ initial.keys()))
        raise ValueError(f"not every side has the weights {', '.join(names[:5])}")
    return Movement(
        largest=largest_difference(theirs, initial), difference=largest_difference(ours, theirs)
    )


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest absolute difference of any weight; NaN if any is NaN."""
    differences = [(a[name].double() - b[name].double()).abs().max() for name in a]
    return torch.stack(differences).max().item()
