"""Groups of rows of similar length, so that little of them is padding."""

import numpy as np
from jaxtyping import Int64

PADDING_SHARE = 0.1
"""Most padding of all groups together, as a share of the tokens."""


def row_groups(
    lengths: Int64[np.ndarray, " rows"], *, padding_share: float = PADDING_SHARE
) -> list[Int64[np.ndarray, " group"]]:
    """Divide rows into the fewest groups whose padding is at most a share of all tokens.

    A group's rows are padded to its longest. Groups of rows that follow each other in the order of
    their lengths have the least padding, so that the best boundaries are found by dynamic
    programming over the distinct lengths; rows of one length are not divided.

    Args:
        lengths: in tokens, 0 or more.
        padding_share: 0: no padding at all, a group for each length.

    Returns:
        The indices of each group's rows, shortest rows first; no group for no rows.

    Example:
        >>> row_groups(np.array([100, 3, 99, 3]))
        [array([1, 3]), array([2, 0])]
    """
    if not len(lengths):
        return []
    values, counts = np.unique(lengths, return_counts=True)
    num_rows, num_tokens = (np.append(0, x.cumsum()) for x in (counts, counts * values))
    rows = num_rows[1:] - num_rows[:-1, None]
    tokens = num_tokens[1:] - num_tokens[:-1, None]
    # [first, last]: the padding of one group of the lengths from the first to the last.
    padding = np.where(rows > 0, values * rows - tokens, np.inf)
    # least[last]: the least padding of the lengths up to the last, with a number of groups; firsts:
    # for 1, 2, ... groups, where the last of them begins.
    least, firsts = padding[0], [np.zeros(len(values), dtype=np.int64)]
    while least[-1] > padding_share * num_tokens[-1]:
        with_one_more = np.append(np.inf, least[:-1])[:, None] + padding
        least = with_one_more.min(axis=0)
        firsts.append(with_one_more.argmin(axis=0))
    boundaries: list[int] = []
    last = len(values) - 1
    for first in reversed(firsts[1:]):
        boundaries.insert(0, int(num_rows[first[last]]))
        last = int(first[last]) - 1
    return np.split(np.argsort(lengths, kind="stable"), boundaries)
