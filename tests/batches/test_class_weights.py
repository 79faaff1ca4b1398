"""Class weights, checked with numbers computed by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kto_lightning.batches.class_weights import (
    ClassWeights,
    effective_ratio,
    imbalance_warning,
    recommended_weights,
    resolve_weights,
)
from kto_lightning.errors import ConfigError

COUNTS = st.integers(min_value=1, max_value=10**7)


def pair(weights: ClassWeights) -> tuple[float, float]:
    return weights.desirable, weights.undesirable


@pytest.mark.parametrize(
    ("num_desirable", "num_undesirable", "expected"),
    [
        (746, 254, (1.0, 2.94)),
        (254, 746, (2.94, 1.0)),
        (150, 150, (1.0, 1.0)),
        (1, 10000, (10000.0, 1.0)),
        (1000, 999, (1.0, 1.0)),
        (300, 0, (1.0, 1.0)),
        (0, 300, (1.0, 1.0)),
        (0, 0, (1.0, 1.0)),
    ],
)
def test_the_smaller_class_gets_the_larger_weight(
    num_desirable: int, num_undesirable: int, expected: tuple[float, float]
) -> None:
    assert pair(recommended_weights(num_desirable, num_undesirable)) == expected
    assert pair(resolve_weights(num_desirable, num_undesirable)) == expected


def test_the_effective_ratio_of_claudesidian() -> None:
    weights = recommended_weights(746, 254)
    assert effective_ratio(746, 254, weights) == (746.0, pytest.approx(746.76))


def test_the_other_weight_follows_a_given_one() -> None:
    assert pair(resolve_weights(746, 254, undesirable=1.0)) == (0.34, 1.0)
    assert pair(resolve_weights(746, 254, desirable=2.0)) == (2.0, 5.87)
    assert pair(resolve_weights(1, 10000, desirable=1.0)) == (1.0, 0.0001)
    assert pair(resolve_weights(300, 0, desirable=2.0)) == (2.0, 1.0)
    assert pair(resolve_weights(0, 300, undesirable=2.0)) == (1.0, 2.0)


def test_given_weights_are_kept() -> None:
    assert pair(resolve_weights(746, 254, desirable=7.0, undesirable=0.5)) == (7.0, 0.5)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_is_not_positive_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="undesirable_weight must be 'auto' or a positive number"):
        resolve_weights(746, 254, undesirable=weight)


@pytest.mark.parametrize(
    ("counts", "weights", "fits"),
    [
        # By hand for 746 : 254 and λ_D = 1: λ_U from 2.937 / 1.33 = 2.208 to 2.937.
        ((746, 254), (1.0, 2.94), True),
        # One fitting weight is enough: 254 · 2.95 / 746 = 1.0044 rounds to λ_D's lower bound 1.0,
        ((746, 254), (1.0, 2.95), True),
        ((746, 254), (1.0, 2.96), False),  # and 1.0078 to 1.01;
        # 254 · 2.20 / 746 · 1.33 = 0.9962 rounds to its upper bound 1.0, 0.9917 to 0.99.
        ((746, 254), (1.0, 2.20), True),
        ((746, 254), (1.0, 2.19), False),
        ((746, 254), (1.0, 2.21), True),
        ((746, 254), (1.0, 1.0), False),
        # For λ_U = 1: λ_D from 0.340 to 0.453.
        ((746, 254), (0.34, 1.0), True),
        ((746, 254), (0.45, 1.0), True),
        ((746, 254), (0.46, 1.0), False),
        ((746, 254), (0.33, 1.0), False),
        # A single undesirable record and λ_D = 0.0001: bounds of 0.00 would fit nothing.
        ((10000, 1), (0.0001, 1.0), True),
        ((150, 150), (1.0, 1.0), True),
        ((150, 150), (1.33, 1.0), True),
        ((150, 150), (4 / 3, 1.0), True),
        ((150, 150), (1.5, 1.0), False),
        ((150, 150), (1.0, 1.5), False),
    ],
)
def test_given_weights_are_checked_against_one_to_four_thirds(
    counts: tuple[int, int], weights: tuple[float, float], fits: bool
) -> None:
    warning = imbalance_warning(*counts, ClassWeights(desirable=weights[0], undesirable=weights[1]))
    assert (warning is None) == fits


def test_the_warning_names_the_weights_that_fit() -> None:
    assert imbalance_warning(746, 254, ClassWeights(desirable=1.0, undesirable=1.0)) == (
        "desirable and undesirable records weigh 746 : 254 (2.94 : 1), outside 1:1 to 4:3. Set "
        "either undesirable_weight to 2.94 (2.21 to 2.94 fits) or desirable_weight to 0.34 "
        "(0.34 to 0.45 fits), not both."
    )


def test_a_single_class_is_a_warning() -> None:
    ones = ClassWeights(desirable=1.0, undesirable=1.0)
    assert imbalance_warning(0, 0, ones) is None
    assert imbalance_warning(300, 0, ones) == (
        "all 300 records are desirable. KTO learns from the contrast of desirable and undesirable "
        "completions: add undesirable ones if there are any."
    )
    warning = imbalance_warning(0, 300, ones)
    assert warning is not None
    assert warning.startswith("all 300 records are undesirable.")


@given(COUNTS, COUNTS)
def test_recommended_weights_always_fit(num_desirable: int, num_undesirable: int) -> None:
    weights = recommended_weights(num_desirable, num_undesirable)
    assert min(pair(weights)) == 1.0
    assert imbalance_warning(num_desirable, num_undesirable, weights) is None


@given(COUNTS, COUNTS, st.floats(min_value=1e-3, max_value=1e3), st.booleans())
def test_automatic_weights_always_fit(
    num_desirable: int, num_undesirable: int, weight: float, gives_desirable: bool
) -> None:
    given_weight = {"desirable" if gives_desirable else "undesirable": weight}
    weights = resolve_weights(num_desirable, num_undesirable, **given_weight)
    desirable, undesirable = effective_ratio(num_desirable, num_undesirable, weights)
    assert min(pair(weights)) > 0
    assert desirable / undesirable == pytest.approx(1, rel=0.06)
    assert imbalance_warning(num_desirable, num_undesirable, weights) is None
