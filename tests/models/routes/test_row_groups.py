"""Groups of rows of similar length."""

from itertools import combinations

import numpy as np
import pytest

from kto_lightning.models.routes.row_groups import row_groups


def padding(lengths: np.ndarray, groups: list[np.ndarray]) -> int:
    return sum(int((lengths[group].max() - lengths[group]).sum()) for group in groups)


def fewest_groups(lengths: np.ndarray, share: float) -> int:
    """By trying all boundaries in the order of the lengths."""
    ordered = np.sort(lengths)
    for num_boundaries in range(len(ordered)):
        for boundaries in combinations(range(1, len(ordered)), num_boundaries):
            groups = np.split(np.arange(len(ordered)), boundaries)
            if padding(ordered, groups) <= share * ordered.sum():
                return num_boundaries + 1
    raise AssertionError


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_the_fewest_groups_within_the_share_of_padding(share):
    random = np.random.default_rng(0)
    for size in range(1, 8):
        for longest in (2, 12, 300):
            lengths = random.integers(0, longest, size)
            groups = row_groups(lengths, padding_share=share)
            assert sorted(np.concatenate(groups).tolist()) == list(range(size))
            assert padding(lengths, groups) <= share * lengths.sum()
            assert len(groups) == fewest_groups(lengths, share)


def test_rows_of_lengths_as_in_chats_have_little_padding_in_few_groups():
    lengths = np.random.default_rng(0).lognormal(5, 1, 500).astype(np.int64)
    groups = row_groups(lengths)
    assert padding(lengths, groups) <= 0.1 * lengths.sum()
    assert len(groups) <= 20


def test_no_rows_have_no_group_and_empty_rows_have_one():
    assert row_groups(np.zeros(0, dtype=np.int64)) == []
    assert [group.tolist() for group in row_groups(np.zeros(3, dtype=np.int64))] == [[0, 1, 2]]
