"""Held-out numbers through the command line: whose row they stand in, and that they are those of a
training step on the same batch."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import fit, numbers, rows, run_cli, small_data, small_model
from tests.support.factories import plain_records, write_jsonl
from tests.support.tolerances import RELATIVE, SIX_DIGITS, assert_same_numbers, logp_rounding

SHARED = ("loss", "z0", "z0_raw", "reward/desirable", "reward/undesirable", "reward/margin")
SHARED += ("logps/desirable", "logps/undesirable", "tokens")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model, so that rewards and z0 are not 0 from the beginning."""
    return small_model(tmp_path_factory.mktemp("reference"), seed=1)


def frozen(reference: Path, *options: Any) -> tuple[Any, ...]:
    """Settings under which no step changes the policy."""
    return ("--model.learning_rate", 0.0, "--model.reference", reference, *options)


def validated(output: Path) -> list[int]:
    return [int(row["step"]) for row in rows(output) if row["val/loss"]]


def validate(capsys: pytest.CaptureFixture[str], *options: Any) -> dict[str, float]:
    capsys.readouterr()
    assert run_cli("validate", *options, "--trainer.accelerator", "cpu") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {line[0]: float(line[1]) for line in lines if line and line[0].startswith("val/")}


def assert_same_as_printed(found: dict[str, float], expected: dict[str, float]) -> None:
    """What `validate` printed is what `fit` wrote."""
    printed, written = (
        {name: row[f"val/{name}"] for name in (*SHARED, "reward/auc")} for row in (found, expected)
    )
    assert_same_numbers(printed, written, relative=RELATIVE + SIX_DIGITS)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ((), [6, 12]),
        (("--trainer.val_check_interval", 2), [2, 4, 6, 8, 10, 12]),
        (("--trainer.val_check_interval", 0.5), [3, 6, 9, 12]),
        (("--trainer.check_val_every_n_epoch", 2), [12]),
        (("--trainer.val_check_interval", 5, "--trainer.check_val_every_n_epoch", "null"), None),
        (("--trainer.max_steps", 8), [6, 8]),
    ],
)
def test_validation_adds_to_the_row_of_its_step(
    options: tuple[Any, ...], steps: list[int] | None, policy: Path, train: Path, tmp_path: Path
):
    held_out = small_data(tmp_path / "held_out.jsonl", 6, seed=9)
    held = ("--data.validation", held_out, "--trainer.max_epochs", 2)
    output = fit(policy, train, tmp_path / "run", *held, *options)
    assert validated(output) == (steps or [5, 10, 12])
    assert [row["step"] for row in rows(output)] == [str(n + 1) for n in range(len(rows(output)))]
    assert all(row["train/loss"] for row in rows(output))


def test_validation_does_not_disturb_training(policy: Path, train: Path, tmp_path: Path):
    held_out = ("--data.validation", train, "--trainer.val_check_interval", 1)
    with_it = fit(policy, train, tmp_path / "with", *held_out)
    without = fit(policy, train, tmp_path / "without")
    for one, other in zip(rows(with_it), rows(without), strict=True):
        assert one["train/loss"]
        for name in [name for name in one if name.startswith("train/")]:
            assert one[name] == other[name]


def test_held_out_prompts_that_are_trained_on_are_counted(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    records = [
        {"prompt": f"Number {i}.", "completion": " yes", "label": bool(i % 2)} for i in range(24)
    ]
    kept, held_out = tmp_path / "kept.jsonl", tmp_path / "held_out.jsonl"
    write_jsonl(kept, records[:12])
    for first, expected in ((9, ["warning: 3 of 15 held-out records"]), (12, [])):
        write_jsonl(held_out, records[first:])
        options = ("--data.validation", held_out, "--trainer.max_steps", 1)
        fit(policy, kept, tmp_path / str(first), *options)
        out = capsys.readouterr().out
        warnings = [line for line in out.splitlines() if "held-out records have prompts" in line]
        assert [line.partition(" have prompts")[0] for line in warnings] == expected


def test_a_fraction_is_held_out_of_training(policy: Path, train: Path, tmp_path: Path):
    options = ("--data.batch_size", 24, "--trainer.max_steps", 1)
    (whole,) = numbers(fit(policy, train, tmp_path / "whole", *options))
    output = fit(policy, train, tmp_path / "part", *options, "--data.validation", 0.25)
    (part,), (held_out,) = numbers(output), numbers(output, "val")
    assert part["train/tokens"] + held_out["val/tokens"] == whole["train/tokens"]
    assert 0.1 < held_out["val/tokens"] / whole["train/tokens"] < 0.5


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("max_tokens", [16384, 150, 1])
def test_a_held_out_batch_has_the_numbers_of_a_training_batch(
    loss: str, max_tokens: int, policy: Path, reference: Path, train: Path, tmp_path: Path
):
    options = ("--data.batch_size", 24, "--data.max_tokens", max_tokens, "--model.loss", loss)
    held_out = ("--data.validation", train, "--data.shuffle", "false")
    output = fit(policy, train, tmp_path, *frozen(reference, *options), *held_out)
    (trained,), (valued,) = numbers(output), numbers(output, "val")
    stages = (("val", valued), ("train", trained))
    assert_same_numbers(*({n: row[f"{stage}/{n}"] for n in SHARED} for stage, row in stages))
    assert trained["train/reward/margin"] != 0.0


def test_z0_is_one_number_per_batch(policy: Path, reference: Path, train: Path, tmp_path: Path):
    """Over several batches, val/… are the means of training's rows, weighted by their examples."""
    data = ("--data.validation", train, "--data.shuffle", "false", "--data.batch_size", 10)
    output = fit(policy, train, tmp_path, *frozen(reference), *data)
    batches, valued = numbers(output), numbers(output, "val")[-1]
    assert [row["step"] for row in rows(output)] == ["1", "2", "3"]
    names = ("loss", "z0", "z0_raw")
    sized = list(zip((10, 10, 4), batches, strict=True))
    means = {n: sum(size * row[f"train/{n}"] for size, row in sized) / 24 for n in names}
    rounding = logp_rounding(number for row in batches for number in row.items())
    assert_same_numbers({n: valued[f"val/{n}"] for n in names}, means, rounding=rounding)
    assert len({row["train/z0_raw"] for row in batches}) == 3


def test_an_absent_class_leaves_empty_cells(policy: Path, train: Path, tmp_path: Path):
    records = [record | {"label": False} for record in plain_records(4, seed=9)]
    held_out = write_jsonl(tmp_path / "bad.jsonl", records)
    row = rows(fit(policy, train, tmp_path / "run", "--data.validation", held_out))[-1]
    for name in ("reward/desirable", "reward/margin", "logps/desirable", "reward/auc"):
        assert row[f"val/{name}"] == ""
    assert row["val/reward/undesirable"]


def test_auc_is_the_share_of_pairs_in_order(
    policy: Path, reference: Path, train: Path, tmp_path: Path
):
    """Counted one pair at a time, with the rewards that `predict` gives to the same records."""
    held_out = ("--data.validation", train, "--model.reference", reference)
    output = fit(policy, train, tmp_path / "run", *held_out)
    model = ("--model.policy", output / "model", "--data.predict", train)
    assert run_cli("predict", *model, "--trainer.accelerator", "cpu") == 0
    lines = Path(f"{train}.rewards.jsonl").read_text().splitlines()
    rewards = {True: [], False: []}
    for line in map(json.loads, lines):
        rewards[line["label"]].append(line["reward"])
    pairs = [(good, bad) for good in rewards[True] for bad in rewards[False]]
    in_order = sum(1.0 if good > bad else 0.5 if good == bad else 0.0 for good, bad in pairs)
    auc = numbers(output, "val")[-1]["val/reward/auc"]
    assert auc == pytest.approx(in_order / len(pairs), rel=1e-6)
    assert 0.0 < auc < 1.0


@pytest.mark.parametrize("lora", [(), ("--model.lora.r", 4)])
def test_validate_reads_a_checkpoint(
    lora: tuple[Any, ...],
    policy: Path,
    train: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    held_out = ("--data.validation", small_data(tmp_path / "held_out.jsonl", 6, seed=9))
    options = (*held_out, *lora, "--checkpoint.every_n_steps", 3)
    output = fit(
        *(policy, train, tmp_path / "run", *options, "--trainer.val_check_interval", 3),
        *("--model.desirable_weight", 1.0, "--model.undesirable_weight", 2.0),
    )
    config = (output / "config.yaml").read_bytes()
    for step in (3, 6):
        checkpoint = output / "checkpoints" / f"step={step}.ckpt"
        found = validate(
            capsys,
            *("--model.policy", policy, *held_out, *lora, "--ckpt_path", checkpoint),
            *("--data.batch_size", 4, "--output_dir", output),
            *("--model.desirable_weight", 1.0, "--model.undesirable_weight", 2.0),
        )
        assert_same_as_printed(found, numbers(output, "val")[step - 1])
    assert (output / "config.yaml").read_bytes() == config
    assert len(rows(output)) == 6


def test_validate_takes_the_fraction_that_fit_held_out(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    held_out = ("--data.validation", 0.25, "--data.batch_size", 4)
    output = fit(policy, train, tmp_path, *held_out)
    found = validate(
        capsys,
        *("--model.policy", output / "model", "--data.train", train, *held_out),
        *("--output_dir", tmp_path / "validated"),
    )
    assert_same_as_printed(found, numbers(output, "val")[-1])


def test_early_stopping_sees_the_held_out_loss(policy: Path, train: Path, tmp_path: Path):
    output = fit(
        *(policy, train, tmp_path, "--data.validation", 0.25, "--trainer.max_epochs", 9),
        *("--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss"),
        *("--trainer.callbacks.patience", 1, "--trainer.callbacks.min_delta", 1e9),
    )
    assert 0 < len(rows(output)) < 9 * 5


def test_held_out_records_with_a_single_prompt_are_refused_in_words(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    records = [record | {"prompt": "same"} for record in plain_records(4)]
    held_out = write_jsonl(tmp_path / "single.jsonl", records)
    fit(policy, train, tmp_path / "run", "--data.validation", held_out, status=1)
    error = capsys.readouterr().err
    assert "at least two different prompts" in error
    assert "Traceback" not in error
