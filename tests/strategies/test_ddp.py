"""DDP: two ranks give the numbers of one (invariant 1), and print everything once."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.support.cli import fit, rows, run_process, small_model, weights
from tests.support.comparison import assert_numbers_agree, assert_weights_agree
from tests.support.factories import plain_records, write_jsonl
from tests.support.families import GRANITE_EXPERTS
from tests.support.image_text import save_image_text
from tests.support.ranks import fit_on_ranks, run_ranks
from tests.support.tolerances import RELATIVE, SIX_DIGITS, assert_same_numbers, assert_same_rewards

# What AdamW makes of a gradient that is nothing but rounding is a step of any size.
SGD = ("--model.optimizer", "sgd", "--model.learning_rate", 0.1)
ADAMW = ("--model.lr_schedule", "cosine", "--model.weight_decay", 0.1)
CASES: dict[str, tuple[Any, ...]] = {
    "adamw": ADAMW,
    "several micro-batches": (*SGD, "--data.max_tokens", 60, "--model.gradient_clip_norm", 0.5),
    "an odd batch, one example in the last": (*SGD, "--data.batch_size", 23),
    "one class on each rank": (*SGD, "--data.batch_size", 2, "--trainer.max_steps", 5),
    "one example a step": (*SGD, "--data.batch_size", 1, "--trainer.max_steps", 3),
    "apo_zero": (*SGD, "--model.loss", "apo_zero_unpaired", "--data.max_tokens", 60),
    "validation": (*SGD, "--data.validation", 0.4, "--trainer.val_check_interval", 2),
    "lora": (
        *(*SGD, "--data.max_tokens", 60, "--model.lora.r", 4, "--model.lora.use_dora", "true"),
        *("--model.lora.modules_to_save", '["norm"]'),
    ),
    "checkpointing": (*SGD, "--model.activation_checkpointing", "true", "--data.max_tokens", 60),
    "a reference that follows": (*SGD, "--model.follow.every_n_steps", 2),
}
# Cut into single examples the auxiliary loss is one mean over the same parts.
SINGLE = (*SGD, "--data.max_tokens", 1)
MODELS: dict[str, tuple[str, dict[str, Any], tuple[Any, ...]]] = {
    "padded": ("mamba", {}, (*SGD, "--data.batch_size", 23)),
    "cached, experts": ("granitemoehybrid", GRANITE_EXPERTS, SINGLE),
    "weights that only long sequences use": (
        "deepseek_v4",
        {},
        (*SINGLE, "--data.batch_size", 2, "--trainer.max_steps", 2),
    ),
}


def compare(policy: Path, train: Path, directory: Path, *options: Any) -> tuple[Path, Path]:
    """Runs on two ranks and on one, compared."""
    two = fit_on_ranks(policy, train, directory / "two", *options)
    one = fit(policy, train, directory / "one", *options)
    assert_numbers_agree(two, one)
    assert_weights_agree(two, one)
    return two, one


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_numbers_of_one(case: str, policy: Path, train: Path, tmp_path: Path):
    two, one = compare(policy, train, tmp_path, *CASES[case])
    start = load_file(policy / "model.safetensors")
    assert any((weights(one)[name] - weight).abs().max() > 1e-3 for name, weight in start.items())
    if case == "validation":
        assert_numbers_agree(two, one, stage="val")
        assert all(row["val/reward/auc"] for row in rows(two)[1::2])


def test_an_image_text_model_is_not_waited_for_where_text_gives_no_gradient(tmp_path, train):
    policy = save_image_text(tmp_path / "policy", "mistral3")
    compare(policy, train, tmp_path, *SGD, "--trainer.max_steps", 3)


@pytest.mark.parametrize("case", MODELS)
def test_two_ranks_give_the_numbers_of_one_with_other_models(
    case: str, train: Path, tmp_path: Path
):
    architecture, overrides, options = MODELS[case]
    policy = small_model(tmp_path / "policy", architecture, **overrides)
    compare(policy, train, tmp_path, "--trainer.max_steps", 3, *options)


def test_two_ranks_fill_and_read_one_cache(policy: Path, train: Path, tmp_path: Path):
    options = (*SGD, "--data.max_tokens", 60, "--data.validation", 0.4)
    one = fit(policy, train, tmp_path / "one", *options)
    cached = (*options, "--model.reference_cache", tmp_path / "cache")
    filling = fit_on_ranks(policy, train, tmp_path / "filling", *cached)
    assert len(list((tmp_path / "cache").glob("*/*.logps"))) == 2
    full = fit_on_ranks(policy, train, tmp_path / "full", *cached)
    assert len(list((tmp_path / "cache").glob("*/*.logps"))) == 2
    for output in (filling, full):
        assert_numbers_agree(output, one)
        assert_numbers_agree(output, one, stage="val")


def test_predict_and_validate_count_every_record_once(policy: Path, tmp_path: Path):
    data = write_jsonl(tmp_path / "held_out.jsonl", plain_records(9, seed=3))
    reference = small_model(tmp_path / "reference", seed=1)
    shared = ["--model.policy", policy, "--model.reference", reference]
    shared += ["--output_dir", tmp_path / "output", "--data.batch_size", 4]
    shared += ["--trainer.accelerator", "cpu", "--trainer.devices"]
    rewards, printed = {}, {}
    for ranks in (2, 1):
        ended = run_ranks("predict", *shared, ranks, "--data.predict", data, ranks=ranks)
        assert [rank.status for rank in ended] == [0] * ranks, ended[0].err
        assert sum(rank.out.count("rewards  ") for rank in ended) == 1
        lines = (tmp_path / "output" / "held_out.jsonl.rewards.jsonl").read_text().splitlines()
        rewards[ranks] = [json.loads(line) for line in lines]
        ended = run_ranks("validate", *shared, ranks, "--data.validation", data, ranks=ranks)
        assert [rank.status for rank in ended] == [0] * ranks, ended[0].err
        printed[ranks] = [rank.out for rank in ended]
    assert len(rewards[2]) == 9
    assert [line["line"] for line in rewards[2]] == [line["line"] for line in rewards[1]]
    assert_same_rewards(rewards[2], rewards[1])
    assert printed[2][1] == ""
    two, one = (
        {name: float(value) for name, value in map(str.split, printed[n][0].splitlines())}
        for n in (2, 1)
    )
    assert "val/reward/auc" in two
    assert_same_numbers(two, one, relative=RELATIVE + SIX_DIGITS)


def hold_memory() -> None:
    """For `prepare` of a job: the second rank allocates 768 MiB."""
    if os.environ["RANK"] == "1":
        held.append(np.ones(768 * 2**20 // 8))


held: list[Any] = []


def test_everything_is_printed_and_written_once(policy: Path, train: Path, tmp_path: Path):
    options = ["--model.policy", policy, "--data.train", train, "--output_dir", tmp_path]
    options += ["--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.max_steps", 2]
    first, second = run_ranks("fit", *options, prepare=hold_memory)
    assert (first.status, second.status) == (0, 0)
    assert first.out.count("data report") == 1
    assert first.out.count("step 2/2") == 1
    assert first.out.count("model  ") == 2  # what is trained, and where it went
    assert second.out == ""
    with (tmp_path / "metrics.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["step"] for row in written] == ["1", "2"]
    assert float(written[1]["train/peak_memory_mib"]) > 768 + 100  # the largest over the ranks


def test_bad_records_end_every_rank(policy: Path, tmp_path: Path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b", "label": 7}\n')
    options = ["--model.policy", policy, "--data.train", bad, "--output_dir", tmp_path / "output"]
    options += ["--trainer.accelerator", "cpu", "--trainer.devices", 2]
    first, second = run_ranks("fit", *options, time_limit=60)
    assert (first.status, second.status) == (1, 1)
    assert first.err.startswith("error: 1 of 1 record cannot be used")
    assert second.err == f"[rank 1] {first.err}"
    assert "Traceback" not in first.err + second.err


def test_a_hanging_job_fails_its_test(policy: Path, train: Path, tmp_path: Path):
    options = ["--model.policy", policy, "--data.train", train, "--output_dir", tmp_path]
    options += ["--trainer.accelerator", "cpu", "--trainer.devices", 3]
    environment = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}  # the third never comes
    with pytest.raises(AssertionError, match="the job hangs"):
        run_ranks("fit", *options, environment=environment, time_limit=8)


@pytest.mark.slow  # imports twice more
def test_without_a_launcher_lightning_starts_the_ranks(policy: Path, train: Path, tmp_path: Path):
    options = ["--model.policy", policy, "--data.train", train, "--output_dir", tmp_path]
    options += ["--data.batch_size", 4, "--model.learning_rate", 1e-3]
    options += ["--trainer.accelerator", "cpu", "--trainer.devices", 2]
    ended = run_process("fit", *options, timeout=300)
    assert ended.returncode == 0, ended.stderr
    expected = fit_on_ranks(policy, train, tmp_path / "ranks")
    assert rows(tmp_path) == rows(expected)
