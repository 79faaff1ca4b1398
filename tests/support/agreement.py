"""Runs that differ only in how they were computed, by how many ranks or under which strategy."""

import math
from pathlib import Path

import torch

from tests.support.cli import numbers, weights

RELATIVE = 1e-5
EPSILONS = 4 * torch.finfo(torch.float32).eps
"""How far float32 rounds the log-probs that z0 and rewards are differences of."""


def assert_numbers_agree(
    found: Path, expected: Path, *, stage: str = "train", beta: float = 0.1
) -> None:
    """Every number of `metrics.csv` to 1e-5 relative; z0 and rewards to that or to the rounding of
    the log-probs that they are differences of."""
    pairs = list(zip(numbers(found, stage), numbers(expected, stage), strict=True))
    assert any(not math.isnan(value) for _, row in pairs for value in row.values())
    # Per-class means hide longer sequences: twice the mean bounds what rounds in these data.
    logps = [abs(v) for _, row in pairs for k, v in row.items() if "logps" in k and v == v]
    noise = EPSILONS * 2 * max(logps)
    for step, (mine, theirs) in enumerate(pairs, start=1):
        for name, value in theirs.items():
            where = f"step {step}, {name}: {mine[name]} for {value}"
            assert math.isnan(mine[name]) == math.isnan(value), where
            absolute = noise if "/z0" in name else beta * noise if "/reward/" in name else 1e-6
            assert not abs(mine[name] - value) > max(RELATIVE * abs(value), absolute), where


def assert_weights_agree(found: Path, expected: Path) -> None:
    """Every exported weight to 1e-5 of its tensor's largest."""
    mine, theirs = weights(found), weights(expected)
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        limit = RELATIVE * float(weight.abs().max())
        assert float((mine[name] - weight).abs().max()) <= limit, name


def assert_runs_agree(found: Path, expected: Path, *, held_out: bool) -> None:
    """Numbers of every step, exported weights, and the held-out numbers where there are some."""
    assert_numbers_agree(found, expected)
    assert_weights_agree(found, expected)
    if held_out:
        assert_numbers_agree(found, expected, stage="val")
