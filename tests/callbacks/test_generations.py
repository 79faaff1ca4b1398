"""Answers before and after training: their prompts, an unchanged run, refused settings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from transformers import AutoModelForCausalLM, AutoTokenizer

from kto_lightning.callbacks.generations import check_whole_model, choose_prompts
from kto_lightning.errors import ConfigError
from tests.support import cli
from tests.support.pages import read_page

ASKED = ("--generate", 3, "--report.max_new_tokens", 6)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("generations")
    cli.small_model(directory / "policy")
    cli.small_data(directory / "train.jsonl", 16)
    cli.small_data(directory / "held_out.jsonl", 8, seed=9)
    return directory


def fit(inputs: Path, output: Path, *options: Any) -> Path:
    return cli.fit(inputs / "policy", inputs / "train.jsonl", output, *options)


def answers(output: Path) -> dict[str, Any]:
    return json.loads((output / "generations.json").read_text(encoding="utf-8"))


def greedy(directory: Path, prompt: str) -> str:
    """A saved model's greedy answer, decoded token by token."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(6):
            following = model(ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
            if following.item() == tokenizer.eos_token_id:
                break
    start = len(tokenizer(prompt)["input_ids"])
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_held_out_prompts_before_and_after(inputs: Path, tmp_path: Path) -> None:
    options = ("--data.validation", inputs / "held_out.jsonl", "--trainer.max_epochs", 2)
    output = fit(inputs, tmp_path / "output", *options, *ASKED)
    found = answers(output)
    assert (found["source"], found["max_new_tokens"]) == ("validation", 6)
    assert len(found["samples"]) == 3
    prompts = [
        json.loads(line)["prompt"] for line in (inputs / "held_out.jsonl").read_text().splitlines()
    ]
    for sample in found["samples"]:
        assert sample["prompt"] in prompts
        assert sample["before"] == greedy(inputs / "policy", sample["prompt"])
        assert sample["after"] == greedy(output / "model", sample["prompt"])
    page = read_page((output / "report.html").read_text(encoding="utf-8"))
    assert "For held-out prompts" in page.text
    for sample in found["samples"]:
        for text in (sample["prompt"], sample["after"]):
            assert " ".join(text.split()) in page.text


@pytest.mark.parametrize("options", [(), ("--model.lora.r", 4, "--model.dropout", "true")])
def test_generating_does_not_change_the_run(
    inputs: Path, tmp_path: Path, options: tuple[Any, ...]
) -> None:
    with_it = fit(inputs, tmp_path / "with", *options, *ASKED)
    without = fit(inputs, tmp_path / "without", *options)
    assert cli.rows(with_it) == cli.rows(without)
    ours, plain = cli.weights(with_it), cli.weights(without)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    assert not (without / "generations.json").exists()
    assert answers(with_it)["source"] == "train"


def test_a_resumed_run_keeps_the_answers_of_before(inputs: Path, tmp_path: Path) -> None:
    output = fit(inputs, tmp_path / "output", "--trainer.max_steps", 2, *ASKED)
    first = answers(output)["samples"]
    fit(inputs, output, "--trainer.max_steps", 4, "--ckpt_path", "last", *ASKED)
    second = answers(output)["samples"]
    assert [s["before"] for s in second] == [s["before"] for s in first]
    late = fit(inputs, tmp_path / "late", "--trainer.max_steps", 2)
    fit(inputs, late, "--trainer.max_steps", 4, "--ckpt_path", "last", *ASKED)
    assert [s["before"] for s in answers(late)["samples"]] == [None] * 3
    assert [s["after"] for s in answers(late)["samples"]] == [s["after"] for s in second]
    assert "(not recorded)" in (late / "report.html").read_text(encoding="utf-8")


def test_prompts_are_spread_and_differ() -> None:
    keys, lengths = np.array([5, 5, 1, 2, 2, 9, 7]), np.array([3, 3, 3, 0, 0, 3, 3])
    assert choose_prompts(keys, lengths, 2).tolist() == [0, 6]
    assert choose_prompts(keys, lengths, 1).tolist() == [0]
    assert choose_prompts(keys, lengths, 99).tolist() == [0, 2, 5, 6]


def test_numbers_out_of_range_exit_2(inputs: Path, tmp_path: Path, capsys) -> None:
    for key, value in (("generate", -1), ("max_new_tokens", 0)):
        assert (
            cli.run_cli(
                *(
                    "fit",
                    "--model.policy",
                    inputs / "policy",
                    "--data.train",
                    inputs / "train.jsonl",
                ),
                *("--output_dir", tmp_path, f"--report.{key}", value),
            )
            == 2
        )
        assert f"--report.{key} must be at least" in capsys.readouterr().err


def test_a_sharded_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--report\.generate needs the whole model"):
        check_whole_model(ModelParallelStrategy())
    check_whole_model(DDPStrategy())
