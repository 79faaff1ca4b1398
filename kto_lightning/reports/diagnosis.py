"""Diagnosis of a run from its step metrics: z0 at 0, a falling margin, a saturated class."""

import math
from collections import deque
from collections.abc import Mapping, Sequence

from kto_lightning.reports.finding import Finding

STUCK_STEPS = 50
"""Steps in a row with raw z0 below 0; with random signs this happens once in 10^15."""
WINDOW = 20
"""Steps over which the gradient left is averaged, of those with the class: at a batch size of 8
about 80 examples."""
MARGIN_WINDOW = 50
"""Steps over which the margin is averaged: enough to estimate its standard error."""
FALL_ERRORS = 6.0
"""Least fall of the margin, in standard errors. The maximum over all windows of a long run is high
by chance too: of 150 simulated runs of 10,000 independent margins, 3% reached 6 and 38% reached 5.
"""
MIN_FALL = 0.1
"""Least fall of the margin as a reward: σ' ≤ 1/4, so a smaller one moves the loss by less than
0.025."""
SATURATED = 0.05
"""Share of gradient left below which a class is saturated: |u| > 4.4."""


def z0_finding(num_steps: int, raw: float) -> Finding:
    """The finding for a z0 of 0, with a raw z0 of `raw` nats, in the last `num_steps` steps."""
    return Finding(
        grade="note",
        what=f"z0 has been 0 for {num_steps} steps in a row (raw z0 {raw:.3g})",
        meaning="mismatched completions are less likely under the policy than under the reference, "
        "so rewards are compared with 0. That is normal while the policy has learnt little (a "
        "small learning rate, warm-up), and where unlearning undesirable completions makes all "
        "completions a little less likely",
        action="look at train/logps/desirable: if it falls too, desirable completions are becoming "
        "less likely as well: lower --model.learning_rate, or raise --model.beta or "
        "--model.desirable_weight",
    )


def margin_finding(best: float, now: float) -> Finding:
    """The finding for a mean margin that was `best` and is `now`."""
    return Finding(
        grade="warning",
        what=f"the margin fell from {best:.3g} to {now:.3g} (means of {MARGIN_WINDOW} steps)",
        meaning="the policy separates desirable from undesirable completions less well than before",
        action="most often the learning rate is too high: lower --model.learning_rate, or set "
        "--model.warmup_ratio or --model.gradient_clip_norm. --checkpoint.every_n_steps keeps the "
        "last two checkpoints to resume from",
    )


def saturation_finding(label: str, *, left: float, reward: float, point: float) -> Finding:
    """The finding for a saturated class, whose rewards are far above or below the reference point.

    Args:
        label: desirable or undesirable.
        left: mean share of the gradient left.
        reward: mean reward.
        point: the reference point as a reward, β z0.
    """
    what = f"{label} completions have {left:.1%} of their gradient left (mean of {WINDOW} steps)"
    meaning = "the class is saturated and contributes almost nothing to the updates"
    learnt = reward > point if label == "desirable" else reward < point
    if learnt:
        return Finding(
            grade="note",
            what=what,
            meaning=f"{meaning}: its mean reward {reward:.3g} is far beyond the reference point "
            f"{point:.3g}. Late in a run that is normal",
            action="stop when val/reward/auc no longer rises. Early in a run "
            "--model.learning_rate or --model.beta is too high: lower it",
        )
    return Finding(
        grade="warning",
        what=what,
        meaning=f"{meaning}, though its mean reward {reward:.3g} is on the wrong side of the "
        f"reference point {point:.3g}: KTO treats examples that far off as noise",
        action="lower --model.learning_rate or --model.beta, raise "
        f"--model.{label}_weight, or check these labels",
    )


def z0_is_stuck(z0_raw: Sequence[float]) -> bool:
    """Whether the last `STUCK_STEPS` raw reference points are all below 0."""
    return len(z0_raw) >= STUCK_STEPS and all(value < 0 for value in z0_raw[-STUCK_STEPS:])


def margin_has_fallen(best: Sequence[float], now: Sequence[float]) -> bool:
    """Whether the mean of the latest margins is below the run's best by half of it, by `MIN_FALL`
    and by `FALL_ERRORS` standard errors of the difference.

    Args:
        best: the `MARGIN_WINDOW` margins in a row with the highest mean.
        now: the latest `MARGIN_WINDOW` margins.
    """
    fall = _mean(best) - _mean(now)
    error = math.sqrt(_variance(best) / len(best) + _variance(now) / len(now))
    return fall > max(MIN_FALL, abs(_mean(best)) / 2, FALL_ERRORS * error)


def is_saturated(gradient_left: Sequence[float]) -> bool:
    """Whether the mean share of gradient left over the last `WINDOW` steps is below `SATURATED`.

    Args:
        gradient_left: of the steps that had examples of the class.
    """
    return len(gradient_left) >= WINDOW and _mean(gradient_left[-WINDOW:]) < SATURATED


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    mean = _mean(values)
    return sum((value - mean) * (value - mean) for value in values) / (len(values) - 1)


class RunningDiagnosis:
    """Diagnosis during a run: reads step metrics row by row and gives each warning once.

    Args:
        beta: of the loss; scales z0 to rewards.
    """

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._given: set[str] = set()
        self._z0_raw: deque[float] = deque(maxlen=STUCK_STEPS)
        self._margins: deque[float] = deque(maxlen=MARGIN_WINDOW)
        self._best_margins: list[float] = []
        self._left: dict[str, deque[float]] = {
            label: deque(maxlen=WINDOW) for label in ("desirable", "undesirable")
        }

    def read(self, row: Mapping[str, float]) -> list[str]:
        """The new warnings after a step.

        Args:
            row: metrics by name (`train/…`), without those of a class that the batch lacks.
        """
        found = [self._read_z0(row), self._read_margin(row)]
        found += [self._read_class(row, label) for label in self._left]
        return [sentence for sentence in found if sentence is not None]

    def _once(self, name: str, finding: Finding) -> str | None:
        if name in self._given:
            return None
        self._given.add(name)
        return finding.sentence

    def _read_z0(self, row: Mapping[str, float]) -> str | None:
        self._z0_raw.append(row["train/z0_raw"])
        if not z0_is_stuck(list(self._z0_raw)):
            return None
        return self._once("z0", z0_finding(STUCK_STEPS, row["train/z0_raw"]))

    def _read_margin(self, row: Mapping[str, float]) -> str | None:
        if "train/reward/margin" not in row:
            return None
        self._margins.append(row["train/reward/margin"])
        if len(self._margins) < MARGIN_WINDOW:
            return None
        now = list(self._margins)
        if not self._best_margins or _mean(now) > _mean(self._best_margins):
            self._best_margins = now
        if not margin_has_fallen(self._best_margins, now):
            return None
        return self._once("margin", margin_finding(_mean(self._best_margins), _mean(now)))

    def _read_class(self, row: Mapping[str, float], label: str) -> str | None:
        left = self._left[label]
        if f"train/gradient_left/{label}" not in row:
            return None
        left.append(row[f"train/gradient_left/{label}"])
        if not is_saturated(list(left)):
            return None
        reward, point = row[f"train/reward/{label}"], self._beta * row["train/z0"]
        finding = saturation_finding(label, left=_mean(left), reward=reward, point=point)
        return self._once(label, finding)
