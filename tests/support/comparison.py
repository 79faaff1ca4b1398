"""Comparison of two runs that must give the same numbers: bit for bit, or up to rounding."""

import math
from pathlib import Path

import torch

from tests.support.cli import numbers, rows, weights
from tests.support.tolerances import RELATIVE, assert_same_numbers, logp_rounding


def assert_runs_equal(one: Path, other: Path) -> None:
    """The same rows in `metrics.csv` and the same exported weights, bit for bit."""
    assert rows(one) == rows(other)
    expected = weights(other)
    for name, value in weights(one).items():
        assert torch.equal(value, expected[name]), name


def assert_numbers_agree(
    found: Path, expected: Path, *, stage: str = "train", beta: float = 0.1
) -> None:
    """Every number of `metrics.csv`, up to rounding (`assert_same_numbers`)."""
    pairs = list(zip(numbers(found, stage), numbers(expected, stage), strict=True))
    assert any(not math.isnan(value) for _, row in pairs for value in row.values())
    rounding = logp_rounding(number for _, row in pairs for number in row.items())
    for step, (mine, theirs) in enumerate(pairs, start=1):
        where = f"step {step}, "
        assert_same_numbers(mine, theirs, beta=beta, rounding=rounding, where=where)


def assert_weights_agree(found: Path, expected: Path) -> None:
    """Every exported weight, to 1e-5 of the largest of its tensor."""
    mine, theirs = weights(found), weights(expected)
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        limit = RELATIVE * float(weight.abs().max())
        assert float((mine[name] - weight).abs().max()) <= limit, name


def assert_runs_agree(found: Path, expected: Path, *, held_out: bool = False) -> None:
    """Metrics of every step, exported weights and, with `held_out`, metrics of validation."""
    assert_numbers_agree(found, expected)
    assert_weights_agree(found, expected)
    if held_out:
        assert_numbers_agree(found, expected, stage="val")
