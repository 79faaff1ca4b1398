"""Partners answer other prompts and never change; epochs are shuffled by whole rings, resumably."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kto_lightning.batches.pairing import Pairing, pair_distinct_prompts, pair_none, pair_rotate
from kto_lightning.batches.sampler import PlanSampler, StepPlan, epoch_order
from kto_lightning.errors import ConfigError, DataError

seeds = st.none() | st.integers(min_value=0, max_value=2**31)
epochs = st.integers(min_value=0, max_value=5)


@st.composite
def prompt_keys(draw) -> np.ndarray:
    keys = draw(st.lists(st.integers(min_value=0, max_value=5), min_size=2, max_size=40))
    assume(len(set(keys)) > 1)
    return np.array(keys, dtype=np.int64)


@st.composite
def balanced_keys(draw) -> np.ndarray:
    """No prompt holds more than half."""
    keys = draw(prompt_keys())
    assume(max(Counter(keys.tolist()).values()) * 2 <= len(keys))
    return keys


@st.composite
def majority_keys(draw) -> np.ndarray:
    """Prompt 0 holds more than half."""
    others = draw(st.lists(st.integers(min_value=1, max_value=3), min_size=1, max_size=10))
    num_major = len(others) + draw(st.integers(min_value=1, max_value=25))
    keys = draw(st.permutations([0] * num_major + others))
    return np.array(keys, dtype=np.int64)


@st.composite
def pairings(draw) -> Pairing:
    kind = draw(st.sampled_from(["distinct", "rotate", "unpaired"]))
    if kind == "distinct":
        return pair_distinct_prompts(draw(prompt_keys()), seed=draw(seeds))
    num_examples = draw(st.integers(min_value=1, max_value=40))
    if kind == "rotate":
        return pair_rotate(num_examples, draw(st.integers(min_value=2, max_value=9)))
    return pair_none(num_examples)


def units(pairing: Pairing) -> list[list[int]]:
    num_shuffled = len(pairing) - pairing.num_fixed
    return pairing.members[:num_shuffled].reshape(-1, pairing.unit_size).tolist()


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


@given(pairings(), st.integers(min_value=0, max_value=2**31), epochs)
def test_an_epoch_shuffles_whole_units_and_keeps_what_is_fixed_last(pairing, seed, epoch):
    order = epoch_order(pairing, shuffle=True, seed=seed, epoch=epoch)
    num_shuffled = len(pairing) - pairing.num_fixed
    shuffled = order[:num_shuffled].reshape(-1, pairing.unit_size).tolist()
    assert sorted(shuffled) == sorted(units(pairing))
    assert (order[num_shuffled:] == pairing.members[num_shuffled:]).all()


@given(balanced_keys(), seeds, st.integers(min_value=1, max_value=5), epochs)
def test_an_even_batch_holds_whole_rings(keys, seed, half_batch, epoch):
    pairing = pair_distinct_prompts(keys, seed=seed)
    order = epoch_order(pairing, shuffle=True, seed=0, epoch=epoch)
    num_shuffled = len(keys) - pairing.num_fixed
    for start in range(0, num_shuffled - 2 * half_batch + 1, 2 * half_batch):
        batch = order[start : start + 2 * half_batch]
        assert sorted(pairing.partner[batch].tolist()) == sorted(batch.tolist())


def test_epochs_differ_and_are_the_same_on_every_machine():
    orders = [
        epoch_order(pair_none(8), shuffle=True, seed=seed, epoch=epoch).tolist()
        for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    assert orders == [
        [2, 4, 3, 6, 5, 0, 1, 7],
        [1, 3, 7, 6, 0, 4, 2, 5],
        [5, 0, 1, 4, 2, 6, 3, 7],
    ]


def sampler(pairing: Pairing, **overrides) -> PlanSampler:
    settings = {"batch_size": 4, "max_tokens": 40, "shuffle": True, "seed": 0} | overrides
    costs = np.arange(len(pairing)) % 23 + 1
    return PlanSampler(pairing=pairing, costs=costs, **settings)


def as_tuple(plan: StepPlan) -> tuple:
    partners = None if plan.partners is None else plan.partners.tolist()
    return plan.step_in_epoch, plan.examples.tolist(), partners, plan.micro_batches


def epoch_of(plans: PlanSampler, epoch: int) -> list[tuple]:
    plans.set_epoch(epoch)
    return [as_tuple(plan) for plan in plans]


@given(pairings(), st.integers(min_value=1, max_value=9), epochs, st.booleans())
def test_an_epoch_sees_every_example_once_in_batches_with_their_partners(
    pairing, batch_size, epoch, shuffle
):
    plans = sampler(pairing, batch_size=batch_size, shuffle=shuffle)
    plans.set_epoch(epoch)
    steps = list(plans)
    assert len(steps) == len(plans)
    assert [plan.step_in_epoch for plan in steps] == list(range(len(steps)))
    examples = np.concatenate([plan.examples for plan in steps])
    order = epoch_order(pairing, shuffle=shuffle, seed=0, epoch=epoch)
    assert examples.tolist() == order.tolist()
    assert all(len(plan.examples) == batch_size for plan in steps[:-1])
    for plan in steps:
        if pairing.partner is None:
            assert plan.partners is None
        else:
            assert (plan.partners == pairing.partner[plan.examples]).all()


@settings(max_examples=50)
@given(pairings(), st.integers(min_value=2, max_value=4))
def test_ranks_cut_the_same_batches_into_as_many_micro_batches(pairing, world_size):
    ranks = [sampler(pairing, rank=rank, world_size=world_size) for rank in range(world_size)]
    alone = sampler(pairing)
    for whole, *plans in zip(alone, *ranks, strict=True):
        for plan in plans:
            assert as_tuple(plan)[:3] == as_tuple(whole)[:3]
            assert len(plan.micro_batches) == len(plans[0].micro_batches)
        trained = [
            i for p in plans for m in p.micro_batches if not m.is_filler for i in m.positions
        ]
        assert sorted(trained) == list(range(len(whole.examples)))


@settings(max_examples=50)
@given(pairings(), st.integers(min_value=1, max_value=9), st.integers(0, 2), st.data())
def test_a_resumed_stream_is_the_tail_of_the_uninterrupted_one(pairing, batch_size, epoch, data):
    whole = sampler(pairing, batch_size=batch_size)
    stream = [step for e in range(epoch + 2) for step in epoch_of(whole, e)]
    num_done = data.draw(st.integers(min_value=0, max_value=len(whole)))
    whole.set_epoch(epoch)
    state = whole.state_dict(num_steps_done=num_done)

    resumed = sampler(pairing, batch_size=batch_size)
    resumed.load_state(state)
    # Lightning still counts the epoch of the checkpoint when that epoch's last step was done.
    first = epoch if num_done < len(whole) else epoch + 1
    tail = [step for e in range(first, epoch + 2) for step in epoch_of(resumed, e)]
    assert tail == stream[epoch * len(whole) + num_done :]
    assert len(resumed) == len(whole)


def test_a_state_counts_only_in_its_own_epoch():
    plans = sampler(pair_none(20))
    plans.load_state(plans.state_dict(num_steps_done=3))
    assert [step for step, *_ in epoch_of(plans, 0)] == [3, 4]
    assert [step for step, *_ in epoch_of(plans, 1)] == [0, 1, 2, 3, 4]
    assert [step for step, *_ in epoch_of(plans, 0)] == [0, 1, 2, 3, 4]


def test_a_state_of_a_finished_epoch_begins_the_next():
    plans = sampler(pair_none(20))
    plans.set_epoch(1)
    plans.load_state(plans.state_dict(num_steps_done=5))
    assert (plans.epoch, plans.start) == (2, 0)


@pytest.mark.parametrize(
    ("pairing", "changed", "named"),
    [
        (pair_rotate(20, 4), {"batch_size": 5}, "batch_size was 4"),
        (pair_rotate(20, 4), {"seed": 1}, "seed was 0"),
        (pair_rotate(20, 4), {"shuffle": False}, "shuffle was 1"),
        (pair_rotate(24, 4), {}, "num_examples was 20"),
        (pair_rotate(20, 5), {}, "pairing_checksum was"),
        (pair_none(20), {}, "pairing_checksum was"),
    ],
)
def test_going_on_in_another_order_is_refused(pairing, changed, named):
    state = sampler(pair_rotate(20, 4)).state_dict(num_steps_done=2)
    with pytest.raises(ConfigError, match=named):
        sampler(pairing, **changed).load_state(state)


def test_memory_and_ranks_may_change_on_resume():
    state = sampler(pair_rotate(20, 4)).state_dict(num_steps_done=2)
    plans = sampler(pair_rotate(20, 4), max_tokens=7, world_size=3, rank=1)
    plans.load_state(state)
    assert plans.start == 2


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        sampler(pair_none(3), batch_size=0)
