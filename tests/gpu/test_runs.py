"""Whole commands on a GPU: precisions, caches, checkpoints, exports, 4 bits, FSDP2 on one device.

In float32 a GPU gives the numbers of a CPU up to rounding, so that runs are compared in it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.cli import (
    LAST,
    fit,
    fit_arguments,
    numbers,
    run_cli,
    run_process,
    small_data,
    small_model,
    weights,
)
from tests.support.comparison import assert_numbers_agree, assert_weights_agree
from tests.support.tolerances import EPS, assert_same_rewards

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning"),
    pytest.mark.slow,  # on the CPU other tests have the same
]

FLOAT32 = ("--trainer.precision", "32-true")
LARGE = ("--model.optimizer", "sgd", "--model.learning_rate", 0.1)
STEPS = ("--trainer.max_steps", 3)
SGD = (*LARGE, *STEPS)
SEVERAL = (*SGD, "--data.max_tokens", 60)
ADAPTER = ("--model.lora.r", 4, "--model.lora.target_modules", '["q_proj","lm_head"]')


def on(device: torch.device) -> tuple[Any, ...]:
    """Options that choose the device, after those of `fit_arguments`."""
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    return "--trainer.accelerator", accelerator, "--trainer.devices", 1


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("qwen2", SGD),
        ("qwen2", (*SEVERAL, *ADAPTER)),
        ("gemma2", SGD),
        ("lfm2", SEVERAL),
        ("mamba", SGD),
    ],
    ids=["qwen2", "lora", "gemma2", "lfm2", "mamba"],
)
def test_float32_gives_the_numbers_of_a_cpu(
    architecture: str, options: tuple[Any, ...], device: torch.device, train: Path, tmp_path: Path
) -> None:
    policy = small_model(tmp_path / "policy", architecture)
    options = (*options, *FLOAT32)
    expected = fit(policy, train, tmp_path / "cpu", *options)
    found = fit(policy, train, tmp_path / "found", *options, *on(device))
    assert_numbers_agree(found, expected)
    assert_weights_agree(found, expected)


MEMORY: dict[str, tuple[Any, ...]] = {
    "checkpointing": ("--model.activation_checkpointing", "true"),
    "offloading": ("--model.activation_offloading", "true"),
    "both": (
        *("--model.activation_checkpointing", "true"),
        *("--model.activation_offloading", "true"),
    ),
    "offloaded reference": ("--model.offload_reference", "true"),
}


@pytest.mark.parametrize("kind", MEMORY)
def test_what_saves_memory_changes_no_number(
    kind: str, device: torch.device, policy: Path, train: Path, tmp_path: Path
) -> None:
    if device.type == "cpu" and kind != "checkpointing":
        pytest.skip("needs a device other than the host")
    shared = (*SEVERAL, *FLOAT32, *on(device))
    plain = fit(policy, train, tmp_path / "plain", *shared)
    assert_numbers_agree(fit(policy, train, tmp_path / "saving", *shared, *MEMORY[kind]), plain)


def test_bfloat16_is_the_default_on_a_gpu_and_float16_is_refused(
    device: torch.device, policy: Path, train: Path, tmp_path: Path, capsys: Any
) -> None:
    output = fit(policy, train, tmp_path / "half", *STEPS, *on(device))
    precision = "bf16-mixed" if device.type == "cuda" else "32-true"
    assert f"precision: {precision}" in (output / "config.yaml").read_text()
    assert all(row["train/loss"] > 0 for row in numbers(output))
    options = ("--trainer.precision", "16-mixed", *on(device))
    fit(policy, train, tmp_path / "refused", *options, status=2)
    assert "16-mixed scales gradients" in capsys.readouterr().err


def test_a_cached_reference_is_the_computed_one(
    device: torch.device, policy: Path, train: Path, tmp_path: Path
) -> None:
    shared = (*SEVERAL, *on(device), "--trainer.precision", "bf16-mixed")
    cache = ("--model.reference_cache", tmp_path / "cache")
    filled = fit(policy, train, tmp_path / "filled", *shared, *cache)
    stored = _bytes_below(tmp_path / "cache")
    read = fit(policy, train, tmp_path / "read", *shared, *cache)
    assert _bytes_below(tmp_path / "cache") == stored > 0
    first, again = numbers(filled)[0], numbers(read)[0]
    assert first["train/logps/desirable"] == again["train/logps/desirable"]
    assert first["train/reward/desirable"] == again["train/reward/desirable"]


def _bytes_below(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("options", [(), ADAPTER], ids=["full", "lora"])
def test_a_stopped_run_resumes_and_its_export_opens(
    options: tuple[Any, ...], device: torch.device, train: Path, tmp_path: Path
) -> None:
    policy = small_model(tmp_path / "policy", "llama")
    shared = (*LARGE, *FLOAT32, *options, *on(device))
    whole = fit(policy, train, tmp_path / "whole", *shared, "--trainer.max_steps", 4)
    output = tmp_path / "output"
    fit(policy, train, output, *shared, "--trainer.max_steps", 2)
    fit(policy, train, output, *shared, "--trainer.max_steps", 4, *LAST)
    assert_numbers_agree(output, whole)
    assert_weights_agree(output, whole)
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    written = weights(output)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in written.items())
    started = load_file(policy / "model.safetensors")
    assert any(not torch.equal(started[name], value) for name, value in written.items())
    if options:
        base = AutoModelForCausalLM.from_pretrained(policy)
        merged = PeftModel.from_pretrained(base, output / "adapter").merge_and_unload()
        for name, value in merged.state_dict().items():
            atol = EPS * float(value.abs().max())  # one rounding of a sum on either side
            torch.testing.assert_close(state[name], value, rtol=0, atol=atol)


def test_rewards_are_those_of_a_cpu(
    device: torch.device, policy: Path, train: Path, tmp_path: Path
) -> None:
    output = fit(policy, train, tmp_path / "output", *SGD, *FLOAT32, *on(device))
    held_out = small_data(tmp_path / "held_out.jsonl", 9, seed=3)
    rewards = []
    for place in (on(torch.device("cpu")), on(device)):
        shared = ["--model.policy", output / "model", "--model.reference", policy, *FLOAT32, *place]
        shared += ["--output_dir", output, "--data.predict", held_out]
        assert run_cli("predict", *shared) == 0
        file = output / "held_out.jsonl.rewards.jsonl"
        rewards.append([json.loads(line) for line in file.read_text().splitlines()])
        file.unlink()
    assert any(line["reward"] != 0 for line in rewards[0])
    assert_same_rewards(*rewards)


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp2_offload"])
def test_fsdp2_on_one_device(
    strategy: str, device: torch.device, policy: Path, train: Path, tmp_path: Path
) -> None:
    """In a process of its own, which ends with its process group."""
    shared = (*SEVERAL, *FLOAT32, *on(device))
    expected = fit(policy, train, tmp_path / "one", *shared)
    options = (*shared, "--trainer.strategy", strategy)
    ended = run_process("fit", *fit_arguments(policy, train, tmp_path / "sharded", *options))
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert_numbers_agree(tmp_path / "sharded", expected)
    assert_weights_agree(tmp_path / "sharded", expected)


@pytest.mark.gpu
def test_four_bits(train: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = small_model(tmp_path / "base", "llama")
    options = (*ADAPTER, "--model.quantization", "4bit", *STEPS, *on(torch.device("cuda")))
    output = fit(base, train, tmp_path / "output", *options)
    margins = [row["train/reward/margin"] for row in numbers(output)]
    assert margins[-1] != margins[0]
    checkpoint = torch.load(output / "checkpoints/step=3.ckpt", weights_only=False)
    assert all("lora_" in name for name in checkpoint["state_dict"])
    before, after = load_file(base / "model.safetensors"), weights(output)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved
    assert all("q_proj" in name or "lm_head" in name for name in moved)


@pytest.mark.gpu
def test_an_optimizer_in_eight_bits(policy: Path, train: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    options = ("--model.optimizer", "adamw_8bit", *STEPS, *on(torch.device("cuda")))
    output = fit(policy, train, tmp_path / "output", *options)
    assert numbers(output)[-1]["train/reward/margin"] != 0.0
