"""Indices of rows: where sequences that follow each other begin, and lists of ranges."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor


def starts_of(lengths: list[int]) -> list[int]:
    """The first row of each of some sequences that follow each other."""
    return [0, *accumulate(lengths)][:-1]


def interleaved_ranges(*starts_and_lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Row indices of the first range of each list, then of the second of each, and so on; int64.

    Args:
        starts_and_lengths: starts and lengths of the first list's ranges, of the second's, …, all
            lists equally long.

    Example:
        >>> interleaved_ranges([0, 10], [2, 1])
        array([ 0,  1, 10])
    """
    starts = np.stack(starts_and_lengths[0::2], axis=1).reshape(-1).astype(np.int64)
    lengths = np.stack(starts_and_lengths[1::2], axis=1).reshape(-1).astype(np.int64)
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(lengths.sum())


def to_device(rows: np.ndarray, device: torch.device) -> Tensor:
    """Row indices on the device, without waiting for it."""
    return torch.from_numpy(rows).to(device, non_blocking=True)
