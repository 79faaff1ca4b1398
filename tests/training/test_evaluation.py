"""Held-out records: their numbers during `fit`, in `validate` and, one by one, in `predict`."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from kto_lightning.training.evaluation import RewardAUC
from tests.support.cli import fit, numbers, rows, run_cli, small_data, small_model
from tests.support.factories import plain_records, write_jsonl
from tests.support.loggers import RowLogger
from tests.support.steps import make_module, step_batch
from tests.support.tolerances import (
    RELATIVE,
    SIX_DIGITS,
    assert_same_numbers,
    assert_same_rewards,
    logp_rounding,
)

SHARED = ("loss", "z0", "z0_raw", "reward/desirable", "reward/undesirable", "reward/margin")
SHARED += ("logps/desirable", "logps/undesirable", "tokens")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model than the policy, so that rewards and z0 are not 0 at the first step."""
    return small_model(tmp_path_factory.mktemp("reference"), seed=1)


def frozen(reference: Path, *options: Any) -> tuple[Any, ...]:
    """Settings under which no step changes the policy."""
    return ("--model.learning_rate", 0.0, "--model.reference", reference, *options)


def validated_steps(output: Path) -> list[int]:
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
    assert validated_steps(output) == (steps or [5, 10, 12])
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


def test_held_out_prompts_in_the_training_set_are_counted(
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


def test_early_stopping_monitors_the_held_out_loss(policy: Path, train: Path, tmp_path: Path):
    output = fit(
        *(policy, train, tmp_path, "--data.validation", 0.25, "--trainer.max_epochs", 9),
        *("--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss"),
        *("--trainer.callbacks.patience", 1, "--trainer.callbacks.min_delta", 1e9),
    )
    assert 0 < len(rows(output)) < 9 * 5


def test_held_out_records_with_a_single_prompt_are_refused(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    records = [record | {"prompt": "same"} for record in plain_records(4)]
    held_out = write_jsonl(tmp_path / "single.jsonl", records)
    fit(policy, train, tmp_path / "run", "--data.validation", held_out, status=1)
    error = capsys.readouterr().err
    assert "at least two different prompts" in error
    assert "Traceback" not in error


def test_auc_counts_pairs_and_half_of_ties():
    rewards = torch.tensor([3.0, 1.0, 1.0, -2.0, 1e9, 1e9 + 64])
    desirable = torch.tensor([True, True, False, False, False, True])
    auc = RewardAUC()
    auc.update(rewards[:2], desirable[:2])
    auc.update(rewards[2:], desirable[2:])
    pairs = [
        1.0 if good > bad else 0.5 if good == bad else 0.0
        for good in rewards[desirable].tolist()
        for bad in rewards[~desirable].tolist()
    ]
    assert float(auc.compute()) == pytest.approx(sum(pairs) / len(pairs))


def test_auc_of_one_class_is_unknown():
    auc = RewardAUC()
    auc.update(torch.tensor([1.0, 2.0]), torch.tensor([True, True]))
    assert torch.isnan(auc.compute())


@pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")
def test_held_out_standard_errors_are_over_the_whole_set() -> None:
    """Two copies of a set: the same sums of squares twice, and twice the examples."""
    once, twice = (validate_copies(copies) for copies in (1, 2))
    few, many = 6, 12
    factor = math.sqrt((few - 1) / (many - 1))  # of the error, as of its root over n
    assert twice["val/z0_se"] == pytest.approx(once["val/z0_se"] * factor, rel=1e-5)
    for name in ("val/gradient_left/desirable", "val/reward/desirable", "val/z0_raw"):
        assert twice[name] == pytest.approx(once[name], rel=1e-6)
    assert "val/tokens_per_second" not in once


def validate_copies(copies: int) -> dict[str, float]:
    rows = RowLogger()
    trainer = Trainer(
        accelerator="cpu",
        logger=rows,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    steps = DataLoader([step_batch(max_tokens=30)] * copies, batch_size=None)  # pyright: ignore
    trainer.validate(make_module(), dataloaders=steps, verbose=False)
    (row,) = rows.rows
    return row


BETA = 0.1


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, records to train on, others held out, and the output of one epoch."""
    directory = tmp_path_factory.mktemp("held_out")
    small_model(directory / "model")
    small_data(directory / "train.jsonl", 24)
    small_data(directory / "held_out.jsonl", 10, seed=9)
    status = run_cli(
        *("fit", "--model.policy", directory / "model", "--data.train", directory / "train.jsonl"),
        *("--data.validation", directory / "held_out.jsonl", "--trainer.val_check_interval", 2),
        *("--model.learning_rate", 1e-2, "--trainer.accelerator", "cpu"),
        *("--output_dir", directory / "output"),
    )
    assert status == 0
    return directory


def read_jsonl(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def sequence_logp(model, tokenizer, record: dict) -> float:
    """log π(y|x) by one plain forward, with EOS as the project and TRL add it."""
    prompt = tokenizer(record["prompt"])["input_ids"]
    whole = tokenizer(record["prompt"] + record["completion"] + tokenizer.eos_token)["input_ids"]
    shared = 0
    while shared < len(prompt) and prompt[shared] == whole[shared]:
        shared += 1
    ids = torch.tensor([whole])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].log_softmax(-1)
    scored = logps.gather(1, ids[0, 1:, None]).squeeze(1)[max(shared - 1, 0) :]
    return float(scored.sum())


def expected_lines(inputs: Path) -> list[dict[str, float]]:
    """Log-probs and reward of each record, as `predict` writes them."""
    records = read_jsonl(inputs / "held_out.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(path)
        for path in (inputs / "output" / "model", inputs / "model")
    )
    lines = []
    for record in records:
        new, old = (sequence_logp(model, tokenizer, record) for model in (policy, reference))
        lines.append({"policy_logps": new, "reference_logps": old, "reward": BETA * (new - old)})
    return lines


def test_predict_rewards_every_record_against_the_remembered_reference(inputs):
    held_out = inputs / "held_out.jsonl"
    command = ("predict", "--model.policy", inputs / "output" / "model")
    options = ("--data.predict", held_out, "--trainer.accelerator", "cpu")
    assert run_cli(*command, *options, "--output_dir", inputs / "predicted") == 0
    lines = read_jsonl(inputs / "predicted" / "held_out.jsonl.rewards.jsonl")
    assert [line["line"] for line in lines] == list(range(1, 11))
    expected = expected_lines(inputs)
    assert max(abs(line["reward"]) for line in expected) > 0.01
    assert_same_rewards(lines, expected, beta=BETA)


def test_a_record_that_is_too_long_has_no_reward(inputs, tmp_path):
    records = write_jsonl(
        tmp_path / "records.jsonl",
        [
            {"prompt": "a " * 200, "completion": "b", "label": True},
            {"prompt": "What?", "completion": "That.", "label": False},
        ],
    )
    command = ("predict", "--model.policy", inputs / "output" / "model")
    options = ("--data.predict", records, "--data.max_length", 32, "--trainer.accelerator", "cpu")
    assert run_cli(*command, *options, "--output_dir", tmp_path) == 0
    first, second = read_jsonl(f"{records}.rewards.jsonl")
    assert first["reward"] is None
    assert second["reward"] is not None
    assert (first["label"], second["label"]) == (True, False)


def test_fit_validates_at_its_interval_and_at_the_end(inputs):
    table = rows(inputs / "output")
    assert [bool(row["val/loss"]) for row in table] == [False, True, True]


def test_the_last_validation_is_of_the_exported_model(inputs):
    row = rows(inputs / "output")[-1]
    records = read_jsonl(inputs / "held_out.jsonl")
    lines = expected_lines(inputs)
    found, expected = {}, {}
    for label, name in ((True, "desirable"), (False, "undesirable")):
        of_class = [
            line for line, record in zip(lines, records, strict=True) if record["label"] is label
        ]
        for column, part in (("reward", "reward"), ("logps", "policy_logps")):
            expected[f"{column}/{name}"] = float(np.mean([line[part] for line in of_class]))
            found[f"{column}/{name}"] = float(row[f"val/{column}/{name}"])
    assert_same_numbers(found, expected, beta=BETA)


def test_validate_prints_the_numbers_of_fit(inputs, capsys):
    printed = validate(
        capsys,
        *("--model.policy", inputs / "output" / "model"),
        *("--data.validation", inputs / "held_out.jsonl", "--output_dir", inputs / "validated"),
    )
    row = rows(inputs / "output")[-1]
    names = [f"val/reward/{name}" for name in ("desirable", "undesirable", "margin", "auc")]
    names += ["val/logps/desirable", "val/logps/undesirable"]
    sides = ({name: float(side[name]) for name in names} for side in (printed, row))
    assert_same_numbers(*sides, beta=BETA, relative=RELATIVE + SIX_DIGITS)
