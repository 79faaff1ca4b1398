"""Offloading of activations and of a second model to host memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kto_lightning.models import offloading
from kto_lightning.models.offloading import OffloadedActivations
from kto_lightning.models.packed_run import CHECKPOINTING
from kto_lightning.models.policy import Policy
from kto_lightning.models.reference import FrozenReference, _on_device
from kto_lightning.models.routes.choose import make_policy
from tests.support.cli import fit, small_data, small_model
from tests.support.factories import make_model
from tests.support.steps import VOCABULARY, fit_steps, make_module, step_batch

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of tensors that are copied back for backward. CPU tensors count as a device's, and
    none is too small to be moved."""
    came_back: list[torch.Size] = []
    from_host = offloading._from_host

    def recorded(packed: Any) -> torch.Tensor:
        tensor = from_host(packed)
        if packed is not tensor:
            came_back.append(tensor.shape)
        return tensor

    monkeypatch.setattr(offloading, "_is_on_host", lambda _: False)
    monkeypatch.setattr(offloading, "MIN_BYTES", 0)
    monkeypatch.setattr(offloading, "_from_host", recorded)
    return came_back


@pytest.mark.parametrize("kind", ["llama", "lora", "qwen2_moe", "gpt2"])
@pytest.mark.parametrize("max_tokens", [10**6, 25], ids=["one", "several"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_step_is_the_same_bit_for_bit(
    kind: str, max_tokens: int, checkpointing: bool, copies: list[torch.Size]
) -> None:
    results = []
    for offloads in (False, True):
        module = make_module(kind)
        assert module.policy is not None
        if checkpointing:
            module.policy.causal_lm.gradient_checkpointing_enable(CHECKPOINTING)
        module.policy.offloads_activations = offloads
        assert not copies
        results.append(fit_steps(module, step_batch(max_tokens=max_tokens)))
    assert len(copies) > 2
    kept, moved = results
    assert moved.rows == kept.rows
    assert all(torch.equal(moved.weights[name], value) for name, value in kept.weights.items())


def make_llama() -> Policy:
    return make_policy(make_model("llama", vocab_size=VOCABULARY))[0]


def test_no_weight_is_moved_and_no_tensor_twice(copies: list[torch.Size]) -> None:
    policy = make_llama().train()
    (micro_batch,) = step_batch().micro_batches
    matrices = [p for p in policy.parameters() if p.ndim > 1]  # norms are too small in real models
    context = OffloadedActivations(policy.parameters())
    with context:
        logps = policy(micro_batch, mismatched=False)
    moved = list(context._copies)
    assert len(moved) > 10
    assert not {key[0] for key in moved} & {p.untyped_storage()._cdata for p in matrices}
    shapes = {tuple(p.shape) for p in matrices}
    assert not {tuple(key[2]) for key in moved} & shapes
    logps.matched.sum().backward()
    # The input of a layer's queries, keys and values is one tensor, which comes back three times.
    assert len(copies) > len(moved)
    assert all(p.grad is not None for p in policy.parameters())


def test_the_store_copies_the_prompts_rows_with_offloading() -> None:
    """Whole tensors, which autograd then has in host memory, would stay on the device."""
    policy = make_llama().train()
    (micro_batch,) = step_batch().micro_batches
    assert policy._runner._make_prompt_store(micro_batch).rows is None
    policy.offloads_activations = True
    rows = policy._runner._make_prompt_store(micro_batch).rows
    assert rows is not None
    assert len(rows) == sum(micro_batch.prompt_lengths)


def test_no_tensor_is_moved_without_a_gradient(copies: list[torch.Size]) -> None:
    policy = make_llama()
    policy.offloads_activations = True
    with torch.no_grad():
        assert not policy(step_batch().micro_batches[0]).matched.requires_grad
    assert not copies


def test_an_offloaded_model_is_on_the_device_only_while_it_scores() -> None:
    policy = make_llama()
    tensors = [*policy.parameters(), *policy.buffers()]
    places, values = {t.data_ptr() for t in tensors}, [t.clone() for t in tensors]
    with pytest.raises(KeyError), _on_device(policy, torch.device("cpu")):
        check_other_memory(tensors, places)
    assert {t.data_ptr() for t in tensors} == places
    assert all(torch.equal(t, value) for t, value in zip(tensors, values, strict=True))


def check_other_memory(tensors: list[torch.Tensor], places: set[int]) -> None:
    assert not {t.data_ptr() for t in tensors} & places
    raise KeyError


def test_an_offloaded_model_scores_as_one_on_the_device() -> None:
    policy = make_llama()
    (micro_batch,) = step_batch().micro_batches
    stays, waits = FrozenReference.copy_of(policy), FrozenReference.copy_of(policy, offloaded=True)
    waits._device = torch.device("cpu")
    for asked in ({}, {"matched": False}):
        expected, found = stays.logps(micro_batch, **asked), waits.logps(micro_batch, **asked)
        assert torch.equal(found.mismatched, expected.mismatched)
        assert asked or torch.equal(found.matched, expected.matched)


@pytest.mark.parametrize("name", ["activation_offloading", "offload_reference"])
def test_offloading_is_rejected_on_a_cpu(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, train = small_model(tmp_path / "policy"), small_data(tmp_path / "train.jsonl")
    fit(policy, train, tmp_path / "output", f"--model.{name}", "true", status=2)
    error = capsys.readouterr().err
    assert f"--model.{name} moves data from a GPU to host memory" in error
    assert "Remove it" in error
