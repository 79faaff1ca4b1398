"""Memory of a run: tokens per forward, models, and tensors that a backward leaves."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Callback, Trainer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from kto_lightning.batches.collate import StepBatches
from kto_lightning.batches.packing import example_costs, plan_micro_batches
from kto_lightning.batches.sampler import StepPlan
from kto_lightning.batches.types import PackedBatch, StepBatch
from kto_lightning.data.datamodule import KTODataModule
from kto_lightning.models.lora import LoRA
from kto_lightning.models.packed_run import CHECKPOINTING, PromptStore
from kto_lightning.models.policy import Policy
from kto_lightning.models.reference import FrozenReference
from kto_lightning.models.routes.packed import PackedRunner
from kto_lightning.module import KTOModule
from kto_lightning.training.scoring import BatchScorer
from tests.support.cli import small_data
from tests.support.steps import (
    Examples,
    fit_steps,
    make_module,
    make_policy_and_reference,
    step_batch,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")

LENGTHS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 40)), min_size=1, max_size=7)


def planned(
    examples: Examples, *, paired: bool, packed: bool, max_tokens: int, max_length: int | None
) -> tuple[StepBatch, np.ndarray]:
    """A step as the data module plans it on one rank, and the tokens of each example."""
    chosen = np.arange(len(examples))
    partner = np.roll(chosen, 1) if paired else None
    costs = example_costs(
        examples.prompt_lengths, examples.completion_lengths, partner, max_length=max_length
    )
    (micro_batches,) = plan_micro_batches(
        costs, max_tokens=max_tokens, world_size=1, padded=not packed
    )
    plan = StepPlan(examples=chosen, partners=partner, micro_batches=micro_batches, step_in_epoch=0)
    batches = StepBatches(
        examples=examples,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        max_length=max_length,
        can_share_prompts=packed,
    )
    return batches[plan], costs


@settings(deadline=None, max_examples=60)
@given(
    lengths=LENGTHS,
    max_tokens=st.integers(1, 150),
    max_length=st.none() | st.integers(2, 50),
    paired=st.booleans(),
    kind=st.sampled_from(["llama", "padded"]),
)
def test_no_forward_exceeds_max_tokens(
    lengths: list[tuple[int, int]],
    max_tokens: int,
    max_length: int | None,
    paired: bool,
    kind: str,
) -> None:
    """Neither the matched nor the mismatched run, of policy or reference; a single longer example
    excepted."""
    policy, other = make_policy_and_reference(kind)
    assert (policy.route == "packed") == (kind == "llama")
    examples = Examples(lengths, [True] * len(lengths))
    batch, costs = planned(
        examples,
        paired=paired,
        packed=policy.shares_prompts,
        max_tokens=max_tokens,
        max_length=max_length,
    )
    scorer = BatchScorer(
        policy,
        FrozenReference(other, "another model"),
        beta=0.1,
        loss_name="kto" if paired else "apo_zero_unpaired",
        sum_over_ranks=lambda values: values,
    )
    seen: list[int] = []
    hooks = [
        model.causal_lm.get_input_embeddings().register_forward_pre_hook(
            lambda _, ids: seen.append(ids[0].numel())
        )
        for model in (policy, other)
    ]
    try:
        known = scorer.score_for_reference_point(batch.micro_batches)
        before = list(seen)
        for micro_batch, logps in zip(batch.micro_batches, known, strict=True):
            alone = int(costs[micro_batch.indices].max()) if len(micro_batch) == 1 else 0
            seen.clear()
            scorer.score_matched(micro_batch, logps)
            assert max(seen, default=0) <= max(max_tokens, alone, 1)
            scorer._score_without_gradient(micro_batch)
            assert max(seen) <= max(max_tokens, alone, 1)
        assert max(before, default=0) <= max(max_tokens, int(costs.max()), 1)
    finally:
        for hook in hooks:
            hook.remove()


class ParameterMemory(Callback):
    """Records the bytes of the process's parameters after each step, without frozen ones."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        gc.collect()
        found = [o for o in gc.get_objects() if isinstance(o, nn.Parameter)]
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in found}
        self.steps.append(sum(storages.values()))


@pytest.fixture
def frozen_garbage() -> Iterator[None]:
    """What other tests have left is neither counted nor walked through at every step."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data") / "train.jsonl", 12)


def num_models(policy: Path, train: Path, **options: Any) -> list[float]:
    """Models in memory after each step of two epochs of three steps: parameters' bytes over the
    policy's."""
    memory = ParameterMemory()
    module = KTOModule(str(policy), learning_rate=1e-3, **options)
    data = KTODataModule(train=str(train), batch_size=4, preprocessing_workers=1)
    Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        callbacks=[memory],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(module, datamodule=data)
    assert module.policy is not None
    own = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in module.policy.parameters()}
    size = sum(storage.nbytes() for storage in own.values())
    return [step / size for step in memory.steps]


def test_a_second_model_is_in_memory_only_where_it_is_needed(
    policy: Path, train: Path, tmp_path: Path, frozen_garbage: None
) -> None:
    cached = {"reference_cache": str(tmp_path / "cache")}
    assert num_models(policy, train) == [2.0] * 6
    assert num_models(policy, train, lora=LoRA(r=2)) == [1.0] * 6
    # The first epoch fills the cache; then the reference is freed.
    assert num_models(policy, train, **cached) == [2.0] * 3 + [1.0] * 3
    assert num_models(policy, train, **cached) == [1.0] * 6


@pytest.mark.parametrize("kind", ["llama", "lora", "qwen2_moe"])
@pytest.mark.parametrize("max_tokens", [10**6, 25], ids=["one", "several"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_backward_frees_the_activations_of_its_micro_batch(
    kind: str, max_tokens: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also logits, and the prompts' keys and values."""
    module = make_module(kind)
    assert module.policy is not None
    if checkpointing:
        module.policy.causal_lm.gradient_checkpointing_enable(CHECKPOINTING)
    kept: list[StorageWeakRef] = []
    stores: list[PromptStore] = []
    left: list[int] = []
    forward, update = Policy.forward, KTOModule._update
    store_of = PackedRunner._make_prompt_store

    def count_left() -> None:
        """Count tensors left of the previous forward, whose backward has run."""
        lasting = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
        left.append(sum(not s.expired() and s.cdata not in lasting for s in kept))
        assert len(kept) > 2
        kept.clear()

    def record(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():  # the batch keeps its ids and row indices
            kept.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    def recording_forward(self: Policy, *arguments: Any, **options: Any) -> Any:
        if kept:
            count_left()
        with saved_tensors_hooks(record, lambda tensor: tensor):
            return forward(self, *arguments, **options)

    def recording_update(self: KTOModule) -> float:
        count_left()
        return update(self)

    def recording_store(self: PackedRunner, batch: PackedBatch) -> PromptStore:
        stores.append(store_of(self, batch))
        return stores[-1]

    monkeypatch.setattr(Policy, "forward", recording_forward)
    monkeypatch.setattr(PackedRunner, "_make_prompt_store", recording_store)
    monkeypatch.setattr(KTOModule, "_update", recording_update)
    batch = step_batch(max_tokens=max_tokens)
    fit_steps(module, batch)
    assert left == [0] * len(batch.micro_batches)
    assert not any(store.layers for store in stores)
