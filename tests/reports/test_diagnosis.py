"""Running diagnosis: when each warning comes, when none does, and that each comes once."""

import math
import random

import pytest

from kto_lightning.reports.diagnosis import (
    STUCK_STEPS,
    WINDOW,
    RunningDiagnosis,
    is_saturated,
    margin_has_fallen,
    z0_is_stuck,
)


def test_z0_is_stuck_after_fifty_steps_below_zero_in_a_row() -> None:
    assert STUCK_STEPS == 50
    assert not z0_is_stuck([-1e-3] * 49)
    assert z0_is_stuck([-1e-3] * 50)
    assert z0_is_stuck([5.0] + [-1e-3] * 50)
    assert not z0_is_stuck([-1e-3] * 49 + [0.0] + [-1e-3] * 49)
    assert not z0_is_stuck([0.0] * 100)  # apo_zero_unpaired, or a policy that has not moved
    assert not z0_is_stuck([-1e-3] * 49 + [math.nan])


@pytest.mark.parametrize(
    ("best", "now", "fallen"),
    [
        ([2.0] * 50, [0.9] * 50, True),  # by 1.1, more than half of 2
        ([2.0] * 50, [1.1] * 50, False),  # by .9, less than half
        ([0.10] * 50, [0.01] * 50, False),  # by nine tenths of next to nothing
        ([0.10] * 50, [-0.1] * 50, True),
        ([-0.1] * 50, [-1.0] * 50, True),  # never good, and ever worse
        # Variance 50/49 each: a standard error of √(2 · 50/49 / 50) = .202, six of them 1.212.
        ([3.0, 1.0] * 25, [1.8, -0.2] * 25, False),  # by 1.2
        ([3.0, 1.0] * 25, [1.75, -0.25] * 25, True),  # by 1.25
        ([2.0] * 50, [math.nan] * 50, False),
    ],
)
def test_a_margin_has_fallen(best: list[float], now: list[float], fallen: bool) -> None:
    assert margin_has_fallen(best, now) is fallen


def test_a_class_is_saturated_below_a_twentieth_over_twenty_steps() -> None:
    assert WINDOW == 20
    assert not is_saturated([0.0] * 19)
    assert is_saturated([1.0] + [0.04] * 20)
    assert not is_saturated([0.05] * 20)
    assert not is_saturated([0.0] * 19 + [1.1])
    assert is_saturated([0.0] * 19 + [0.9])  # a mean of .045


def row(**values: float) -> dict[str, float]:
    """A step's row in which all is well, but for these."""
    healthy = {"z0": 0.5, "z0_raw": 0.5, "reward/margin": 0.2}
    for label, reward in (("desirable", 0.1), ("undesirable", -0.1)):
        healthy |= {f"reward/{label}": reward, f"gradient_left/{label}": 0.9}
    changed = {name.replace("__", "/"): value for name, value in values.items()}
    return {f"train/{name}": value for name, value in (healthy | changed).items()}


def said(rows: list[dict[str, float]], beta: float = 0.1) -> list[tuple[int, str]]:
    """Each warning with the step it came at."""
    diagnosis = RunningDiagnosis(beta)
    return [(step, text) for step, one in enumerate(rows, 1) for text in diagnosis.read(one)]


def test_a_healthy_run_says_nothing() -> None:
    source = random.Random(0)
    rows = [
        row(
            z0_raw=source.gauss(0.1, 1.0),
            reward__margin=source.gauss(min(step, 300) / 300, 1.0),
            gradient_left__desirable=source.uniform(0.1, 1.0),
        )
        for step in range(2000)
    ]
    assert said(rows) == []


def test_a_margin_that_only_scatters_has_not_fallen() -> None:
    """Where the best window is best by luck alone."""
    for seed in range(10):
        source = random.Random(seed)
        assert said([row(reward__margin=source.gauss(0.0, 1.0)) for _ in range(2000)]) == []


def test_z0_at_zero_is_said_once_with_when_it_is_normal() -> None:
    ((step, text),) = said([row(z0=0.0, z0_raw=-0.02)] * 300)
    assert step == 50
    assert text.startswith("z0 has been 0 for 50 steps in a row (raw z0 -0.02)")
    assert "That is normal while" in text
    assert "train/logps/desirable" in text
    assert "--model.learning_rate" in text


def test_a_falling_margin_is_said_once() -> None:
    """Worked by hand: with k of 50 margins 0 after as many of 2, the mean is 2 − k/25, which is
    below half of 2 from k = 26 on; six standard errors are .86 then."""
    high, low = [row(reward__margin=2.0)] * 50, [row(reward__margin=0.0)] * 50
    ((step, text),) = said(high + low + high + low)
    assert step == 76
    assert text.startswith("the margin fell from 2 to 0.96 (means of 50 steps)")
    assert "lower --model.learning_rate" in text
    assert "--checkpoint.every_n_steps" in text


@pytest.mark.parametrize(
    ("label", "reward", "verdict"),
    [
        ("desirable", 9.0, "far beyond the reference point 0.4"),
        ("desirable", -9.0, "on the wrong side of the reference point 0.4"),
        ("desirable", 0.3, "on the wrong side"),
        ("undesirable", -9.0, "far beyond"),
        ("undesirable", 9.0, "on the wrong side"),
    ],
)
def test_a_saturated_class_is_said_by_its_side(label: str, reward: float, verdict: str) -> None:
    values = {f"gradient_left__{label}": 0.01, f"reward__{label}": reward, "z0": 2.0}
    ((step, text),) = said([row(**values)] * 60, beta=0.2)
    assert step == 20
    assert text.startswith(f"{label} completions have 1.0% of their gradient left")
    assert verdict in text
    assert "--model.beta" in text


def test_steps_without_a_class_are_passed_over() -> None:
    """Twenty steps that have it are waited for, and no window is broken by those that lack it."""
    without = row(gradient_left__desirable=0.01, reward__desirable=9.0)
    with_class = dict(without)
    for name in ("gradient_left/desirable", "reward/desirable", "reward/margin"):
        del without[f"train/{name}"]
    assert said([without] * 100) == []
    ((step, _),) = said([without, with_class] * 30)
    assert step == 40


def test_each_class_has_a_warning_of_its_own() -> None:
    lost = row(gradient_left__desirable=0.0, gradient_left__undesirable=0.0)
    assert [step for step, _ in said([lost] * 100)] == [20, 20]
