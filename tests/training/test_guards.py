"""Steps that are not finite are not taken; the error of running out of memory names a remedy."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kto_lightning.batches.packing import example_costs
from kto_lightning.batches.pairing import pair_distinct_prompts
from kto_lightning.batches.types import Logps, PackedBatch
from kto_lightning.data.dataset import load_records
from kto_lightning.data.tokenize import tokenize_records
from kto_lightning.models.policy import Policy
from kto_lightning.models.tokenizer import load_tokenizer
from kto_lightning.training.checkpoints import list_checkpoints
from kto_lightning.training.guards import MAX_SKIPPED_IN_A_ROW, group_by_file
from tests.support.cli import (
    EVERY_STEP,
    checkpoint_tensors,
    fit,
    numbers,
    rows,
    run_cli,
    small_model,
    weights,
)
from tests.support.faults import corrupt_policy

SKIP = ("--model.non_finite", "skip")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("policy"), "gpt2")


@pytest.mark.parametrize(
    ("gradient", "options"),
    [
        (False, ("--data.max_tokens", 60)),
        (False, ("--model.loss", "apo_zero_unpaired", "--data.max_tokens", 60)),
        (True, ("--model.gradient_clip_norm", 1.0)),
    ],
)
def test_a_step_that_is_not_finite_stops_the_run_before_it_is_taken(
    gradient: bool, options: tuple[Any, ...], policy: Path, train: Path, tmp_path: Path, capsys
):
    """In file order, example 9 (line 10) is in the third batch of four."""
    options = ("--data.shuffle", "false", *options)
    whole = fit(policy, train, tmp_path / "whole", *options)
    with pytest.MonkeyPatch.context() as patch:
        corrupt_policy(patch, 9, math.nan, gradient=gradient)
        output = fit(policy, train, tmp_path / "run", *options, status=1)
    error = capsys.readouterr().err
    assert "step 3 is not finite" in error
    assert f"Its batch: {train}:9,10,11,12." in error
    assert (f"Log-probs that are not finite: {train}:10 (policy)." in error) is not gradient
    assert ("All its log-probs are finite, so the gradient alone is not" in error) is gradient
    assert "Traceback" not in error
    assert [row["step"] for row in rows(output)] == ["1", "2"]
    assert not (output / "model").exists()
    (saved,) = checkpoint_tensors(output).values()
    assert all(value.isfinite().all() for value in saved.values())
    # Without the cause, the resumed run equals an uninterrupted one.
    fit(policy, train, output, *options, "--ckpt_path", "last")
    assert rows(output) == rows(whole)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(output).items())


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_step_that_is_not_finite_can_be_skipped(
    optimizer: str, policy: Path, train: Path, tmp_path: Path, capsys, monkeypatch
):
    corrupt_policy(monkeypatch, 9, math.nan, gradient=True)
    options = (*SKIP, "--data.shuffle", "false", "--model.optimizer", optimizer)
    output = fit(policy, train, tmp_path, *options, *EVERY_STEP, "--trainer.max_steps", 3)
    before, after = checkpoint_tensors(output).values()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert before.keys() == after.keys()
    fit(policy, train, output, *options, "--ckpt_path", "last")
    found = numbers(output)
    assert [math.isnan(row["train/grad_norm"]) for row in found] == [step == 2 for step in range(6)]
    assert rows(output)[2]["train/grad_norm"] == "nan"
    assert all(math.isfinite(row["train/loss"]) for row in found)
    assert len(found) == 6
    assert all(value.isfinite().all() for value in weights(output).values())
    assert any((v != after[f"policy.model.{n}"]).any() for n, v in weights(output).items())
    error = capsys.readouterr().err
    assert "step 3 is not finite" in error
    assert "The step is skipped." in error
    assert "1 steps were skipped" in error


def test_many_skipped_steps_give_few_warnings_and_then_stop_the_run(
    policy: Path, train: Path, tmp_path: Path, capsys, monkeypatch
):
    for example in range(24):
        corrupt_policy(monkeypatch, example, math.nan, gradient=False)
    output = fit(policy, train, tmp_path, *SKIP, "--trainer.max_epochs", 4, status=1)
    assert len(rows(output)) == MAX_SKIPPED_IN_A_ROW - 1
    error = capsys.readouterr().err
    assert error.count("The step is skipped.") == 3
    assert f"{MAX_SKIPPED_IN_A_ROW} steps in a row were skipped" in error


def test_another_action_is_refused(policy: Path, train: Path, tmp_path: Path, capsys):
    fit(policy, train, tmp_path, "--model.non_finite", "ignore", status=2)
    assert "--model.non_finite must be stop or skip, got ignore" in capsys.readouterr().err


def test_locations_are_grouped_by_file():
    places = ["a.jsonl:3", "b:c.jsonl:1", "a.jsonl:7"]
    assert group_by_file(places) == "a.jsonl:3,7; b:c.jsonl:1"
    assert group_by_file(f"a:{line}" for line in range(70)).endswith(",62,63 and 6 more")


class NoMemory:
    """A forward that fails as an allocator does, for the micro-batch of one example."""

    def __init__(self, example: int, error: BaseException) -> None:
        self.example, self.error = example, error

    def __call__(self, policy: Policy, batch: PackedBatch, **options: Any) -> Logps:
        if self.example in batch.indices:
            raise self.error
        return FORWARD(policy, batch, **options)


FORWARD = Policy.forward
ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't"),
    MemoryError(),
)


def fail_at_example_nine(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    fake = NoMemory(9, error)
    monkeypatch.setattr(Policy, "forward", lambda *args, **options: fake(*args, **options))


@pytest.mark.parametrize("error", ERRORS, ids=["device", "allocator", "python"])
def test_out_of_memory_names_the_micro_batch_and_what_to_try(
    error: BaseException, policy: Path, train: Path, tmp_path: Path, capsys, monkeypatch
):
    fail_at_example_nine(monkeypatch, error)
    options = ("--data.shuffle", "false")
    output = fit(policy, train, tmp_path, *options, status=1)
    shown = capsys.readouterr().err
    lengths = planned_lengths(policy, train)[8:12]
    tokens, longest = sum(lengths), max(lengths)
    assert "error: out of memory (" in shown
    assert f"a micro-batch of 4 examples with {tokens} tokens does not fit" in shown
    assert f"--data.max_tokens {max(tokens // 2, longest)}," in shown
    assert "Traceback" not in shown
    assert [step for step, _ in list_checkpoints(output)] == [2]


def test_a_single_example_that_does_not_fit(
    policy: Path, train: Path, tmp_path: Path, capsys, monkeypatch
):
    fail_at_example_nine(monkeypatch, ERRORS[0])
    options = ("--data.shuffle", "false", "--data.max_tokens", 1)
    fit(policy, train, tmp_path, *options, status=1)
    error = capsys.readouterr().err
    assert f"a single example of {planned_lengths(policy, train)[9]} tokens" in error
    assert "--data.max_length" in error
    assert "--data.max_tokens" not in error


def test_out_of_memory_in_validation_and_prediction(
    policy: Path, train: Path, tmp_path: Path, capsys, monkeypatch
):
    fail_at_example_nine(monkeypatch, ERRORS[0])
    for command in ("validate", "predict"):
        data = ("--data.predict" if command == "predict" else "--data.validation", train)
        options = ("--output_dir", tmp_path, "--trainer.accelerator", "cpu")
        assert run_cli(command, "--model.policy", policy, *data, *options) == 1
        assert "a micro-batch of 8 examples with" in capsys.readouterr().err


def test_another_error_is_not_taken_for_out_of_memory(
    policy: Path, train: Path, tmp_path: Path, monkeypatch
):
    fake = NoMemory(0, RuntimeError("something else"))
    monkeypatch.setattr(Policy, "forward", lambda *args, **options: fake(*args, **options))
    with pytest.raises(RuntimeError, match="something else"):
        fit(policy, train, tmp_path)


def planned_lengths(policy: Path, train: Path) -> list[int]:
    """Tokens of each example as `--data.max_tokens` counts them, in file order."""
    records = load_records(str(train))
    examples = tokenize_records(records, load_tokenizer(str(policy)), max_length=1024)
    partner = pair_distinct_prompts(examples.prompt_keys, seed=None).partner
    lengths = (examples.prompt_lengths, examples.completion_lengths)
    return example_costs(*lengths, partner, max_length=1024).tolist()
