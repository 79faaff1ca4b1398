"""Held-out records: their numbers during `fit`, in `validate` and, one by one, in `predict`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kto_lightning.__main__ import main
from kto_lightning.training.evaluation import RewardAUC
from tests.support.factories import make_tokenizer, plain_records, save_model, write_jsonl
from tests.support.tolerances import RELATIVE, SIX_DIGITS, assert_same_numbers, assert_same_rewards

BETA = 0.1


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A model, records to train on, others held out, and what one epoch of training made of it."""
    directory = tmp_path_factory.mktemp("held_out")
    save_model(directory / "model", "qwen2", make_tokenizer())
    write_jsonl(directory / "train.jsonl", plain_records(24))
    write_jsonl(directory / "held_out.jsonl", plain_records(10, seed=9))
    assert (
        main(
            [
                "fit",
                *("--model.policy", str(directory / "model")),
                *("--data.train", str(directory / "train.jsonl")),
                *("--data.validation", str(directory / "held_out.jsonl")),
                *("--model.learning_rate", "1e-2", "--trainer.accelerator", "cpu"),
                *("--trainer.val_check_interval", "2", "--output_dir", str(directory / "output")),
            ]
        )
        == 0
    )
    return directory


def read_jsonl(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def metrics(inputs: Path) -> list[dict[str, str]]:
    header, *rows = (inputs / "output" / "metrics.csv").read_text().splitlines()
    return [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]


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
    """What `predict` writes of each record."""
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
    command = ["predict", "--model.policy", str(inputs / "output" / "model")]
    command += ["--data.predict", str(held_out), "--trainer.accelerator", "cpu"]
    assert main([*command, "--output_dir", str(inputs / "predicted")]) == 0
    lines = read_jsonl(f"{held_out}.rewards.jsonl")
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
    command = ["predict", "--model.policy", str(inputs / "output" / "model")]
    command += ["--data.predict", str(records), "--data.max_length", "32"]
    assert main([*command, "--trainer.accelerator", "cpu", "--output_dir", str(tmp_path)]) == 0
    first, second = read_jsonl(f"{records}.rewards.jsonl")
    assert first["reward"] is None
    assert second["reward"] is not None
    assert (first["label"], second["label"]) == (True, False)


def test_fit_validates_at_its_interval_and_at_the_end(inputs):
    rows = metrics(inputs)
    assert [bool(row["val/loss"]) for row in rows] == [False, True, True]


def test_the_last_validation_is_of_the_exported_model(inputs):
    row = metrics(inputs)[-1]
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


def test_validate_says_what_fit_said(inputs, capsys):
    command = ["validate", "--model.policy", str(inputs / "output" / "model")]
    command += ["--data.validation", str(inputs / "held_out.jsonl"), "--trainer.accelerator", "cpu"]
    assert main([*command, "--output_dir", str(inputs / "validated")]) == 0
    printed = dict(
        line.split()
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("val/") and len(line.split()) == 2
    )
    row = metrics(inputs)[-1]
    names = [f"val/reward/{name}" for name in ("desirable", "undesirable", "margin", "auc")]
    names += ["val/logps/desirable", "val/logps/undesirable"]
    sides = ({name: float(side[name]) for name in names} for side in (printed, row))
    assert_same_numbers(*sides, beta=BETA, relative=RELATIVE + SIX_DIGITS)


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
