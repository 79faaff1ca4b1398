"""FSDP2: two ranks with a sharded model give the numbers of one, and write the same files."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.distributed import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import OffloadPolicy
from torch.distributed.tensor import DTensor

from kto_lightning.models import safetensors_files
from kto_lightning.models.policy import Policy
from kto_lightning.models.units import decoder_layers
from kto_lightning.module import KTOModule
from kto_lightning.sharded_checkpoint import is_whole_directory
from kto_lightning.strategies.fsdp2 import HALF, shard_policy
from kto_lightning.training.checkpoints import list_checkpoints
from tests.support.cli import fit, fit_arguments, numbers, rows, small_model, weights
from tests.support.comparison import assert_numbers_agree, assert_runs_agree, assert_weights_agree
from tests.support.factories import make_model, plain_records, write_jsonl
from tests.support.families import GRANITE_EXPERTS
from tests.support.image_text import make_image_text
from tests.support.ranks import fit_on_ranks, run_ranks
from tests.support.steps import step_batch
from tests.support.tolerances import assert_same_rewards

SGD = ("--model.optimizer", "sgd", "--model.learning_rate", 0.1)
SEVERAL = (*SGD, "--data.max_tokens", 60)
ADAMW = ("--model.lr_schedule", "cosine", "--model.weight_decay", 0.1)
CASES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "one micro-batch, the last with a filler": ("qwen2", (*SGD, "--data.batch_size", 23)),
    "clipped": ("llama", (*SEVERAL, "--model.gradient_clip_norm", 0.5)),
    "checkpointing, apo_zero": (
        "gpt2",
        (
            *(*SEVERAL, "--model.activation_checkpointing", "true"),
            *("--model.loss", "apo_zero_unpaired"),
        ),
    ),
    "cached, checkpointing": ("lfm2", (*SEVERAL, "--model.activation_checkpointing", "true")),
    "a reference that follows": (
        "qwen2",
        (*SGD, "--model.follow.every_n_steps", 2, "--data.validation", 0.4),
    ),
    "padded": ("mamba", SGD),
    "experts": ("granitemoehybrid", (*SGD, "--data.max_tokens", 1)),
    "layers that share weights": ("zamba2", (*SGD, "--trainer.max_steps", 1)),
    "lora on the head, too": (
        "llama",
        (*SEVERAL, "--model.lora.r", 4, "--model.lora.target_modules", '["q_proj","lm_head"]'),
    ),
    "lora": (
        "qwen2",
        (
            *(*SEVERAL, "--data.validation", 0.4, "--model.lora.r", 4),
            *("--model.lora.use_dora", "true", "--model.lora.modules_to_save", '["norm"]'),
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_numbers_of_one(case: str, train: Path, tmp_path: Path):
    architecture, options = CASES[case]
    overrides = GRANITE_EXPERTS if architecture == "granitemoehybrid" else {}
    policy = small_model(tmp_path / "policy", architecture, **overrides)
    options = ("--trainer.max_steps", 4, *options)
    two = fit_on_ranks(policy, train, tmp_path / "two", *options, strategy="fsdp2")
    one = fit(policy, train, tmp_path / "one", *options)
    assert_runs_agree(two, one, held_out="--data.validation" in options)


def test_the_layers_of_an_image_text_model_are_those_of_its_language_model():
    policy = Policy(make_image_text("mistral3", vocab_size=97, num_hidden_layers=1))
    model: Any = policy.causal_lm
    assert len(model.model.vision_tower.transformer.layers) == 1
    assert decoder_layers(policy) == list(model.model.language_model.layers)


def test_the_layers_of_a_config_that_counts_otherwise_are_found() -> None:
    policy = Policy(make_model("hrm_text", vocab_size=97), route="padded")
    assert len(decoder_layers(policy)) == 2  # one of each stack


def test_mixed_precision_does_not_round_what_layers_pass_on_in_float32() -> None:
    policy = Policy(make_model("mamba", vocab_size=97, residual_in_fp32=True), route="padded")
    dtypes = []
    layers = decoder_layers(policy)
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        shard_policy(policy, init_device_mesh("cpu", (1,)), HALF, OffloadPolicy())
        for layer in layers:
            layer.register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))
        with torch.no_grad():
            policy(step_batch(packed=False).micro_batches[0], mismatched=False)
    finally:
        torch.distributed.destroy_process_group()
    assert set(dtypes[0::2]) == {torch.bfloat16}
    assert set(dtypes[1::2]) == {torch.float32}


def test_offloaded_shards_give_the_numbers_of_one_rank(train: Path, tmp_path: Path):
    policy = small_model(tmp_path / "policy", "lfm2")
    reference = small_model(tmp_path / "reference", "lfm2", seed=1)
    options = (*SEVERAL, "--model.gradient_clip_norm", 0.5, "--trainer.max_steps", 4)
    options += ("--model.reference", reference)
    two = fit_on_ranks(policy, train, tmp_path / "two", *options, strategy="fsdp2_offload")
    assert_runs_agree(two, fit(policy, train, tmp_path / "one", *options))


def print_weight_shares() -> None:
    """For `prepare` of a job: every rank prints its share of both models' weights after a step."""

    def on_train_end(module: KTOModule) -> None:
        reference: Any = module.reference
        assert module.policy is not None
        for name, held in (("policy", module.policy), ("reference", reference.policy)):
            parts = list(held.parameters())
            assert all(isinstance(part, DTensor) for part in parts)
            own = sum(part.to_local().numel() for part in parts)
            print(f"{name} holds {own / sum(part.numel() for part in parts):.2f}", flush=True)

    KTOModule.on_train_end = on_train_end  # pyright: ignore[reportAttributeAccessIssue]


def test_each_rank_holds_half_of_policy_and_reference(policy: Path, train: Path, tmp_path: Path):
    options = ["--model.policy", policy, "--data.train", train, "--output_dir", tmp_path]
    options += ["--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.max_steps", 1]
    options += ["--trainer.strategy", "fsdp2", "--trainer.precision", "bf16-mixed"]
    for rank in run_ranks("fit", *options, prepare=print_weight_shares):
        assert rank.status == 0, rank.err
        assert "policy holds 0.50" in rank.out
        assert "reference holds 0.50" in rank.out


def test_a_run_resumes_under_any_strategy(policy: Path, train: Path, tmp_path: Path):
    """A directory of two ranks on two, three and one; a file of one rank on two."""
    options = (*ADAMW, "--checkpoint.every_n_steps", 2, "--model.follow.every_n_steps", 2)
    whole = fit(policy, train, tmp_path / "whole", *options)
    sharded = tmp_path / "sharded"
    fit_on_ranks(policy, train, sharded, *options, strategy="fsdp2")
    assert_numbers_agree(sharded, whole)
    (_, of_sharded), (_, last) = list_checkpoints(sharded)
    assert of_sharded.is_dir()
    assert is_whole_directory(last)
    resume = (*options, "--ckpt_path", of_sharded)
    on_one = fit(policy, train, tmp_path / "on_one", *resume)
    assert_weights_agree(on_one, sharded)
    fit_on_ranks(policy, train, tmp_path / "on_three", *resume, strategy="fsdp2", ranks=3)
    assert_weights_agree(tmp_path / "on_three", sharded)
    (_, of_one), _ = list_checkpoints(whole)
    back = (*options, "--ckpt_path", of_one)
    fit_on_ranks(policy, train, tmp_path / "back", *back, strategy="fsdp2")
    assert_weights_agree(tmp_path / "back", sharded)

    expected, written = weights(sharded), rows(sharded)
    shutil.rmtree(last)
    fit_on_ranks(policy, train, sharded, *options, "--ckpt_path", "last", strategy="fsdp2")
    assert rows(sharded) == written
    for name, value in weights(sharded).items():
        assert torch.equal(value, expected[name]), name


def fill_the_disk_of_rank_0() -> None:
    """For `prepare` of a job: writing the second file of the model fails."""

    def save_file(tensors: Any, path: Path, **options: Any) -> None:
        if "00002" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        safetensors.torch.save_file(tensors, path, **options)

    safetensors_files.MAX_FILE_SIZE = 40_000
    safetensors_files.save_file = save_file  # pyright: ignore[reportAttributeAccessIssue]


def test_an_export_that_fails_on_rank_0_ends_all_ranks(policy: Path, train: Path, tmp_path: Path):
    devices = ("--trainer.devices", 2, "--trainer.strategy", "fsdp2", "--trainer.max_steps", 1)
    arguments = fit_arguments(policy, train, tmp_path, *SGD, *devices)
    first, second = run_ranks("fit", *arguments, prepare=fill_the_disk_of_rank_0)
    assert (first.status, second.status) == (1, 1)
    assert f"{tmp_path / 'model'} cannot be written: " in first.err
    assert "No space left on device" in first.err
    assert "rank 0 has ended with an error" in second.err
    assert not (tmp_path / "model").exists()
    assert not list(tmp_path.rglob(".model.part"))


def test_the_cache_is_filled_together(policy: Path, train: Path, tmp_path: Path):
    """The cache first holds one rank's log-probs alone, so that the ranks miss different ones."""
    options = (*SEVERAL, "--trainer.max_steps", 4)
    one = fit(policy, train, tmp_path / "one", *options)
    cached = (*options, "--model.reference_cache", tmp_path / "cache")
    fit_on_ranks(policy, train, tmp_path / "filled", *cached, strategy="fsdp2")
    mine, _ = sorted((tmp_path / "cache").glob("*/*.logps"))
    mine.unlink()
    again = fit_on_ranks(policy, train, tmp_path / "again", *cached, strategy="fsdp2")
    full = fit_on_ranks(policy, train, tmp_path / "full", *cached, strategy="fsdp2")
    for output in (tmp_path / "filled", again, full):
        assert_numbers_agree(output, one)


def test_held_out_records_are_scored_together(policy: Path, train: Path, tmp_path: Path):
    """`validate` and `predict` with a sharded checkpoint, on two ranks and on one."""
    data = write_jsonl(tmp_path / "held_out.jsonl", plain_records(9, seed=3))
    output = fit_on_ranks(policy, train, tmp_path / "output", *SGD, strategy="fsdp2")
    ((_, checkpoint),) = list_checkpoints(output)
    shared = ["--model.policy", policy, "--ckpt_path", checkpoint, "--output_dir", output]
    shared += ["--trainer.accelerator", "cpu", "--data.batch_size", 4]
    rewards = []
    for devices in (("--trainer.devices", 2, "--trainer.strategy", "fsdp2"), ()):
        ranks = 2 if devices else 1
        for command in ("validate", "predict"):
            key = "--data.validation" if command == "validate" else "--data.predict"
            ended = run_ranks(command, *shared, *devices, key, data, ranks=ranks)
            assert [rank.status for rank in ended] == [0] * ranks, ended[0].err
        lines = (output / "held_out.jsonl.rewards.jsonl").read_text().splitlines()
        rewards.append([json.loads(line) for line in lines])
    assert any(line["reward"] != 0 for line in rewards[0])
    assert_same_rewards(*rewards)
    flip_last_byte(checkpoint / "__1_0.distcp")
    for devices in (("--trainer.devices", 2, "--trainer.strategy", "fsdp2"), ()):
        ended = run_ranks(
            "validate", *shared, *devices, "--data.validation", data, ranks=2 if devices else 1
        )
        for rank in ended:
            assert rank.status == 1
            assert "is damaged (__1_0.distcp). Give an earlier one by its path." in rank.err
            assert "Traceback" not in rank.err


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "options",
    [
        ("--trainer.precision", "bf16-mixed"),
        ("--model.lora.r", 4, "--model.dtype", "bfloat16", "--data.max_tokens", 60),
    ],
    ids=["float32 weights", "a frozen base in bfloat16"],
)
def test_half_precision_is_close(
    options: tuple[Any, ...], policy: Path, train: Path, tmp_path: Path
):
    options = (*options, "--trainer.max_steps", 3)
    two = fit_on_ranks(policy, train, tmp_path / "two", *options, strategy="fsdp2")
    one = fit(policy, train, tmp_path / "one", *options)
    for mine, theirs in zip(numbers(two), numbers(one), strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=0.05)
        assert mine["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=0.1)
        assert mine["train/logps/desirable"] == pytest.approx(
            theirs["train/logps/desirable"], rel=0.02
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--trainer.strategy", "fsdp"), "is FSDP1"),
        (("--trainer.strategy", "ddp_spawn"), "Use ddp"),
        (("--trainer.strategy", "deepspeed"), "Use --trainer.strategy fsdp2"),
        (("--trainer.strategy", "deepspeed_stage_2"), "Use --trainer.strategy fsdp2."),
        (("--trainer.strategy", "deepspeed_stage_3_offload"), "--trainer.strategy fsdp2_offload."),
        (("--trainer.strategy", "deepspeed_stage_2_offload"), "--trainer.strategy fsdp2_offload."),
        (
            ("--trainer.strategy", "lightning.pytorch.strategies.DeepSpeedStrategy"),
            "Use --trainer.strategy fsdp2",
        ),
        (
            (
                *("--trainer.strategy", "ModelParallelStrategy"),
                *("--trainer.strategy.data_parallel_size", 1),
            ),
            "Use --trainer.strategy fsdp2",
        ),
        (("--trainer.strategy", "fsdp2", "--model.optimizer", "adafactor"), "Use adamw"),
        (
            ("--trainer.strategy", "fsdp2", "--model.offload_reference", "true"),
            "a whole model",
        ),
        (
            (
                *("--trainer.strategy", "fsdp2", "--model.lora.r", 4),
                *("--model.quantization", "4bit"),
            ),
            "ddp, or remove --model.quantization",
        ),
    ],
)
def test_impossible_settings_are_refused_before_loading(
    options: tuple[Any, ...], message: str, policy: Path, train: Path, tmp_path: Path, capsys
):
    fit(policy, train, tmp_path / "output", *options, status=2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "output").exists()
