"""Splits by prompt: proportions, seeds, errors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kto_lightning.data.split import split_by_prompt
from kto_lightning.errors import ConfigError


def test_classes_keep_their_ratio_where_prompts_are_unique():
    desirable = np.arange(1000) < 746
    kept, held_out = split_by_prompt(np.arange(1000), desirable, fraction=0.1, seed=0)
    assert len(kept) + len(held_out) == 1000
    assert desirable[held_out].sum() == 75
    assert (~desirable[held_out]).sum() == 25


@given(
    keys=st.lists(st.integers(0, 12), min_size=20, max_size=80),
    fraction=st.floats(0.1, 0.6),
    seed=st.integers(0, 5),
)
def test_no_prompt_is_on_both_sides_and_nothing_is_lost(keys, fraction, seed):
    prompt_keys = np.array(keys, dtype=np.int64)
    desirable = np.random.default_rng(seed).random(len(keys)) < 0.7
    try:
        kept, held_out = split_by_prompt(prompt_keys, desirable, fraction=fraction, seed=seed)
    except ConfigError:
        return
    assert not set(prompt_keys[kept]) & set(prompt_keys[held_out])
    assert sorted([*kept, *held_out]) == list(range(len(keys)))
    for side in (desirable, ~desirable):
        assert side[held_out].sum() <= np.rint(fraction * side.sum())


def test_the_split_follows_the_seed():
    desirable = np.arange(200) % 2 == 0
    splits = [
        split_by_prompt(np.arange(200), desirable, fraction=0.2, seed=seed)[1].tolist()
        for seed in (0, 0, 1)
    ]
    assert splits[0] == splits[1] != splits[2]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_a_fraction_is_between_0_and_1(fraction):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        split_by_prompt(np.arange(4), np.ones(4, dtype=bool), fraction=fraction, seed=0)


def test_one_prompt_cannot_be_split():
    with pytest.raises(ConfigError, match="one side empty"):
        split_by_prompt(np.zeros(8, np.int64), np.arange(8) % 2 == 0, fraction=0.25, seed=0)
