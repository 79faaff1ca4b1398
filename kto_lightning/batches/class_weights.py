r"""Class weights λ_D and λ_U, which balance desirable and undesirable records.

arXiv:2402.01306 recommends (λ_D n_D) : (λ_U n_U) between 1:1 and 3:2; TRL's documentation and this
module, between 1:1 and 4:3. n_D and n_U count the records that are trained on; a record's own
weight does not change the count.
"""

import math
from dataclasses import dataclass
from typing import Literal

from kto_lightning.errors import ConfigError

UPPER_RATIO = 1.33
"""4:3 as TRL 1.16 writes it; the lower bound is 1."""


@dataclass(kw_only=True, slots=True)
class ClassWeights:
    """Factors on the loss of desirable (λ_D) and undesirable (λ_U) records."""

    desirable: float
    undesirable: float


def recommended_weights(num_desirable: int, num_undesirable: int) -> ClassWeights:
    """Weight 1 for the larger class, and for the smaller the one that makes the ratio 1:1.

    Rounded to two decimals. 1 and 1 if a class is absent.
    """
    smaller, larger = sorted((num_desirable, num_undesirable))
    weight = round(larger / smaller, 2) if smaller else 1.0
    if num_desirable < num_undesirable:
        return ClassWeights(desirable=weight, undesirable=1.0)
    return ClassWeights(desirable=1.0, undesirable=weight)


def resolve_weights(
    num_desirable: int,
    num_undesirable: int,
    *,
    desirable: Literal["auto"] | float = "auto",
    undesirable: Literal["auto"] | float = "auto",
) -> ClassWeights:
    """The weights to train with: numbers are kept, `auto` makes the ratio 1:1.

    Raises:
        ConfigError: if a given weight is not a positive, finite number.
    """
    _check_weight("desirable_weight", desirable)
    _check_weight("undesirable_weight", undesirable)
    one_class = not num_desirable or not num_undesirable
    if isinstance(desirable, str):
        if isinstance(undesirable, str):
            return recommended_weights(num_desirable, num_undesirable)
        desirable = 1.0 if one_class else _round(num_undesirable * undesirable / num_desirable)
    elif isinstance(undesirable, str):
        undesirable = 1.0 if one_class else _round(num_desirable * desirable / num_undesirable)
    return ClassWeights(desirable=float(desirable), undesirable=float(undesirable))


def effective_ratio(
    num_desirable: int, num_undesirable: int, weights: ClassWeights
) -> tuple[float, float]:
    """λ_D n_D and λ_U n_U, the total weight of each class, such as 746.0 and 746.76."""
    return weights.desirable * num_desirable, weights.undesirable * num_undesirable


def imbalance_warning(
    num_desirable: int, num_undesirable: int, weights: ClassWeights
) -> str | None:
    """A warning if the ratio of the classes' total weights is outside 1:1 to 4:3, else None.

    As in TRL 1.16 (`KTOTrainer._prepare_dataset`), it is enough that one of the two weights lies
    within the bounds that the other one implies, and these are rounded first. A single class has a
    warning of its own.
    """
    if not num_desirable or not num_undesirable:
        return _single_class_warning(num_desirable, num_undesirable)
    balanced = num_undesirable * weights.undesirable / num_desirable
    lowest_desirable, highest_desirable = (
        _round(balanced),
        _round(balanced * UPPER_RATIO),
    )
    if lowest_desirable <= weights.desirable <= highest_desirable:
        return None
    balanced = num_desirable * weights.desirable / num_undesirable
    lowest_undesirable, highest_undesirable = (
        _round(balanced / UPPER_RATIO),
        _round(balanced),
    )
    if lowest_undesirable <= weights.undesirable <= highest_undesirable:
        return None
    both = effective_ratio(num_desirable, num_undesirable, weights)
    return (
        f"desirable and undesirable records weigh {both[0]:.6g} : {both[1]:.6g} "
        f"({both[0] / both[1]:.3g} : 1), outside 1:1 to 4:3. Set either undesirable_weight to "
        f"{highest_undesirable:g} ({lowest_undesirable:g} to {highest_undesirable:g} fits) or "
        f"desirable_weight to {lowest_desirable:g} ({lowest_desirable:g} to "
        f"{highest_desirable:g} fits), not both."
    )


def _single_class_warning(num_desirable: int, num_undesirable: int) -> str | None:
    if not num_desirable and not num_undesirable:
        return None
    present, absent = (
        ("desirable", "undesirable") if num_desirable else ("undesirable", "desirable")
    )
    return (
        f"all {num_desirable or num_undesirable} records are {present}. KTO learns from the "
        f"contrast of desirable and undesirable completions: add {absent} ones if there are any."
    )


def _check_weight(name: str, weight: Literal["auto"] | float) -> None:
    if weight == "auto":
        return
    if isinstance(weight, str) or not (math.isfinite(weight) and weight > 0):
        raise ConfigError(f"--model.{name} must be 'auto' or a positive number, got {weight}.")


def _round(weight: float) -> float:
    """Round to two decimals, below 0.1 to two significant digits, so that no weight becomes 0."""
    if weight >= 0.1:
        return round(weight, 2)
    return float(f"{weight:.2g}")
