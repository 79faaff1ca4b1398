"""DeepSpeed ZeRO on two CPU ranks: the numbers of one, and the same files. No GPU has run it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kto_lightning.module import KTOModule
from kto_lightning.output import list_checkpoints
from kto_lightning.policy import Policy
from kto_lightning.types import Logps, PackedBatch
from tests.agreement import assert_numbers_agree, assert_runs_agree, assert_weights_agree
from tests.cli import fit, fit_arguments, numbers, rows, run_cli, small_model, weights
from tests.factories import plain_records, write_jsonl
from tests.ranks import fit_on_ranks, run_ranks

pytest.importorskip("deepspeed", reason="DeepSpeed is an extra", exc_type=ImportError)

SGD = ("--model.optimizer", "sgd", "--model.learning_rate", 0.1)
SEVERAL = (*SGD, "--data.max_tokens", 60)
ADAMW = ("--model.lr_schedule", "cosine", "--model.weight_decay", 0.1, "--data.max_tokens", 60)
# By itself DeepSpeed leaves weights as small as these whole on every rank.
IN_PARTS = {"stage3_param_persistence_threshold": 0}
STAGE = ("--trainer.strategy.stage",)
STAGE_3 = (
    *("--trainer.strategy", "kto_lightning.zero.ZeRO", *STAGE, 3),
    *("--trainer.strategy.options", json.dumps(IN_PARTS)),
)


def stage(number: int, offload: str = "") -> tuple[Any, ...]:
    return ("--trainer.strategy", f"deepspeed_stage_{number}{offload}")


CASES: dict[str, tuple[str, tuple[Any, ...], tuple[Any, ...]]] = {
    "stage 1, clipped": ("llama", stage(1), (*SEVERAL, "--model.gradient_clip_norm", 0.5)),
    "stage 2, a reference that follows": (
        "llama",
        stage(2),
        (*ADAMW, "--model.follow.every_n_steps", 2, "--data.validation", 0.4),
    ),
    "stage 3, lora on the head, too": (
        "gpt2",
        STAGE_3,
        (
            *(*SEVERAL, "--model.lora.r", 4, "--data.validation", 0.4),
            *("--model.gradient_clip_norm", 0.02),
            *("--model.lora.target_modules", '["c_attn","lm_head"]'),
        ),
    ),
}
MORE: dict[str, tuple[str, tuple[Any, ...], tuple[Any, ...]]] = {
    "stage 1, checkpointing": (
        "qwen2",
        stage(1),
        (*ADAMW, "--model.activation_checkpointing", "true"),
    ),
    "stage 2, one micro-batch, the last with a stand-in": (
        "qwen2",
        stage(2),
        (*SGD, "--data.batch_size", 23),
    ),
    "stage 2, offloaded": ("qwen2", stage(2, "_offload"), ADAMW),
    "stage 2, lora": ("qwen2", stage(2), (*SEVERAL, "--model.lora.r", 4)),
    "stage 2, experts": ("qwen2_moe", stage(2), (*SGD, "--data.max_tokens", 1)),
    "stage 3, one micro-batch, the last with a stand-in": (
        "qwen2",
        STAGE_3,
        (*SGD, "--data.batch_size", 23),
    ),
    "stage 3, offloaded": ("qwen2", stage(3, "_offload"), ADAMW),
    "stage 3, padded": ("gemma2", STAGE_3, SGD),
    "stage 3, experts": ("qwen2_moe", STAGE_3, (*SGD, "--data.max_tokens", 1)),
    "stage 3, clipped, apo_zero": (
        "qwen2",
        STAGE_3,
        (
            *(*SEVERAL, "--model.gradient_clip_norm", 0.5),
            *("--model.loss", "apo_zero_unpaired", "--model.activation_checkpointing", "true"),
        ),
    ),
    "stage 3, checkpointing": (
        "gpt2",
        STAGE_3,
        (*SEVERAL, "--model.activation_checkpointing", "true"),
    ),
}


def on_ranks(
    policy: Path,
    train: Path,
    output: Path,
    strategy: tuple[Any, ...],
    *options: Any,
    **job_options: Any,
) -> Path:
    """`fit_on_ranks` with all there is to say of a strategy."""
    _, name, *settings = strategy
    return fit_on_ranks(policy, train, output, *settings, *options, strategy=name, **job_options)


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)]
)
def test_two_ranks_give_the_numbers_of_one(case: str, train: Path, tmp_path: Path):
    architecture, strategy, options = (CASES | MORE)[case]
    policy = small_model(tmp_path / "policy", architecture)
    options = (*options, "--trainer.max_steps", 4)
    two = on_ranks(policy, train, tmp_path / "two", strategy, *options)
    one = fit(policy, train, tmp_path / "one", *options)
    assert_runs_agree(two, one, held_out="--data.validation" in options)


def tell_what_is_held() -> None:
    """Every rank prints which share of the policy's and the reference's weights it holds."""

    def on_train_start(module: KTOModule) -> None:
        reference: Any = module.reference
        assert module.policy is not None
        for name, held in (("policy", module.policy), ("reference", reference.policy)):
            parts: Any = list(held.parameters())
            own = sum(part.ds_tensor.numel() + part.numel() for part in parts)
            print(f"{name} holds {own / sum(part.ds_numel for part in parts):.2f}", flush=True)

    KTOModule.on_train_start = on_train_start  # pyright: ignore[reportAttributeAccessIssue]


def test_half_precision_stays_near_and_is_held_in_halves(policy: Path, train: Path, tmp_path: Path):
    options = ("--trainer.precision", "bf16-mixed", "--trainer.max_steps", 3)
    one = fit(policy, train, tmp_path / "one", *options)
    two = tmp_path / "two"
    arguments = fit_arguments(policy, train, two, "--trainer.devices", 2, *STAGE_3, *options)
    for rank in run_ranks("fit", *arguments, prepare=tell_what_is_held):
        assert rank.status == 0, rank.err
        assert "policy holds 0.50" in rank.out
        assert "reference holds 0.50" in rank.out
    said = [dict(json.loads((run / "run.json").read_text())["summary"]) for run in (one, two)]
    assert said[0]["model"] == said[1]["model"]  # how many parameters are trained
    for mine, theirs in zip(numbers(two), numbers(one), strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=0.02)
        assert mine["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=0.05)


def test_a_run_goes_on_under_any_strategy(policy: Path, train: Path, tmp_path: Path):
    options = (*ADAMW, "--checkpoint.every_n_steps", 3)
    whole = fit(policy, train, tmp_path / "whole", *options)
    in_parts = on_ranks(policy, train, tmp_path / "in_parts", STAGE_3, *options)
    assert_numbers_agree(in_parts, whole)
    (_, of_parts), (_, last) = list_checkpoints(in_parts)
    on_one = fit(policy, train, tmp_path / "on_one", *options, "--ckpt_path", of_parts)
    assert_weights_agree(on_one, in_parts)
    (_, of_one), _ = list_checkpoints(whole)
    back = (*options, "--ckpt_path", of_one)
    assert_weights_agree(on_ranks(policy, train, tmp_path / "back", stage(2), *back), in_parts)

    assert run_cli("export", last, tmp_path / "exported") == 0
    expected, written = weights(in_parts), rows(in_parts)
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    last.unlink()
    on_ranks(policy, train, in_parts, STAGE_3, *options, "--ckpt_path", "last")
    assert rows(in_parts) == written
    for name, value in weights(in_parts).items():
        assert torch.equal(value, expected[name]), name
        assert torch.equal(value, exported[name]), name


def spoil_a_gradient() -> None:
    """The gradient of the third step is not finite, on the rank that has example 9."""
    forward = Policy.forward

    def spoiled(self: Policy, batch: PackedBatch, **which: bool) -> Logps:
        logps = forward(self, batch, **which)
        if logps.matched is not None and logps.matched.requires_grad and 9 in batch.indices:
            logps.matched.register_hook(lambda gradient: gradient * math.nan)
        return logps

    Policy.forward = spoiled  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "strategy", [STAGE_3, pytest.param(stage(2), marks=pytest.mark.slow)], ids=["3", "2"]
)
def test_a_step_that_is_not_finite_is_skipped(
    strategy: tuple[Any, ...], policy: Path, train: Path, tmp_path: Path, monkeypatch
):
    """In file order, example 9 is in the third batch of four."""
    options = ("--data.shuffle", "false", *ADAMW, "--model.non_finite", "skip")
    two = on_ranks(policy, train, tmp_path / "two", strategy, *options, prepare=spoil_a_gradient)
    monkeypatch.setattr(Policy, "forward", Policy.forward)  # as it is again after the test
    spoil_a_gradient()
    one = fit(policy, train, tmp_path / "one", *options)
    for run in (two, one):
        finite = [math.isfinite(row["train/grad_norm"]) for row in numbers(run)]
        assert finite == [True, True, False, True, True, True]
    assert_weights_agree(two, one)


@pytest.mark.parametrize(
    "strategy", [STAGE_3, pytest.param(stage(2), marks=pytest.mark.slow)], ids=["3", "2"]
)
def test_held_out_records_are_scored_together(
    strategy: tuple[Any, ...], policy: Path, train: Path, tmp_path: Path
):
    data = write_jsonl(tmp_path / "held_out.jsonl", plain_records(9, seed=3))
    output = fit(policy, train, tmp_path / "output", *SGD)
    ((_, checkpoint),) = list_checkpoints(output)
    options = ["--model.policy", policy, "--ckpt_path", checkpoint, "--output_dir", output]
    options += ["--trainer.accelerator", "cpu", "--data.batch_size", 4, "--data.predict", data]
    rewards = []
    for ranks, devices in ((2, ("--trainer.devices", 2, *strategy)), (1, ())):
        ended = run_ranks("predict", *options, *devices, ranks=ranks)
        assert [rank.status for rank in ended] == [0] * ranks, ended[0].err
        lines = (tmp_path / "held_out.jsonl.rewards.jsonl").read_text().splitlines()
        rewards.append([json.loads(line)["reward"] for line in lines])
    assert any(reward != 0 for reward in rewards[0])
    assert rewards[0] == pytest.approx(rewards[1], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--trainer.strategy", "deepspeed"), "Use one of deepspeed_stage_1"),
        (("--trainer.strategy", "deepspeed_stage_3_offload_nvme"), "Use one of deepspeed_stage_1"),
        (("--trainer.strategy", "DeepSpeedStrategy"), "Use one of deepspeed_stage_1"),
        (("--trainer.strategy", "kto_lightning.zero.ZeRO", *STAGE, 4), "must be 1, 2 or 3"),
        (
            (
                *("--trainer.strategy", "kto_lightning.zero.ZeRO", *STAGE, 2),
                *("--trainer.strategy.offload_parameters", "true"),
            ),
            "is for stage 3",
        ),
        ((*stage(1), "--model.optimizer", "adafactor"), "Use adamw"),
        (
            (*stage(2), "--model.lora.r", 4, "--model.quantization", "4bit"),
            "ddp, or leave it out",
        ),
        ((*STAGE_3, "--model.follow.every_n_steps", 2), "deepspeed_stage_2 or fsdp2"),
        ((*stage(3), "--model.offload_reference", "true"), "a whole model"),
        (
            (*stage(3), "--model.lora.r", 4, "--model.dtype", "bfloat16"),
            "deepspeed_stage_2 or fsdp2",
        ),
        ((*stage(3, "_offload"), "--model.activation_offloading", "true"), "by their shapes"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    options: tuple[Any, ...], said: str, policy: Path, train: Path, tmp_path: Path, capsys
):
    fit(policy, train, tmp_path / "output", *options, status=2)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "output").exists()
