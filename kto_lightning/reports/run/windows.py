"""Windows of a column: the first, last and best values of a run, and standard errors of means."""

import numpy as np
from jaxtyping import Float

from kto_lightning.reports.diagnosis import MARGIN_WINDOW

Values = Float[np.ndarray, " _"]


def window_length(count: int) -> int:
    """An eighth of `count` steps, at least 1 and at most `MARGIN_WINDOW`."""
    return max(1, min(MARGIN_WINDOW, count // 8))


def first_and_last(values: Values) -> tuple[Values, Values]:
    """The first and the last window of a column."""
    window = window_length(len(values))
    return values[:window], values[-window:]


def standard_error(*groups: Values) -> float:
    """The standard error of a mean, or of the difference of two; infinite for single values."""
    if any(len(group) < 2 for group in groups):
        return float("inf")
    return float(np.sqrt(sum(group.var(ddof=1) / len(group) for group in groups)))


def best_window(margins: Values) -> Values | None:
    """The `MARGIN_WINDOW` consecutive margins with the highest mean; None if there are fewer."""
    if len(margins) < MARGIN_WINDOW:
        return None
    sums = np.concatenate([[0.0], np.cumsum(margins)])
    start = int(np.argmax(sums[MARGIN_WINDOW:] - sums[:-MARGIN_WINDOW]))
    return margins[start : start + MARGIN_WINDOW]
