"""What the numbers of many steps say of a run, in plain words and with what to do; each once."""

import math
from collections import deque
from collections.abc import Mapping, Sequence

from kto_lightning.reports.finding import Finding

STUCK_STEPS = 50
"""Steps in a row with raw z0 below 0: were its sign a coin's, one run of 50 in 10^15."""
WINDOW = 20
"""Steps of a class whose mean gradient left is looked at: with batches of 8, some 80 examples."""
MARGIN_WINDOW = 50
"""Steps whose mean margin is looked at: enough to know how far it scatters."""
FALL_ERRORS = 6.0
"""How many standard errors a fall of the margin must be. The best window of a long run is best by
luck too: of 150 simulated runs of 10,000 margins that only scatter, 3% reached 6 and 38% 5."""
LEAST_FALL = 0.1
"""And how much of a reward: as σ' ≤ 1/4, less than this moves the loss by less than 0.025."""
SATURATED = 0.05
"""Share of gradient left below which a class teaches next to nothing: |u| > 4.4."""


def stuck(steps: int, raw: float) -> Finding:
    """What to say of a raw z0 that has been below 0 for so many steps."""
    return Finding(
        grade="note",
        what=f"z0 has been 0 for {steps} steps in a row (raw z0 {raw:.3g})",
        meaning="the policy finds mismatched answers less likely than its reference does. That is "
        "normal while it has learnt little (a small learning rate, warm-up), and where unlearning "
        "undesirable answers makes all answers a little less likely: rewards are then compared "
        "with 0",
        action="look at train/logps/desirable: if it falls too, the policy is moving away from "
        "good answers as well: lower --model.learning_rate, or raise --model.beta or "
        "--model.desirable_weight",
    )


def fallen(best: float, now: float) -> Finding:
    """What to say of a mean margin that was `best` and is `now`."""
    return Finding(
        grade="warning",
        what=f"the margin fell from {best:.3g} to {now:.3g} (means of {MARGIN_WINDOW} steps)",
        meaning="the policy tells desirable from undesirable completions less well than it did",
        action="most often the steps are too large: lower --model.learning_rate, or set "
        "--model.warmup_ratio or --model.gradient_clip_norm. --checkpoint.every_n_steps keeps the "
        "last two states to go back to",
    )


def saturated(label: str, *, left: float, reward: float, point: float) -> Finding:
    """What to say of a class that teaches next to nothing: it is learnt, or it is given up.

    Args:
        label: desirable or undesirable.
        left: the mean share of its gradient that is left.
        reward: its mean reward.
        point: β z0, which rewards are compared with.
    """
    what = f"{label} completions have {left:.1%} of their gradient left (mean of {WINDOW} steps)"
    nothing = "they teach next to nothing any more"
    learnt = reward > point if label == "desirable" else reward < point
    if learnt:
        return Finding(
            grade="note",
            what=what,
            meaning=f"{nothing}: their mean reward {reward:.3g} is far beyond the reference point "
            f"{point:.3g}. Late in a run that means it is done",
            action="stop when val/reward/auc no longer rises. Early in a run "
            "--model.learning_rate or --model.beta is too high: lower it",
        )
    return Finding(
        grade="warning",
        what=what,
        meaning=f"{nothing}, though their mean reward {reward:.3g} is on the wrong side of the "
        f"reference point {point:.3g}: what is that far off, KTO takes for noise",
        action="lower --model.learning_rate or --model.beta, raise "
        f"--model.{label}_weight, or check these labels",
    )


def z0_is_stuck(z0_raw: Sequence[float]) -> bool:
    """Whether the last `STUCK_STEPS` raw reference points are all below 0."""
    return len(z0_raw) >= STUCK_STEPS and all(value < 0 for value in z0_raw[-STUCK_STEPS:])


def margin_has_fallen(best: Sequence[float], now: Sequence[float]) -> bool:
    """Whether the latest margins are clearly below the best of the run: by half of those' mean, by
    `LEAST_FALL` and by `FALL_ERRORS` standard errors of the difference.

    Args:
        best: the `MARGIN_WINDOW` margins in a row with the highest mean.
        now: the latest `MARGIN_WINDOW` margins.
    """
    fall = _mean(best) - _mean(now)
    error = math.sqrt(_variance(best) / len(best) + _variance(now) / len(now))
    return fall > max(LEAST_FALL, abs(_mean(best)) / 2, FALL_ERRORS * error)


def is_saturated(gradient_left: Sequence[float]) -> bool:
    """Whether a class had less than `SATURATED` of its gradient over the last `WINDOW` steps that
    it was in."""
    return len(gradient_left) >= WINDOW and _mean(gradient_left[-WINDOW:]) < SATURATED


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    mean = _mean(values)
    return sum((value - mean) * (value - mean) for value in values) / (len(values) - 1)


class RunningDiagnosis:
    """Reads a run's rows one by one and says what is worth a word, each thing once.

    Args:
        beta: of the loss, to put z0 beside rewards.
    """

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._said: set[str] = set()
        self._z0_raw: deque[float] = deque(maxlen=STUCK_STEPS)
        self._margins: deque[float] = deque(maxlen=MARGIN_WINDOW)
        self._best_margins: list[float] = []
        self._left: dict[str, deque[float]] = {
            label: deque(maxlen=WINDOW) for label in ("desirable", "undesirable")
        }

    def read(self, row: Mapping[str, float]) -> list[str]:
        """What a step's row (`train/…`, without what its batch could not give) gives rise to."""
        found = [self._read_z0(row), self._read_margin(row)]
        found += [self._read_class(row, label) for label in self._left]
        return [sentence for sentence in found if sentence is not None]

    def _once(self, name: str, finding: Finding) -> str | None:
        if name in self._said:
            return None
        self._said.add(name)
        return finding.sentence

    def _read_z0(self, row: Mapping[str, float]) -> str | None:
        self._z0_raw.append(row["train/z0_raw"])
        if not z0_is_stuck(list(self._z0_raw)):
            return None
        return self._once("z0", stuck(STUCK_STEPS, row["train/z0_raw"]))

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
        return self._once("margin", fallen(_mean(self._best_margins), _mean(now)))

    def _read_class(self, row: Mapping[str, float], label: str) -> str | None:
        left = self._left[label]
        if f"train/gradient_left/{label}" not in row:
            return None
        left.append(row[f"train/gradient_left/{label}"])
        if not is_saturated(list(left)):
            return None
        reward, point = row[f"train/reward/{label}"], self._beta * row["train/z0"]
        finding = saturated(label, left=_mean(left), reward=reward, point=point)
        return self._once(label, finding)
