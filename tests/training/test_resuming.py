"""Resuming with other settings: what must be the same is refused by name, the rest takes effect."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.cli import (
    LAST,
    fit,
    fit_arguments,
    numbers,
    rows,
    run_cli,
    small_model,
    weights,
)
from tests.support.comparison import assert_runs_equal
from tests.support.factories import plain_records, save_adapter, write_jsonl

TWO = ("--trainer.max_steps", 2)
LORA = ("--model.lora.r", 4, "--model.lora.alpha", 8, "--model.lora.dropout", 0.1)


@pytest.fixture(scope="module")
def begun(policy: Path, train: Path, tmp_path_factory: pytest.TempPathFactory):
    """A function that copies a run of two steps, with these options, each made once."""
    made: dict[tuple[Any, ...], Path] = {}

    def run(target: Path, *options: Any) -> Path:
        if options not in made:
            made[options] = tmp_path_factory.mktemp("begun")
            fit(policy, train, made[options], *TWO, *options)
        return Path(shutil.copytree(made[options], target / "run"))

    return run


def changes(output: Path) -> list[tuple[str, Any, Any, int]]:
    found = json.loads((output / "run.json").read_text())["changes"]
    return [(one["key"], one["before"], one["after"], one["step"]) for one in found]


def edit_checkpoint(output: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the only checkpoint of a run, which becomes one without checksum."""
    (path,) = (output / "checkpoints").glob("step=*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, path)


def test_what_may_change_takes_effect_and_is_recorded(
    policy: Path, train: Path, begun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = begun(tmp_path, "--model.lr_schedule", "linear", "--model.weight_decay", 0.1)
    given = {
        "model.beta": (0.1, 0.3),
        "model.desirable_weight": (1.0, 1.2),
        "model.undesirable_weight": (2.0, 2.4),
        "model.learning_rate": (1e-3, 2e-3),
        "model.weight_decay": (0.1, 0.2),
        "model.gradient_clip_norm": (None, 0.5),
        "trainer.max_steps": (2, 6),
        "checkpoint.every_n_steps": (None, 2),
    }
    options = [part for key, (_, after) in given.items() for part in (f"--{key}", after)]
    fit(policy, train, output, *LAST, "--model.lr_schedule", "linear", *options)
    printed = capsys.readouterr().out
    for line in (
        "--model.beta 0.1 -> 0.3 from step 2 on",
        "--model.learning_rate 0.001 -> 0.002 from step 2 on",
        "--model.gradient_clip_norm null -> 0.5 from step 2 on",
    ):
        assert f"changed   {line}\n" in printed
    assert changes(output) == [(key, *values, 2) for key, values in sorted_as(given, output)]
    rates = [row["train/lr"] for row in numbers(output)]
    assert rates[2:] == [2e-3 * (6 - step) / 6 for step in range(2, 6)]
    last = torch.load(output / "checkpoints" / "step=6.ckpt", weights_only=True)
    decays = [group["weight_decay"] for group in last["optimizer_states"][0]["param_groups"]]
    assert decays == [0.2, 0.0]
    # Resumed once more, without a change, the run still knows them.
    fit(
        *(policy, train, output, *LAST, "--model.lr_schedule", "linear", *options),
        *("--trainer.max_steps", 7, "--trainer.max_epochs", 2),
    )
    assert changes(output)[: len(given)] == [(k, *v, 2) for k, v in sorted_as(given, output)]
    assert changes(output)[len(given)][0] == "trainer.max_steps"


def sorted_as(given: dict[str, Any], output: Path) -> list[tuple[str, Any]]:
    """In the order of `run.json`."""
    order = [key for key, *_ in changes(output)]
    return sorted(given.items(), key=lambda item: order.index(item[0]))


def test_the_same_settings_change_nothing(
    policy: Path, train: Path, begun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = begun(tmp_path)
    moved = Path(shutil.copytree(policy, tmp_path / "moved"))
    data = Path(shutil.copy(train, tmp_path / "moved.jsonl"))
    fit(moved, data, output, *LAST, *TWO, "--data.max_tokens", 100)
    assert "changed" not in capsys.readouterr().out
    assert changes(output) == []


def test_settings_without_a_step_left_take_no_effect(
    policy: Path, train: Path, begun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = begun(tmp_path)
    files = ("model/README.md", "model/kto_lightning.json", "config.yaml")
    before = [(output / name).read_text() for name in files]
    fit(policy, train, output, *LAST, *TWO, "--model.beta", 0.3, "--model.gradient_clip_norm", 1)
    printed = capsys.readouterr().out
    assert "ignored   --model.beta 0.1 -> 0.3\n" in printed
    assert "ignored   --model.gradient_clip_norm null -> 1.0\n" in printed
    assert [(output / name).read_text() for name in files] == before
    assert changes(output) == []


def test_other_held_out_records_are_recorded(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    held_out = [write_jsonl(tmp_path / f"{i}.jsonl", plain_records(8, i)) for i in (5, 6)]
    output = fit(policy, train, tmp_path / "run", *TWO, "--data.validation", held_out[0])
    fit(policy, train, output, *LAST, "--trainer.max_steps", 3, "--data.validation", held_out[1])
    fit(policy, train, output, *LAST, "--trainer.max_steps", 4)
    steps = [step for key, _, _, step in changes(output) if key == "data.validation"]
    assert steps == [2, 3]
    printed = capsys.readouterr().out
    assert printed.count("changed   --data.validation 8 records (digest ") == 2
    assert " -> null from step 3 on" in printed


@pytest.mark.parametrize(
    ("begin", "then", "message"),
    [
        (LORA, ("--model.lora.r", 8, *LORA[2:]), "--model.lora.r is 8 (was 4)"),
        (LORA, (*LORA, "--model.lora.alpha", 9), "--model.lora.alpha is 9.0 (was 8.0)"),
        (LORA, (*LORA, "--model.lora.dropout", 0.2), "--model.lora.dropout is 0.2 (was 0.1)"),
        (
            LORA,
            (*LORA, "--model.lora.target_modules", "[q_proj]"),
            '--model.lora.target_modules is ["q_proj"] (was all-linear)',
        ),
        (LORA, (*LORA, "--model.dtype", "bfloat16"), "--model.dtype is bfloat16 (was null)"),
        (LORA, (), "--model.lora is null (was {r: 4, "),
        ((), ("--model.loss", "apo_zero_unpaired"), "--model.loss is apo_zero_unpaired (was kto)"),
        ((), ("--data.pairing", "rotate"), "--data.pairing is rotate (was distinct_prompts)"),
        ((), ("--data.pairing_seed", 3), "--data.pairing_seed is 3 (was 0)"),
        ((), ("--data.shuffle", "false"), "--data.shuffle is false (was true)"),
        (
            (),
            ("--data.batch_size", 2, "--model.optimizer", "sgd"),
            "--model.optimizer is sgd (was adamw), --data.batch_size is 2 (was 4)",
        ),
    ],
)
def test_what_must_stay_the_same_is_refused_by_name(
    begin: tuple[Any, ...],
    then: tuple[Any, ...],
    message: str,
    policy: Path,
    train: Path,
    begun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    output = begun(tmp_path, *begin)
    fit(policy, train, output, *LAST, *then, status=2)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def change_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = min(tensors)
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("lora", [(), LORA])
def test_other_weights_under_the_same_name_are_refused(
    lora: tuple[Any, ...], train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    policy = small_model(tmp_path / "policy")
    output = fit(policy, train, tmp_path / "run", *TWO, *lora)
    before = weights(output)
    change_weights(policy)
    fit(policy, train, output, *LAST, *lora, status=2)
    error = capsys.readouterr().err
    assert f"--model.policy {policy} does not hold the weights that it had in the run of" in error
    assert all(torch.equal(value, before[name]) for name, value in weights(output).items())


def test_another_base_of_an_adapter_and_another_reference_are_refused(
    train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    base, reference = small_model(tmp_path / "base"), small_model(tmp_path / "reference")
    change_weights(reference)
    adapter = save_adapter(tmp_path / "adapter", base)
    given = ("--model.reference", reference)
    output = fit(adapter, train, tmp_path / "run", *TWO, *given)
    shutil.copytree(reference, tmp_path / "same")
    fit(adapter, train, output, *LAST, "--model.reference", tmp_path / "same")
    capsys.readouterr()
    fit(adapter, train, output, *LAST, "--model.reference", base, status=2)
    assert f"--model.reference {base} does not hold the weights of" in capsys.readouterr().err
    change_weights(base)
    fit(adapter, train, output, *LAST, *given, status=2)
    assert f"--model.policy {adapter} does not hold the weights that" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "Another question"}, "differs: their prompts, completions or order."),
        ({"weight": 0.5}, "differs: their weights."),
        ({"label": None}, "differs: their labels"),
        ({"completion": None}, "differs: their prompts, completions or order; the token ids"),
    ],
)
def test_other_records_are_refused_by_what_differs(
    change: dict[str, Any],
    message: str,
    policy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    records = plain_records(24)
    data = write_jsonl(tmp_path / "data.jsonl", records)
    output = fit(policy, data, tmp_path / "run", *TWO)
    record = records[5]
    if change.get("label", 0) is None:
        change = {"label": not record["label"]}
    elif change.get("completion", 0) is None:  # as many tokens, in another order
        change = {"completion": " ".join(reversed(record["completion"].split(" ")))}
    write_jsonl(data, [*records[:5], record | change, *records[6:]])
    weights_given = ("--model.desirable_weight", 1.0, "--model.undesirable_weight", 1.0)
    fit(policy, data, output, *LAST, *weights_given, status=2)
    assert message in capsys.readouterr().err


def test_a_checkpoint_of_before_these_comparisons_resumes(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole = fit(policy, train, tmp_path / "whole")
    output = fit(policy, train, tmp_path / "run", *TWO)

    def age(checkpoint: dict[str, Any]) -> None:
        for name in ("settings", "identities", "changes"):
            del checkpoint["kto"][name]
        for name in ("shuffle", "pairing_seed", "streaming"):
            del checkpoint["kto"]["data"][name]
        del checkpoint["KTODataModule"]["records"]

    edit_checkpoint(output, age)
    fit(policy, train, output, *LAST, "--model.optimizer", "sgd", status=2)
    assert "--model.optimizer is sgd (was adamw)" in capsys.readouterr().err
    fit(policy, train, output, *LAST)
    assert_runs_equal(output, whole)


def test_a_reference_may_follow_otherwise_or_no_longer(
    policy: Path, train: Path, begun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    every = ("--model.follow.every_n_steps", 1)
    output = begun(tmp_path, *every)

    def reference(step: int) -> dict[str, torch.Tensor]:
        path = output / "checkpoints" / f"step={step}.ckpt"
        return torch.load(path, weights_only=True)["reference"]

    two = reference(2)
    fit(policy, train, output, *LAST, "--trainer.max_steps", 3)
    assert "changed   --model.follow {every_n_steps: 1, alpha: 0.6} -> null" in (
        capsys.readouterr().out
    )
    fit(policy, train, output, *LAST, "--trainer.max_steps", 4)  # it is still in the checkpoint
    four = reference(4)
    assert all(torch.equal(value, four[name]) for name, value in two.items())
    fit(policy, train, output, *LAST, "--trainer.max_steps", 5, *every, "--model.follow.alpha", 1)
    assert any(not torch.equal(value, reference(5)[name]) for name, value in two.items())
    assert "changed   --model.follow null -> {every_n_steps: 1, alpha: 1.0}" in (
        capsys.readouterr().out
    )
    assert len(rows(output)) == 5


def odd(*keys: str) -> Callable[[dict[str, Any]], None]:
    """An edit of a checkpoint that puts a list in place of the value at these keys."""

    def edit(checkpoint: dict[str, Any]) -> None:
        *path, last = keys
        for key in path:
            checkpoint = checkpoint[key]
        checkpoint[last] = ["odd"]

    return edit


@pytest.mark.parametrize(
    "keys",
    [
        ("kto", "settings", "model.beta"),
        ("kto", "settings"),
        ("kto", "identities"),
        ("kto", "changes"),
        ("kto", "data"),
        ("KTODataModule",),
        ("KTODataModule", "sampler"),
        ("KTODataModule", "records"),
        ("loops", "fit_loop", "epoch_progress"),
        ("loops", "fit_loop", "epoch_loop.batch_progress"),
        ("callbacks",),
        ("callbacks", "Preemption"),
        ("optimizer_states",),
        ("lr_schedulers",),
    ],
)
def test_a_checkpoint_with_odd_values_resumes_or_is_refused(
    keys: tuple[str, ...],
    policy: Path,
    train: Path,
    begun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    output = begun(tmp_path)
    edit_checkpoint(output, odd(*keys))
    status = run_cli("fit", *fit_arguments(policy, train, output, *LAST))
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert status == 0 or (status in (1, 2) and "error: " in error)
