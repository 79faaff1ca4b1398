"""The order of labels along the file, and the share of single-label batches that it gives.

Needs neither torch nor datasets, so that `report` starts fast.
"""

from math import exp, inf, lgamma
from typing import Literal

import numpy as np
from jaxtyping import Bool

from kto_lightning.reports.data.fields import Order, PerClass

ALTERNATING = 0.8
"""Least share of neighbours with different labels that is called alternating; at most a half is
expected by chance."""
SORTED = 0.1
"""Share of the changes expected by chance below which labels are called sorted."""


def order_of(desirable: Bool[np.ndarray, " records"], *, batch_size: int) -> Order:
    """The order of the labels, and the share of single-label batches in file order and shuffled."""
    good, bad = int(desirable.sum()), int((~desirable).sum())
    total = good + bad
    changes = share(desirable[1:] != desirable[:-1])
    # Two records drawn without replacement have different labels.
    by_chance = 2 * good * bad / (total * (total - 1)) if total > 1 else None
    kind, rule = _kind_of_order(changes, by_chance)
    return Order(
        kind=kind if total else "none",
        rule=rule if total else "there is no record",
        changes=changes,
        changes_by_chance=by_chance,
        longest_run=PerClass(
            desirable=_longest_run(desirable), undesirable=_longest_run(~desirable)
        ),
        batch_size=batch_size,
        single_label_batches=_single_label_share(desirable, batch_size),
        single_label_batches_shuffled=single_label_chance(good, bad, batch_size),
    )


def _kind_of_order(
    changes: float | None, by_chance: float | None
) -> tuple[Literal["alternating", "natural", "sorted", "one label"], str]:
    if changes is None or not by_chance:
        return "one label", "all records have the same label"
    found = f"{changes:.0%} of neighbours have different labels, {by_chance:.0%} would by chance"
    if changes >= ALTERNATING:
        return "alternating", f"{found}; from {ALTERNATING:.0%} on this is called alternating"
    if changes < SORTED * by_chance:
        return "sorted", f"{found}; below {SORTED:.0%} of chance this is called sorted"
    return "natural", f"{found}; between sorted and alternating"


def _longest_run(marked: Bool[np.ndarray, " records"]) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked, [False]]).astype(np.int8)))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def _single_label_share(desirable: Bool[np.ndarray, " records"], batch_size: int) -> float | None:
    num_batches = len(desirable) // batch_size
    good = desirable[: num_batches * batch_size].reshape(num_batches, batch_size).sum(axis=1)
    return share((good == 0) | (good == batch_size))


def single_label_chance(num_desirable: int, num_undesirable: int, batch_size: int) -> float | None:
    """Probability that a shuffled batch has one label only; None if there are too few records."""
    total = num_desirable + num_undesirable
    if total < batch_size:
        return None
    ways = [_log_comb(count, batch_size) for count in (num_desirable, num_undesirable)]
    return sum(exp(way - _log_comb(total, batch_size)) for way in ways)


def _log_comb(total: int, size: int) -> float:
    """log of the binomial coefficient, which may have millions of digits."""
    if size > total:
        return -inf
    return lgamma(total + 1) - lgamma(size + 1) - lgamma(total - size + 1)


def share(marked: Bool[np.ndarray, " _"]) -> float | None:
    """The share of marked records; None of no records."""
    return float(marked.mean()) if len(marked) else None
