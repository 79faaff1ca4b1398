"""Epochs are shuffled by whole units, divided into steps, and resumed exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kto_lightning.batches.pairing import Pairing, pair_distinct_prompts, pair_none, pair_rotate
from kto_lightning.batches.sampler import PlanSampler, StepPlan, epoch_order
from kto_lightning.errors import ConfigError
from tests.batches.prompts import balanced_keys, prompt_keys, seeds, units

epochs = st.integers(min_value=0, max_value=5)


@st.composite
def pairings(draw) -> Pairing:
    kind = draw(st.sampled_from(["distinct", "rotate", "unpaired"]))
    if kind == "distinct":
        return pair_distinct_prompts(draw(prompt_keys()), seed=draw(seeds))
    num_examples = draw(st.integers(min_value=1, max_value=40))
    if kind == "rotate":
        return pair_rotate(num_examples, draw(st.integers(min_value=2, max_value=9)))
    return pair_none(num_examples)


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


def test_a_state_applies_only_to_its_own_epoch():
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
        (pair_rotate(20, 5), {}, "the examples have other partners"),
        (pair_none(20), {}, "the examples have other partners"),
    ],
)
def test_resuming_in_another_order_is_an_error(pairing, changed, named):
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
