"""`export` writes the weights that `fit` wrote at the same step."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.cli import fit, rows, run_cli, small_data, small_model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("export")
    small_model(directory / "model")
    small_data(directory / "train.jsonl")
    return directory


def last_checkpoint(output: Path) -> Path:
    (checkpoint,) = (output / "checkpoints").glob("step=6.ckpt")
    return checkpoint


def same_weights(first: Path, second: Path) -> bool:
    one, two = load_file(first), load_file(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_full_checkpoint_is_the_model(inputs, tmp_path):
    output = fit(inputs / "model", inputs / "train.jsonl", tmp_path / "output")
    assert run_cli("export", last_checkpoint(output), tmp_path / "exported") == 0
    name = "model.safetensors"
    assert same_weights(tmp_path / "exported" / name, output / "model" / name)
    assert not same_weights(tmp_path / "exported" / name, inputs / "model" / name)
    origin = json.loads((tmp_path / "exported" / "kto_lightning.json").read_text())
    assert origin["reference"] == str(inputs / "model")
    assert "## Settings" in (tmp_path / "exported" / "README.md").read_text()


def test_a_lora_checkpoint_is_the_adapter_or_the_merged_model(inputs, tmp_path):
    lora = ("--model.lora.r", 2)
    output = fit(inputs / "model", inputs / "train.jsonl", tmp_path / "output", *lora)
    assert run_cli("export", last_checkpoint(output), tmp_path / "adapter") == 0
    adapter = "adapter_model.safetensors"
    assert same_weights(tmp_path / "adapter" / adapter, output / "adapter" / adapter)
    assert run_cli("export", last_checkpoint(output), tmp_path / "merged", "--merge") == 0
    model = "model.safetensors"
    assert same_weights(tmp_path / "merged" / model, output / "model" / model)


SETTINGS = """
model:
  lora:
    r: 2
    use_dora: true
    use_rslora: true
    modules_to_save: [lm_head]
    rank_pattern: {q_proj: 4}
    exclude_modules: [k_proj]
"""


def test_settings_of_peft_are_resumed_and_exported(inputs, tmp_path, capsys):
    (tmp_path / "lora.yaml").write_text(SETTINGS)
    config = ("--config", tmp_path / "lora.yaml", "--checkpoint.every_n_steps", 3)
    policy, train = inputs / "model", inputs / "train.jsonl"
    whole = fit(policy, train, tmp_path / "whole", *config)
    first = rows(whole)[0]
    assert float(first["train/reward/margin"]) == 0  # the base is the reference
    fit(policy, train, tmp_path / "cut", *config, "--trainer.max_steps", 3)
    resumed = ("--ckpt_path", "last", "--trainer.max_steps", 6)
    other = ("--model.lora.use_rslora", "false")
    fit(policy, train, tmp_path / "cut", *config, *resumed, *other, status=2)
    assert "--model.lora.use_rslora is false (was true)" in capsys.readouterr().err
    cut = fit(policy, train, tmp_path / "cut", *config, *resumed)
    model, adapter = "model.safetensors", "adapter_model.safetensors"
    assert same_weights(cut / "model" / model, whole / "model" / model)
    assert same_weights(cut / "adapter" / adapter, whole / "adapter" / adapter)
    assert run_cli("export", last_checkpoint(cut), tmp_path / "merged", "--merge") == 0
    assert same_weights(tmp_path / "merged" / model, whole / "model" / model)
    assert run_cli("export", last_checkpoint(cut), tmp_path / "adapter") == 0
    assert same_weights(tmp_path / "adapter" / adapter, whole / "adapter" / adapter)


def test_an_adapter_that_cannot_be_merged_exactly_is_exported_alone(inputs, tmp_path, capsys):
    policy = small_model(tmp_path / "policy", "zamba2")
    lora = ("--model.lora.r", 2, "--trainer.max_steps", 6)
    output = fit(policy, inputs / "train.jsonl", tmp_path / "output", *lora)
    printed = capsys.readouterr().out
    assert f"adapter   {output / 'adapter'}" in printed
    assert "no merged model: model.layers.1.shared_transformer" in printed
    assert not (output / "model").exists()
    assert run_cli("export", last_checkpoint(output), tmp_path / "merged", "--merge") == 2
    assert "--merge: no merged model would equal the adapter: " in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert run_cli("export", last_checkpoint(output), tmp_path / "adapter") == 0
    adapter = "adapter_model.safetensors"
    assert same_weights(tmp_path / "adapter" / adapter, output / "adapter" / adapter)


def test_an_unreadable_checkpoint_is_refused(inputs, tmp_path, capsys):
    assert run_cli("export", tmp_path / "none.ckpt", tmp_path / "exported") == 1
    assert "none.ckpt" in capsys.readouterr().err
    (tmp_path / "damaged.ckpt").write_bytes(b"PK not a checkpoint")
    assert run_cli("export", tmp_path / "damaged.ckpt", tmp_path / "exported") == 1
    error = capsys.readouterr().err
    assert "damaged.ckpt" in error
    assert "Traceback" not in error
    (tmp_path / "other.bin").write_bytes(b"a.")  # a pickle that pops from an empty stack
    assert run_cli("export", tmp_path / "other.bin", tmp_path / "exported") == 1
    assert "other.bin is not a readable checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()
    assert run_cli("export") == 2


def test_an_unwritable_directory_is_refused(inputs, tmp_path, capsys):
    output = fit(inputs / "model", inputs / "train.jsonl", tmp_path / "output")
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    capsys.readouterr()
    assert run_cli("export", last_checkpoint(output), tmp_path / "file" / "exported") == 1
    assert f"{tmp_path / 'file'}" in capsys.readouterr().err


def test_a_checkpoint_whose_policy_is_gone_is_named(tmp_path, capsys):
    policy = small_model(tmp_path / "gone")
    output = fit(policy, small_data(tmp_path / "train.jsonl"), tmp_path / "output")
    shutil.rmtree(policy)
    capsys.readouterr()
    assert run_cli("export", last_checkpoint(output), tmp_path / "exported") == 1
    error = capsys.readouterr().err
    assert str(last_checkpoint(output)) in error
    assert str(policy) in error
