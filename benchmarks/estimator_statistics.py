"""How good an estimate is, and whether two contestants differ: numbers in, numbers out."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Float, Int64

SIGNIFICANT = 0.05
MOST_PAIRS = 16
"""The sign-flip test looks at all 2^pairs ways, so many at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """z0 as batches of one size give it, against what the whole data set gives. In nats."""

    size: int
    """Mismatched log-ratios that z0 is taken over."""
    num_batches: int
    se: float
    """Standard deviation of the batches' means, before the clamp."""
    se_independent: float
    """σ/√size: what it were if the members of a batch were independent."""
    se_clamped: float
    """The same after the clamp."""
    bias: float
    """E[max(0, mean)] − max(0, E), which is never negative."""
    rmse: float
    """Root mean square of max(0, mean) − max(0, E): scatter and bias together."""


def estimate(
    means: Float[np.ndarray, " batches"], *, size: int, sigma: float, truth: float
) -> Estimate:
    """The quality of z0 over `size` log-ratios.

    Args:
        means: of batches, before the clamp; at least two.
        sigma: the standard deviation of single log-ratios.
        truth: their mean, E.
    """
    clamped = np.maximum(means, 0.0)
    errors = clamped - max(truth, 0.0)
    return Estimate(
        size=size,
        num_batches=len(means),
        se=float(means.std(ddof=1)),
        se_independent=sigma / math.sqrt(size),
        se_clamped=float(clamped.std(ddof=1)),
        bias=float(errors.mean()),
        rmse=float(np.sqrt(np.square(errors).mean())),
    )


def batch_means(
    values: Float[np.ndarray, " examples"], order: Int64[np.ndarray, " examples"], size: int
) -> Float[np.ndarray, " batches"]:
    """Means over consecutive whole batches of `order`; a smaller last one is left out."""
    whole = len(order) // size * size
    return values[order[:whole]].reshape(-1, size).mean(axis=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Theirs minus ours, pair by pair."""

    mean: float
    se: float
    """The standard error of that mean."""
    p: float
    """How often chance signs alone take the mean as far from zero, of all 2^pairs ways."""

    @property
    def is_noise(self) -> bool:
        return self.p >= SIGNIFICANT


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """The mean difference with its standard error, and the exact sign-flip test of it.

    If contestants do not differ, each pair's difference might as well have the other sign (Fisher
    1935); n pairs give no p below 2^(1−n).

    Raises:
        ValueError: if there are fewer than 2 or more than MOST_PAIRS pairs.
    """
    differences = [their - our for our, their in zip(ours, theirs, strict=True)]
    if not 2 <= len(differences) <= MOST_PAIRS:
        raise ValueError(f"2 to {MOST_PAIRS} pairs can be compared, got {len(differences)}")
    sums = np.array(list(product((1.0, -1.0), repeat=len(differences)))) @ np.array(differences)
    # The observed sum is one of these and must count, whatever rounding makes of the others.
    observed = abs(sum(differences)) - 1e-9 * sum(map(abs, differences))
    return Difference(
        mean=statistics.fmean(differences),
        se=standard_error(differences),
        p=float((np.abs(sums) >= observed).mean()),
    )


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of at least two independent values."""
    return statistics.stdev(values) / math.sqrt(len(values))
