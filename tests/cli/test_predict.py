"""Rewards of adapters, merged models and checkpoints; recorded references; model cards."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kto_lightning.module import KTOModule
from tests.support.cli import fit, numbers, rows, run_cli, small_data
from tests.support.factories import chat_records, make_tokenizer, save_model, write_jsonl
from tests.support.plain_forwards import Float64, float64_copy
from tests.support.tolerances import assert_errs_like_plain, assert_same_rewards

LORA = ("--model.lora.r", 4, "--model.learning_rate", 1e-2)


@pytest.fixture(scope="module")
def lora_run(policy: Path, train: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(policy, train, tmp_path_factory.mktemp("lora"), *LORA)


def predict(policy: Path, data: Path, *options: Any) -> list[dict[str, Any]]:
    command = ("predict", "--model.policy", policy, "--data.predict", data)
    assert run_cli(*command, "--trainer.accelerator", "cpu", *options) == 0
    return [json.loads(line) for line in Path(f"{data}.rewards.jsonl").read_text().splitlines()]


def rewards(lines: list[dict[str, Any]]) -> list[float]:
    return [line["reward"] for line in lines]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 40)[None]).logits


def assert_same_logits(merged: Any, adapter: Any) -> None:
    with Float64():
        truth = logits(float64_copy(adapter))
    assert_errs_like_plain(logits(merged), logits(adapter), truth)


def test_an_adapter_and_the_merged_model_are_the_same(lora_run: Path, policy: Path, train: Path):
    adapter = AutoPeftModelForCausalLM.from_pretrained(lora_run / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(lora_run / "model")
    assert_same_logits(merged, adapter)
    base = AutoModelForCausalLM.from_pretrained(policy)
    assert (logits(merged) - logits(base)).abs().max() > 0.1
    of_adapter = predict(lora_run / "adapter", train)
    assert_same_rewards(of_adapter, predict(lora_run / "model", train))
    assert max(map(abs, rewards(of_adapter))) > 0.1


def test_an_adapter_opens_from_elsewhere(
    policy: Path, train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(policy.parent)
    output = fit(Path(policy.name), train, tmp_path, *LORA, "--trainer.max_steps", 1)
    monkeypatch.chdir(os.sep)
    AutoPeftModelForCausalLM.from_pretrained(output / "adapter")
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(policy)
    assert len(predict(output / "model", train)) == 24


def test_a_bfloat16_base_is_merged_without_rounding_the_update(
    policy: Path, train: Path, tmp_path: Path
):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(policy).save_pretrained(base)
    output = fit(base, train, tmp_path / "run", *LORA, "--model.dtype", "bfloat16")
    trained = load_file(output / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in trained.values()} == {torch.float32}
    adapter = AutoPeftModelForCausalLM.from_pretrained(output / "adapter", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(output / "model")
    assert merged.dtype == torch.float32
    assert_same_logits(merged, adapter)


def test_training_on_an_adapter_takes_its_initial_state_as_the_reference(
    lora_run: Path, policy: Path, train: Path, tmp_path: Path
):
    start = lora_run / "adapter"
    given = {path.name: path.read_bytes() for path in start.iterdir()}
    output = fit(start, train, tmp_path / "run", "--model.learning_rate", 1e-2)
    first = numbers(output)[0]
    assert first["train/reward/margin"] == first["train/z0_raw"] == 0.0
    assert numbers(output)[-1]["train/z0_raw"] != 0.0
    assert {path.name: path.read_bytes() for path in start.iterdir()} == given
    of_adapter = predict(output / "adapter", train)
    assert_same_rewards(predict(output / "model", train), of_adapter)
    against_given = predict(output / "adapter", train, "--model.reference", start)
    assert_same_rewards(of_adapter, against_given)
    against_base = rewards(predict(output / "adapter", train, "--model.reference", policy))
    assert rewards(of_adapter) != pytest.approx(against_base, abs=1e-2)
    names = load_file(output / "adapter" / "adapter_model.safetensors")
    assert not any("reference" in name for name in names)
    exported = tmp_path / "exported"
    assert run_cli("export", output / "checkpoints" / "step=6.ckpt", exported) == 0
    again = load_file(exported / "adapter_model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in names.items())


def test_a_checkpoint_is_rewarded_like_its_model(lora_run: Path, policy: Path, train: Path):
    checkpoint = ("--ckpt_path", lora_run / "checkpoints" / "step=6.ckpt")
    of_checkpoint = predict(policy, train, *LORA, *checkpoint)
    assert_same_rewards(of_checkpoint, predict(lora_run / "adapter", train))


@pytest.mark.parametrize("command", ["predict", "validate"])
def test_a_policy_that_is_its_own_reference_is_warned_of(
    command: str,
    policy: Path,
    lora_run: Path,
    train: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    data = "--data.predict" if command == "predict" else "--data.validation"
    common = (data, train, "--output_dir", tmp_path, "--trainer.accelerator", "cpu")
    assert run_cli(command, "--model.policy", policy, *common) == 0
    warning = capsys.readouterr().err
    assert warning.startswith("warning: every reward is 0")
    assert "--model.reference" in warning
    assert run_cli(command, "--model.policy", lora_run / "model", *common) == 0
    assert "every reward is 0" not in capsys.readouterr().err


def test_rewards_do_not_depend_on_how_records_are_batched(lora_run: Path, train: Path):
    whole = predict(lora_run / "model", train, "--data.batch_size", 24)
    single = predict(lora_run / "model", train, "--data.batch_size", 1)
    cut = predict(lora_run / "model", train, "--data.max_tokens", 1, "--data.batch_size", 7)
    assert_same_rewards(single, whole)
    assert_same_rewards(cut, whole)
    assert [line["line"] for line in whole] == list(range(1, 25))


def test_rewards_are_written_beside_each_file(lora_run: Path, tmp_path: Path):
    small_data(tmp_path / "a.jsonl", 3)
    small_data(tmp_path / "b.jsonl", 5, seed=1)
    command = ("predict", "--model.policy", lora_run / "model", "--trainer.accelerator", "cpu")
    assert run_cli(*command, "--data.predict", tmp_path / "?.jsonl") == 0
    counts = [
        len((tmp_path / f"{name}.jsonl.rewards.jsonl").read_text().splitlines()) for name in "ab"
    ]
    assert counts == [3, 5]


def test_rewards_are_written_to_a_directory_that_is_given(lora_run: Path, tmp_path: Path):
    data = small_data(tmp_path / "a.jsonl", 3)
    command = ("predict", "--model.policy", lora_run / "model", "--trainer.accelerator", "cpu")
    output = tmp_path / "new" / "folder"
    assert run_cli(*command, "--data.predict", data, "--output_dir", output) == 0
    assert len((output / "a.jsonl.rewards.jsonl").read_text().splitlines()) == 3
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ((), ["{0}/a/x.jsonl.rewards.jsonl cannot be written: Is a directory.", "--output_dir"]),
        (("--output_dir", "{0}/b/x.jsonl"), ["b/x.jsonl/x.jsonl.rewards.jsonl cannot be written"]),
        (("--output_dir", "{0}/c"), ["the rewards of {0}/a/x.jsonl and of {0}/b/x.jsonl would"]),
    ],
)
def test_predict_checks_that_it_can_write_before_it_computes(
    options: tuple[str, ...],
    parts: list[str],
    lora_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(KTOModule, "configure_model", lambda _: pytest.fail("a model is loaded"))
    for name in "ab":
        (tmp_path / name).mkdir()
        small_data(tmp_path / name / "x.jsonl", 3)
    (tmp_path / "a" / "x.jsonl.rewards.jsonl").mkdir()
    files = tmp_path / ("?" if options[-1:] == ("{0}/c",) else "a") / "x.jsonl"
    command = ("predict", "--model.policy", lora_run / "model", "--data.predict", files)
    placed = [option.format(tmp_path) for option in options]
    assert run_cli(*command, "--trainer.accelerator", "cpu", *placed) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    for part in parts:
        assert part.format(tmp_path) in error


def test_a_single_prompt_is_rewarded_too(lora_run: Path, tmp_path: Path):
    records = [
        {"prompt": "same", "completion": text, "label": True} for text in ("one", "two", "three")
    ]
    data = write_jsonl(tmp_path / "single.jsonl", records)
    assert len(rewards(predict(lora_run / "model", data))) == 3


def test_model_cards_state_policy_data_and_settings(lora_run: Path, policy: Path, train: Path):
    for name in ("model", "adapter"):
        card = (lora_run / name / "README.md").read_text()
        for part in (
            f"`{policy}`",
            str(train),
            "| desirable | 16, each weighted 1.0 |",
            "| undesirable | 8, each weighted 2.0 |",
            "| beta | 0.1 |",
            "After 6 optimizer steps",
            f"| train/loss | {float(rows(lora_run)[-1]['train/loss']):.6g} |",
            "AutoPeftModelForCausalLM" if name == "adapter" else "AutoModelForCausalLM",
        ):
            assert part in card


def test_export_keeps_the_chat_template_that_fit_was_given(tmp_path: Path):
    tokenizer = make_tokenizer(chat_template="qwen2_5")
    template = tmp_path / "template.jinja"
    template.write_text(tokenizer.chat_template, encoding="utf-8")
    policy = save_model(tmp_path / "policy", "qwen2", tokenizer)
    (policy / "chat_template.jinja").write_text("{{ 'another' }}", encoding="utf-8")
    data = write_jsonl(tmp_path / "chat.jsonl", chat_records(8))
    output = fit(policy, data, tmp_path / "run", "--data.chat_template", template)
    assert run_cli("export", output / "checkpoints" / "step=2.ckpt", tmp_path / "exported") == 0
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported.chat_template == template.read_text()


def test_export_refuses_wrong_arguments(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = fit(policy, train, tmp_path / "run", "--trainer.max_steps", 1)
    checkpoint = output / "checkpoints" / "step=1.ckpt"
    capsys.readouterr()
    for arguments, status, part in (
        ((checkpoint, output), 2, "exists already"),
        ((checkpoint, tmp_path / "new", "--merge"), 2, "without an adapter. Omit --merge"),
        ((checkpoint, tmp_path / "new", "--merg"), 2, "--merg"),
        ((checkpoint,), 2, "DIR"),
        ((policy, tmp_path / "new"), 1, "is a directory without a checkpoint"),
        ((train, tmp_path / "new"), 1, "is not a readable checkpoint"),
    ):
        assert run_cli("export", *arguments) == status
        error = capsys.readouterr().err
        assert part in error
        assert "Traceback" not in error
        assert not (tmp_path / "new").exists()


def test_records_without_a_label_get_a_reward(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    records = [json.loads(line) for line in train.read_text().splitlines()]
    labelled = predict(policy, write_jsonl(tmp_path / "all.jsonl", records))
    labels = [record.pop("label") for record in records]
    records[0]["label"] = labels[0]
    some = predict(policy, write_jsonl(tmp_path / "one.jsonl", records))
    assert [line["label"] for line in some] == [labels[0]] + [None] * (len(records) - 1)
    assert "records have no label that can be read" in capsys.readouterr().err
    del records[0]["label"]
    none = predict(policy, write_jsonl(tmp_path / "none.jsonl", records))
    assert rewards(none) == rewards(some) == rewards(labelled)
    assert "label" not in capsys.readouterr().err
