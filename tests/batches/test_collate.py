"""Packed batches, compared token by token with each sequence on its own."""

import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch.utils.data import DataLoader

from kto_lightning.batches.collate import StepBatches, pack
from kto_lightning.batches.packing import MicroBatch, example_costs
from kto_lightning.batches.pairing import pair_none, pair_rotate
from kto_lightning.batches.sampler import PlanSampler, StepPlan
from kto_lightning.batches.types import PackedBatch, Sequences, StepBatch


@dataclass(kw_only=True, slots=True)
class InMemoryExample:
    index: int
    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    desirable: bool


class InMemoryExamples:
    """Token ids that name their origin: example i's prompt counts from 1000·i, its completion from
    1000·i + 500."""

    def __init__(self, lengths: list[tuple[int, int]], weights: list[float] | None = None):
        self.prompt_lengths = np.array([prompt for prompt, _ in lengths], dtype=np.int32)
        self.completion_lengths = np.array([completion for _, completion in lengths], np.int32)
        self.desirable = np.arange(len(lengths)) % 3 == 0
        self.weights = np.array(weights or [1.0] * len(lengths), dtype=np.float32)

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: int) -> InMemoryExample:
        prompt, completion = self.prompt_lengths[index], self.completion_lengths[index]
        return InMemoryExample(
            index=index,
            prompt_ids=np.arange(prompt, dtype=np.int32) + 1000 * index,
            completion_ids=np.arange(completion, dtype=np.int32) + 1000 * index + 500,
            desirable=bool(self.desirable[index]),
        )


lengths_of_examples = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1)
cuts = st.none() | st.integers(min_value=1, max_value=9)


def packed(
    lengths: list[tuple[int, int]], max_length: int | None = None, shares_prompts: bool = False
) -> PackedBatch:
    """The examples with the completion of the one before, as one micro-batch."""
    examples = [InMemoryExamples(lengths)[i] for i in range(len(lengths))]
    return pack(
        examples,
        [examples[i - 1].completion_ids for i in range(len(examples))],
        max_length=max_length,
        shares_prompts=shares_prompts,
        weights=np.ones(len(examples), dtype=np.float32),
    )


def pieces(lengths: list[tuple[int, int]], i: int, completion_of: int, max_length: int | None):
    examples = InMemoryExamples(lengths)
    prompt = examples[i].prompt_ids.tolist()
    whole = (prompt + examples[completion_of].completion_ids.tolist())[:max_length]
    return whole[: len(prompt)], whole[len(prompt) :]


def scored(sequences: Sequences) -> list[tuple[int, int, int]]:
    rows = sequences.scored
    assert rows.rows.dtype == rows.targets.dtype == rows.owners.dtype == torch.int64
    return list(zip(rows.rows.tolist(), rows.targets.tolist(), rows.owners.tolist(), strict=True))


def assert_stands_alone(sequences: Sequences, expected: list[tuple[list[int], list[int]]]) -> None:
    """Each (prompt, completion) follows the other, and is scored by the row before each token."""
    ids, positions, boundaries, rows = [], [], [0], []
    for owner, (prompt, completion) in enumerate(expected):
        for j, token in enumerate(completion):
            if prompt or j:
                rows.append((len(ids) + len(prompt) + j - 1, token, owner))
        ids += prompt + completion
        positions += range(len(prompt + completion))
        boundaries.append(len(ids))
    assert sequences.input_ids.tolist() == ids
    assert sequences.position_ids.tolist() == positions
    assert sequences.boundaries.tolist() == boundaries
    assert sequences.lengths == np.diff(boundaries).tolist()
    assert scored(sequences) == rows
    assert sequences.input_ids.dtype == sequences.position_ids.dtype == torch.int64
    assert sequences.boundaries.dtype == torch.int32


@given(lengths_of_examples, cuts, st.booleans())
def test_matched_sequences_are_prompts_with_their_completions(lengths, max_length, shares_prompts):
    batch = packed(lengths, max_length, shares_prompts)
    own = [pieces(lengths, i, i, max_length) for i in range(len(lengths))]
    assert_stands_alone(batch.matched, own)
    assert batch.prompt_lengths == [len(prompt) for prompt, _ in own]
    assert batch.shares_prompts == shares_prompts
    assert len(batch) == len(lengths)


@given(lengths_of_examples, cuts)
def test_mismatched_sequences_that_stand_alone_repeat_the_prompts(lengths, max_length):
    batch = packed(lengths, max_length)
    before = [(i - 1) % len(lengths) for i in range(len(lengths))]
    mismatched = [pieces(lengths, i, before[i], max_length) for i in range(len(lengths))]
    assert_stands_alone(batch.mismatched, mismatched)


@given(lengths_of_examples, cuts)
def test_shared_prompts_score_what_whole_sequences_score(lengths, max_length):
    """Row by row: the same token at the same position of the same sequence is predicted from the
    same place, wherever that place lies in the two layouts."""
    shared, alone = packed(lengths, max_length, True), packed(lengths, max_length, False)

    def places(sequences: Sequences, first_positions: list[int]) -> list[tuple[int, int]]:
        return [
            (sequence, first + j)
            for sequence, (length, first) in enumerate(
                zip(sequences.lengths, first_positions, strict=True)
            )
            for j in range(length)
        ]

    from_zero = [0] * len(lengths)
    in_shared = places(shared.matched, from_zero)
    in_shared += places(shared.mismatched, shared.prompt_lengths)
    in_alone = places(alone.mismatched, from_zero)
    assert [
        (in_shared[row], target, owner) for row, target, owner in scored(shared.mismatched)
    ] == [(in_alone[row], target, owner) for row, target, owner in scored(alone.mismatched)]


@given(lengths_of_examples, cuts)
def test_a_shared_run_holds_only_completions_and_continues_their_prompts(lengths, max_length):
    mismatched = packed(lengths, max_length, shares_prompts=True).mismatched
    ids, positions, boundaries = [], [], [0]
    for i in range(len(lengths)):
        prompt, completion = pieces(lengths, i, (i - 1) % len(lengths), max_length)
        ids += completion
        positions += range(len(prompt), len(prompt + completion))
        boundaries.append(len(ids))
    assert mismatched.input_ids.tolist() == ids
    assert mismatched.position_ids.tolist() == positions
    assert mismatched.boundaries.tolist() == boundaries
    assert mismatched.lengths == np.diff(boundaries).tolist()


def test_a_batch_worked_by_hand():
    """x1 = 2 tokens, y1 = 1; x2 = none, y2 = 3; y'1 = y2, y'2 = y1."""
    batch = packed([(2, 1), (0, 3)], shares_prompts=True)
    assert batch.matched.input_ids.tolist() == [0, 1, 500, 1500, 1501, 1502]
    assert scored(batch.matched) == [(1, 500, 0), (3, 1501, 1), (4, 1502, 1)]
    assert batch.mismatched.input_ids.tolist() == [1500, 1501, 1502, 500]
    assert batch.mismatched.position_ids.tolist() == [2, 3, 4, 0]
    # y'1's first token from x1's last row, the others from rows 6 and 7; y'2 follows nothing.
    assert scored(batch.mismatched) == [(1, 1500, 0), (6, 1501, 0), (7, 1502, 0)]


def test_a_prompt_that_fills_the_length_leaves_nothing_to_score():
    batch = packed([(5, 3), (1, 2)], max_length=4, shares_prompts=True)
    assert batch.prompt_lengths == [4, 1]
    assert batch.mismatched.lengths == [0, 3]
    assert 0 not in batch.matched.scored.owners
    assert 0 not in batch.mismatched.scored.owners


def batches_of(examples: InMemoryExamples, **overrides) -> StepBatches:
    settings = {
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "max_length": None,
        "can_share_prompts": True,
    }
    return StepBatches(examples=examples, **settings | overrides)


def plan_of(*micro_batches: MicroBatch) -> StepPlan:
    return StepPlan(
        examples=np.array([4, 2, 0]),
        partners=np.array([3, 1, 5]),
        micro_batches=list(micro_batches),
        step_in_epoch=0,
    )


SIX = [(3, 2), (1, 1), (2, 4), (5, 1), (2, 2), (1, 3)]


def test_a_step_counts_its_whole_batch_on_every_rank():
    batches = batches_of(InMemoryExamples(SIX), max_length=5)
    for position in range(3):
        batch = batches[plan_of(MicroBatch([position]))]
        assert batch.num_examples == 3
        assert batch.num_tokens == 4 + 5 + 5
        assert (batch.num_desirable, batch.num_undesirable) == (1, 2)


def test_positions_lead_to_examples_and_their_partners():
    (micro_batch,) = batches_of(InMemoryExamples(SIX))[plan_of(MicroBatch([0, 2]))].micro_batches
    assert micro_batch.indices == [4, 0]
    assert micro_batch.desirable.tolist() == [False, True]
    assert micro_batch.matched.input_ids.tolist() == [4000, 4001, 4500, 4501, 0, 1, 2, 500, 501]
    assert micro_batch.mismatched.input_ids.tolist() == [3500, 5500, 5501, 5502]


def test_weights_are_those_of_the_class_times_the_records_own():
    examples = InMemoryExamples(SIX, weights=[0.5, 1, 2, 1, 0, 1])
    batches = batches_of(examples, desirable_weight=3.0, undesirable_weight=4.0)
    (micro_batch,) = batches[plan_of(MicroBatch([0, 1, 2]))].micro_batches
    assert micro_batch.weight.tolist() == [0.0, 8.0, 1.5]
    assert micro_batch.weight.dtype == torch.float32
    assert micro_batch.is_filler.tolist() == [False, False, False]


def test_a_filler_runs_and_counts_for_nothing():
    plan = plan_of(MicroBatch([1], is_filler=True))
    (micro_batch,) = batches_of(InMemoryExamples(SIX))[plan].micro_batches
    assert micro_batch.is_filler.tolist() == [True]
    assert micro_batch.weight.tolist() == [0.0]
    assert micro_batch.matched.lengths == [6]
    assert micro_batch.mismatched.lengths == [1]


def test_prompts_are_shared_only_where_a_step_is_one_micro_batch():
    one, two = plan_of(MicroBatch([0])), plan_of(MicroBatch([0]), MicroBatch([2]))
    sharing = batches_of(InMemoryExamples(SIX))
    assert [micro.shares_prompts for micro in sharing[one].micro_batches] == [True]
    assert [micro.shares_prompts for micro in sharing[two].micro_batches] == [True, True]
    alone = batches_of(InMemoryExamples(SIX), can_share_prompts=False)
    assert [micro.shares_prompts for micro in alone[one].micro_batches] == [False]


def test_without_partners_there_is_no_mismatched_run():
    plans = PlanSampler(
        pairing=pair_none(6),
        costs=np.ones(6, int),
        batch_size=6,
        max_tokens=99,
        shuffle=False,
        seed=0,
    )
    (plan,) = plans
    (micro_batch,) = batches_of(InMemoryExamples(SIX))[plan].micro_batches
    assert micro_batch.mismatched is None


def loader(num_workers: int) -> DataLoader[StepBatch]:
    examples = InMemoryExamples([(i % 5, 1 + i % 7) for i in range(23)])
    pairing = pair_rotate(len(examples), 4)
    costs = example_costs(
        examples.prompt_lengths, examples.completion_lengths, pairing.partner, max_length=8
    )
    plans = PlanSampler(
        pairing=pairing, costs=costs, batch_size=4, max_tokens=20, shuffle=True, seed=0
    )
    batches = batches_of(examples, max_length=8)
    return DataLoader(batches, batch_size=None, sampler=plans, num_workers=num_workers)


def test_no_forward_is_given_more_than_the_budget():
    for batch in loader(num_workers=0):
        for micro_batch in batch.micro_batches:
            assert sum(micro_batch.matched.lengths) <= 20
            assert sum(micro_batch.mismatched.lengths) <= 20


def as_numbers(batch: StepBatch) -> list:
    return [batch.num_examples, batch.num_tokens] + [
        (micro.indices, scored(micro.matched), scored(micro.mismatched), micro.weight.tolist())
        for micro in batch.micro_batches
    ]


def test_workers_collate_what_the_main_process_does():
    alone, with_workers = (map(as_numbers, loader(num_workers)) for num_workers in (0, 2))
    assert list(alone) == list(with_workers)


def test_a_spawned_worker_can_be_sent_the_batches():
    batches = batches_of(InMemoryExamples(SIX))
    plan = plan_of(MicroBatch([0, 1, 2]))
    there, there_plan = pickle.loads(pickle.dumps((batches, plan)))
    assert as_numbers(there[there_plan]) == as_numbers(batches[plan])


def test_lightning_moves_every_tensor_and_leaves_the_lengths_on_the_host():
    batch = batches_of(InMemoryExamples(SIX))[plan_of(MicroBatch([0, 1, 2]))]
    moved = move_data_to_device(batch, torch.device("meta"))
    (micro_batch,) = moved.micro_batches
    for sequences in (micro_batch.matched, micro_batch.mismatched):
        tensors = [sequences.input_ids, sequences.position_ids, sequences.boundaries]
        tensors += [sequences.scored.rows, sequences.scored.targets, sequences.scored.owners]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert micro_batch.is_filler.device.type == "meta"
    assert micro_batch.matched.lengths == [4, 6, 5]
    assert moved.num_tokens == 15


@pytest.mark.parametrize("shares_prompts", [True, False])
def test_ids_of_a_memory_map_are_not_written(shares_prompts):
    """Token ids come read-only from Arrow; nothing may write into them or warn of it."""
    examples = [InMemoryExamples([(2, 2)])[0]]
    for ids in (examples[0].prompt_ids, examples[0].completion_ids):
        ids.flags.writeable = False
    batch = pack(
        examples,
        [examples[0].completion_ids],
        max_length=3,
        shares_prompts=shares_prompts,
        weights=np.ones(1, dtype=np.float32),
    )
    batch.matched.input_ids += 1
    assert examples[0].prompt_ids.tolist() == [0, 1]
