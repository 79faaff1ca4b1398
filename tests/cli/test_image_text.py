"""`fit` and `export` with image-text models, through the command line."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.support.cli import (
    EVERY_STEP,
    checkpoint_tensors,
    fit,
    run_cli,
    small_data,
    weights,
)
from tests.support.factories import write_jsonl
from tests.support.image_text import PROCESSOR_FILES, save_image_text

STEPS = ("--trainer.max_steps", 2)


def test_fit_trains_the_language_model_and_exports_the_whole(tmp_path, capsys):
    policy = save_image_text(tmp_path / "policy", "mistral3")
    train = small_data(tmp_path / "train.jsonl")
    output = fit(policy, train, tmp_path / "out", *STEPS, *EVERY_STEP)
    summary = " ".join(capsys.readouterr().out.split())
    model = transformers.Mistral3ForConditionalGeneration.from_pretrained(policy)
    beside = sum(
        p.numel() for n, p in model.named_parameters() if "vision_tower" in n or "projector" in n
    )
    total = model.num_parameters()
    assert f"{total - beside:,} of {total:,} parameters trained; frozen, as no text" in summary
    assert "reaches it: vision_tower, multi_modal_projector" in summary
    assert "packed, prompts shared" in summary
    before, after = load_file(policy / "model.safetensors"), weights(output)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) is not name.startswith("language_model")
    assert all(
        ".language_model." in name or "lm_head" in name or name[0].isdigit()
        for name in checkpoint_tensors(output)[2]
    )
    assert all((output / "model" / name).is_file() for name in PROCESSOR_FILES)

    first = output / "checkpoints" / "step=1.ckpt"
    again = fit(policy, train, tmp_path / "again", *STEPS, "--ckpt_path", first)
    resumed = weights(again)
    assert all(torch.equal(value, resumed[name]) for name, value in after.items())

    (checkpoint,) = (output / "checkpoints").glob("step=2.ckpt")
    assert run_cli("export", checkpoint, tmp_path / "exported") == 0
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert exported.keys() == after.keys()
    assert all(torch.equal(value, exported[name]) for name, value in after.items())


def test_no_weight_of_a_class_that_has_a_text_class_too_is_lost(tmp_path, capsys):
    policy = save_image_text(tmp_path / "policy", "qwen3_5")
    train = small_data(tmp_path / "train.jsonl", 8)
    output = fit(policy, train, tmp_path / "out", "--model.lora.r", 2, "--trainer.max_steps", 1)
    assert "frozen, as no text reaches it: visual" in " ".join(capsys.readouterr().out.split())
    before, after = load_file(policy / "model.safetensors"), weights(output)
    assert before.keys() == after.keys()
    assert sum("visual" in name for name in after) > 10
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    assert all(".language_model." in name for name in adapter)
    config = json.loads((output / "model" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5ForConditionalGeneration"]


def test_records_with_images_are_refused(tmp_path, capsys):
    policy = save_image_text(tmp_path / "policy", "llava")
    record = {"prompt": "a", "completion": " b", "label": True, "images": ["a.png"]}
    train = write_jsonl(tmp_path / "train.jsonl", [record])
    fit(policy, train, tmp_path / "out", status=1)
    assert "image" in capsys.readouterr().err


@pytest.mark.parametrize("lora", [(), ("--model.lora.r", 2)], ids=["full", "lora"])
def test_a_model_whose_text_is_not_causal_is_refused(tmp_path, capsys, lora):
    policy = save_image_text(tmp_path / "policy", "paligemma")
    fit(policy, small_data(tmp_path / "train.jsonl"), tmp_path / "out", *lora, status=1)
    assert "PaliGemmaForConditionalGeneration is not causal" in capsys.readouterr().err
