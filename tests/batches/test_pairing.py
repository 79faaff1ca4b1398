"""Partners answer another prompt, form rings, and depend on the seed and nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kto_lightning.batches.pairing import pair_distinct_prompts, pair_none, pair_rotate
from kto_lightning.batches.sampler import epoch_order
from kto_lightning.errors import ConfigError, DataError
from tests.batches.prompts import balanced_keys, prompt_keys, seeds, units


@st.composite
def majority_keys(draw) -> np.ndarray:
    """Prompt 0 holds more than half."""
    others = draw(st.lists(st.integers(min_value=1, max_value=3), min_size=1, max_size=10))
    num_major = len(others) + draw(st.integers(min_value=1, max_value=25))
    keys = draw(st.permutations([0] * num_major + others))
    return np.array(keys, dtype=np.int64)


@given(prompt_keys(), seeds)
def test_a_mismatched_completion_answers_another_prompt(keys, seed):
    pairing = pair_distinct_prompts(keys, seed=seed)
    assert (keys[pairing.partner] != keys).all()
    assert sorted(pairing.members.tolist()) == list(range(len(keys)))
    assert len(pairing.self_paired) == 0


@given(balanced_keys(), seeds)
def test_rings_are_of_two_and_one_of_three_with_three_prompts_when_odd(keys, seed):
    pairing = pair_distinct_prompts(keys, seed=seed)
    partner = pairing.partner
    assert sorted(partner.tolist()) == list(range(len(keys)))
    for first, second in units(pairing):
        assert partner[first] == second
        assert partner[second] == first
    ring_of_three = pairing.members[len(keys) - pairing.num_fixed :]
    assert len(ring_of_three) == (3 if len(keys) % 2 else 0)
    assert (partner[ring_of_three] == np.roll(ring_of_three, 1)).all()
    assert len(set(keys[ring_of_three].tolist())) == len(ring_of_three)


@given(majority_keys(), seeds)
def test_partners_repeat_evenly_for_the_excess_of_a_prompt(keys, seed):
    pairing = pair_distinct_prompts(keys, seed=seed)
    others = np.flatnonzero(keys != 0)
    uses = np.bincount(pairing.partner, minlength=len(keys))[others]
    assert uses.max() - uses.min() <= 1
    assert uses.sum() == len(keys) - len(others)
    # Every example of another prompt is in a ring of two; the rest are shuffled two by two.
    for first, second in units(pairing):
        in_ring = keys[first] != 0 or keys[second] != 0
        mutual = pairing.partner[first] == second and pairing.partner[second] == first
        assert in_ring == mutual
    assert pairing.num_fixed == len(keys) % 2


@given(prompt_keys(), seeds, st.permutations(range(6)))
def test_partners_depend_on_which_prompts_are_equal_and_not_on_what_they_are(keys, seed, renamed):
    pairing = pair_distinct_prompts(keys, seed=seed)
    again = pair_distinct_prompts(np.array(renamed, dtype=np.int64)[keys], seed=seed)
    assert (pairing.partner == again.partner).all()
    assert (pairing.members == again.members).all()


@pytest.mark.parametrize(
    ("keys", "partner"),
    [
        pytest.param([0, 1, 2, 3], [1, 0, 3, 2], id="neighbours"),
        pytest.param([0, 1, 2], [2, 0, 1], id="a ring of three rotates by one"),
        pytest.param([0, 0, 1, 1, 2, 2, 3, 3], [3, 2, 1, 0, 7, 6, 5, 4], id="answers in pairs"),
        pytest.param([0, 1, 2, 2], [3, 2, 1, 0], id="the last pair is opened for two left over"),
        pytest.param([0, 0, 0, 1], [3, 3, 3, 2], id="more than half"),
    ],
)
def test_without_a_seed_the_nearest_are_joined(keys, partner):
    assert pair_distinct_prompts(np.array(keys), seed=None).partner.tolist() == partner


def test_partners_follow_the_seed():
    keys = np.arange(100)
    first, again, other = (pair_distinct_prompts(keys, seed=seed).partner for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).mean() > 0.9
    neighbours = np.abs(first - np.arange(100)) == 1
    assert neighbours.mean() < 0.2


def test_units_come_by_their_first_member():
    pairing = pair_distinct_prompts(np.arange(100), seed=3)
    firsts = pairing.members[::2].tolist()
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.8])
@pytest.mark.parametrize("seed", [None, 0])
def test_large_sets_are_paired_however_much_one_prompt_holds(share, seed):
    """In a time that grows with the number of examples: its square would never end."""
    num_examples = 200_000
    keys = np.arange(num_examples)
    keys[: int(share * num_examples)] = 0
    pairing = pair_distinct_prompts(keys, seed=seed)
    assert (keys[pairing.partner] != keys).all()


@pytest.mark.parametrize(
    ("keys", "found"),
    [([], "no record"), ([7], "a single record"), ([7, 7, 7], "3 records that all share one")],
)
def test_a_single_prompt_is_an_error_that_says_what_to_do(keys, found):
    with pytest.raises(DataError, match=f"{found}.*apo_zero_unpaired"):
        pair_distinct_prompts(np.array(keys, dtype=np.int64), seed=0)


@given(st.integers(min_value=0, max_value=40), st.integers(min_value=2, max_value=9))
def test_rotate_is_what_trl_maps_over_blocks(num_examples, batch_size):
    expected: list[int] = []
    examples = list(range(num_examples))
    for i in range(0, num_examples, batch_size):
        block = examples[i : i + batch_size]
        expected += [block[-1], *block[:-1]]
    pairing = pair_rotate(num_examples, batch_size)
    assert pairing.partner.tolist() == expected
    alone = [num_examples - 1] if num_examples % batch_size == 1 else []
    assert pairing.self_paired.tolist() == alone
    assert epoch_order(pairing, shuffle=False, seed=0, epoch=3).tolist() == examples


def test_rotate_refuses_a_batch_of_one():
    with pytest.raises(ConfigError, match=r"batch_size is 1\. Take at least 2"):
        pair_rotate(10, 1)


def test_unpaired_has_no_partners():
    pairing = pair_none(3)
    assert pairing.partner is None
    assert pairing.self_paired.tolist() == []
    assert epoch_order(pairing, shuffle=False, seed=0, epoch=0).tolist() == [0, 1, 2]
