"""Optimizer steps made by hand, and `KTOModule` fitted on them by a real Trainer."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from kto_lightning.batches.collate import StepBatches
from kto_lightning.batches.packing import example_costs, plan_micro_batches
from kto_lightning.batches.sampler import StepPlan
from kto_lightning.batches.types import StepBatch
from kto_lightning.models.policy import Policy
from kto_lightning.models.reference import FrozenReference
from kto_lightning.models.routes.choose import make_policy
from kto_lightning.module import KTOModule
from tests.support.factories import add_adapter, make_model
from tests.support.loggers import RowLogger
from tests.support.tolerances import EPS, RELATIVE, assert_same_numbers

VOCABULARY = 97
"""Token ids of the models and examples made here."""
LENGTHS = [(3, 12), (14, 4), (6, 1), (1, 22), (9, 9), (5, 15)]
"""Tokens of prompt and completion of each example."""
DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT = 1.0, 2.5
RECORD_WEIGHTS = [1.0, 0.5, 1.0, 2.0, 1.0, 1.5]


@dataclass(kw_only=True)
class Example:
    """One record as token ids."""

    index: int
    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    desirable: bool


class Examples:
    """A tokenized data set in memory, with random token ids.

    Args:
        lengths: tokens of prompt and completion of each.
        desirable: the label of each.
    """

    def __init__(self, lengths: Sequence[tuple[int, int]], desirable: Sequence[bool]) -> None:
        random = np.random.default_rng(0)
        self.prompt_lengths = np.array([prompt for prompt, _ in lengths])
        self.completion_lengths = np.array([completion for _, completion in lengths])
        self.desirable = np.array(desirable)
        self.weights = np.resize(np.array(RECORD_WEIGHTS, dtype=np.float32), len(lengths))
        self._ids = [[random.integers(3, VOCABULARY, part) for part in pair] for pair in lengths]

    @property
    def num_tokens(self) -> int:
        """Of all prompts and their own completions."""
        return int((self.prompt_lengths + self.completion_lengths).sum())

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: int) -> Example:
        prompt, completion = self._ids[index]
        return Example(
            index=index,
            prompt_ids=prompt,
            completion_ids=completion,
            desirable=bool(self.desirable[index]),
        )


MIXED = Examples(LENGTHS, [True, False, False, True, True, False])


def step_batch(
    examples: Examples = MIXED,
    *,
    max_tokens: int = 10**6,
    order: Sequence[int] | None = None,
    num_ranks: int = 1,
    paired: bool = True,
    packed: bool = True,
) -> StepBatch:
    """All examples as one step; the mismatched completion of each is that of the one before.

    Args:
        examples: the data set.
        max_tokens: the largest micro-batch; the default makes a single one.
        order: of the examples within the step; None: as they stand.
        num_ranks: ranks that the step is planned for; the micro-batches of all follow each other.
        paired: whether there are mismatched completions.
        packed: whether prompts are shared within a micro-batch.
    """
    chosen = np.arange(len(examples)) if order is None else np.array(order)
    partner = np.roll(np.arange(len(examples)), 1) if paired else None
    costs = example_costs(
        examples.prompt_lengths, examples.completion_lengths, partner, max_length=None
    )
    plans = plan_micro_batches(
        costs[chosen], max_tokens=max_tokens, world_size=num_ranks, padded=not packed
    )
    plan = StepPlan(
        examples=chosen,
        partners=None if partner is None else partner[chosen],
        micro_batches=[micro_batch for rank in plans for micro_batch in rank],
        step_in_epoch=0,
    )
    return StepBatches(
        examples=examples,
        desirable_weight=DESIRABLE_WEIGHT,
        undesirable_weight=UNDESIRABLE_WEIGHT,
        max_length=None,
        can_share_prompts=packed,
    )[plan]


class HandMadeSteps(LightningDataModule):
    """Stands in for `KTODataModule`, with steps made by hand."""

    def __init__(self, steps: list[StepBatch]) -> None:
        super().__init__()
        self._steps = steps
        self.num_steps_per_epoch = len(steps)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self._steps, batch_size=None)  # pyright: ignore[reportArgumentType]


@cache
def make_policy_and_reference(kind: str) -> tuple[Policy, Policy]:
    """A policy and a reference that already differ, so that no number of a step is trivial.

    Args:
        kind: a key of `ARCHITECTURES`; lora: a llama with an adapter; padded: a llama that runs
            padded.
    """
    architecture = "llama" if kind in ("lora", "padded") else kind
    policy, reference = (make_model(architecture, vocab_size=VOCABULARY) for _ in range(2))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    if kind == "padded":
        return Policy(policy, route="padded"), Policy(reference, route="padded")
    return make_policy(add_adapter(policy) if kind == "lora" else policy)[0], make_policy(
        reference
    )[0]


def make_module(kind: str = "llama", **settings: Any) -> KTOModule:
    """A `KTOModule` whose models are already loaded; SGD with learning rate 0.05 by default."""
    options = {"optimizer": "sgd", "learning_rate": 0.05} | settings
    module = KTOModule("unused", **options)
    policy, reference = copy.deepcopy(make_policy_and_reference(kind))
    module.policy, module.reference = policy, FrozenReference(reference, "another model")
    return module


@dataclass(kw_only=True)
class FitResult:
    """What `fit_steps` logged and changed."""

    rows: list[dict[str, float]]
    weights: dict[str, Tensor]
    movements: dict[str, Tensor]
    """By how much each trainable weight has changed."""

    @property
    def row(self) -> dict[str, float]:
        (row,) = self.rows
        return row


def fit_steps(module: KTOModule, *steps: StepBatch, **trainer: Any) -> FitResult:
    """Fit the module on these steps, one epoch unless `trainer` (Trainer's arguments) has more."""
    assert module.policy is not None
    before = {n: p.detach().clone() for n, p in module.policy.named_parameters() if p.requires_grad}
    rows = RowLogger()
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": rows} | trainer
    options.setdefault("log_every_n_steps", 1)
    Trainer(
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    ).fit(module, datamodule=HandMadeSteps(list(steps)))
    after = {n: p.detach() for n, p in module.policy.named_parameters() if p.requires_grad}
    movements = {name: after[name] - before[name] for name in before}
    return FitResult(rows=rows.rows, weights=after, movements=movements)


def assert_same_step(found: FitResult, expected: FitResult, *, beta: float = 0.1) -> None:
    """The same rows and changes of weights, up to rounding."""
    assert len(found.rows) == len(expected.rows)
    for row, other in zip(found.rows, expected.rows, strict=True):
        assert row.keys() == other.keys()
        assert_same_numbers(row, other, beta=beta)
    largest = max(float(movement.abs().max()) for movement in expected.movements.values())
    assert largest > 1e-4
    for name, movement in expected.movements.items():
        rounding = EPS * float(expected.weights[name].abs().max())
        difference = float((found.movements[name] - movement).abs().max())
        assert difference <= RELATIVE * largest + rounding, name
