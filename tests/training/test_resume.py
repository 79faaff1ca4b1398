"""Resuming a killed run bit for bit (invariant 4), from complete checkpoints."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from kto_lightning.module import KTOModule
from kto_lightning.training.checkpoints import list_checkpoints
from tests.support.cli import (
    EVERY_STEP,
    ROOT,
    TWO_EPOCHS,
    fit,
    rows,
    run_cli,
    small_data,
    small_model,
)
from tests.support.comparison import assert_runs_equal
from tests.support.faults import Killed, fit_until
from tests.training.test_checkpoint_files import strip_checksum

SETTINGS: dict[str, tuple[Any, ...]] = {
    "adamw, cosine": ("--model.lr_schedule", "cosine", "--model.warmup_ratio", 0.3),
    "sgd, file order": ("--model.optimizer", "sgd", "--data.shuffle", "false"),
    "lora with dropout": ("--model.lora.r", 4, "--model.lora.dropout", 0.2),
    "dropout": ("--model.dropout", "true", "--data.max_tokens", 150),
    "workers": ("--data.num_workers", 2),
    "validation": ("--data.validation", 0.2, "--trainer.val_check_interval", 2),
    "validation at the end of an epoch": ("--data.validation", 0.2),
    "validation over epochs": (
        *("--data.validation", 0.2, "--trainer.val_check_interval", 4),
        *("--trainer.check_val_every_n_epoch", "null"),
    ),
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("policy"), "gpt2", attn_pdrop=0.2)


@pytest.fixture(scope="module")
def whole_runs(policy: Path, train: Path, tmp_path_factory: pytest.TempPathFactory):
    """Uninterrupted runs of twelve steps (ten with held-out records) by name in `SETTINGS`."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            output = tmp_path_factory.mktemp("whole")
            made[name] = fit(policy, train, output, *TWO_EPOCHS, *SETTINGS[name])
        return made[name]

    return run


@pytest.mark.parametrize(
    ("name", "step", "after_checkpoint"),  # an epoch has six steps
    [
        ("adamw, cosine", 3, True),
        ("adamw, cosine", 3, False),
        ("adamw, cosine", 6, True),
        ("adamw, cosine", 7, False),
        ("lora with dropout", 3, True),
        ("lora with dropout", 6, False),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(
    name: str, step: int, after_checkpoint: bool, policy: Path, train: Path, whole_runs, tmp_path
):
    options = (*TWO_EPOCHS, *SETTINGS[name], *EVERY_STEP)
    fit_until(step, policy, train, tmp_path, *options, after_checkpoint=after_checkpoint)
    assert not (tmp_path / "model").exists()
    fit(policy, train, tmp_path, *options, "--ckpt_path", "last")
    assert_runs_equal(tmp_path, whole_runs(name))


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("sgd, file order", 4),
        ("dropout", 4),
        ("workers", 6),
        *(("validation", step) for step in (4, 5)),  # here an epoch has five steps
        *(("validation at the end of an epoch", step) for step in (4, 5)),
        *(("validation over epochs", step) for step in (5, 8)),
    ],
)
def test_a_killed_run_resumes_with_other_settings(
    name: str, step: int, policy: Path, train: Path, whole_runs, tmp_path
):
    options = (*TWO_EPOCHS, *SETTINGS[name], *EVERY_STEP)
    fit_until(step, policy, train, tmp_path, *options)
    fit(policy, train, tmp_path, *options, "--ckpt_path", "last")
    assert_runs_equal(tmp_path, whole_runs(name))


@pytest.mark.parametrize("steps", [(2, 6, 10), (6, 12, 13)])
def test_a_run_killed_repeatedly_resumes(
    steps: tuple[int, ...], policy: Path, train: Path, tmp_path: Path
):
    """Above all between epochs: Lightning's own counts are wrong after the second time."""
    options = ("--trainer.max_epochs", 3, *SETTINGS["workers"], *EVERY_STEP)
    whole = fit(policy, train, tmp_path / "whole", *options)
    resume: tuple[Any, ...] = ()
    for step in steps:
        fit_until(step, policy, train, tmp_path / "killed", *options, *resume)
        resume = ("--ckpt_path", "last")
    fit(policy, train, tmp_path / "killed", *options, *resume)
    assert_runs_equal(tmp_path / "killed", whole)


@pytest.mark.parametrize("every", [(), ("--checkpoint.every_n_steps", 2)])
@pytest.mark.parametrize("steps", [(4, 8), (3, 6, 7)])
def test_a_run_made_in_parts_is_the_same(
    every: tuple[Any, ...],
    steps: tuple[int, ...],
    policy: Path,
    train: Path,
    whole_runs,
    tmp_path: Path,
):
    name = "sgd, file order"
    resume: tuple[Any, ...] = ()
    for step in (*steps, 12):
        limit = ("--trainer.max_steps", step)
        fit(policy, train, tmp_path, *limit, *every, *SETTINGS[name], *resume)
        resume = ("--ckpt_path", "last")
    assert_runs_equal(tmp_path, whole_runs(name))


@pytest.mark.parametrize("step", [4, 5])  # in an epoch of five steps, and at its end
def test_an_interrupted_validation_is_repeated_in_the_same_row(
    step: int, policy: Path, train: Path, whole_runs, tmp_path: Path
):
    interval = ("--data.validation", 0.2, "--trainer.val_check_interval", 1)
    options = (*TWO_EPOCHS, *interval, *EVERY_STEP)
    whole = fit(policy, train, tmp_path / "whole", *options)
    validate = KTOModule.validation_step

    def end(self: KTOModule, *args: Any) -> None:
        if self.trainer.global_step == step:
            raise Killed
        validate(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KTOModule, "validation_step", end)
        with pytest.raises(Killed):
            fit(policy, train, tmp_path / "cut", *options)
    assert not rows(tmp_path / "cut")[-1]["val/loss"]
    fit(policy, train, tmp_path / "cut", *options, "--ckpt_path", "last")
    assert_runs_equal(tmp_path / "cut", whole)


def test_a_finished_run_can_be_resumed(policy: Path, train: Path, whole_runs, tmp_path: Path):
    name = "sgd, file order"
    output = fit(policy, train, tmp_path, *SETTINGS[name])
    fit(policy, train, output, *SETTINGS[name], "--ckpt_path", "last")
    assert len(rows(output)) == 6
    fit(policy, train, output, *TWO_EPOCHS, *SETTINGS[name], "--ckpt_path", "last")
    assert_runs_equal(output, whole_runs(name))


def test_resuming_an_earlier_checkpoint_renames_later_ones(
    policy: Path, train: Path, whole_runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    name = "adamw, cosine"
    options = (*TWO_EPOCHS, *SETTINGS[name], "--checkpoint.every_n_steps", 4)
    fit(policy, train, tmp_path, *options)
    earlier = tmp_path / "checkpoints" / "step=8.ckpt"
    resume = ("--ckpt_path", earlier)
    fit_until(10, policy, train, tmp_path, *options, *resume, after_checkpoint=False)
    assert "step=12.ckpt is of a later step" in capsys.readouterr().err
    assert [step for step, _ in list_checkpoints(tmp_path)] == [8]
    assert len(rows(tmp_path)) == 10
    fit(policy, train, tmp_path, *options, "--ckpt_path", "last")
    assert_runs_equal(tmp_path, whole_runs(name))


def test_a_checkpoint_holds_plain_values_and_what_is_trained(
    policy: Path, train: Path, tmp_path: Path
):
    lora = ("--model.lora.r", 4, "--trainer.max_steps", 2)
    sizes = {}
    for name, options in (("lora", lora), ("full", lora[2:])):
        output = fit(policy, train, tmp_path / name, *options)
        path = output / "checkpoints" / "step=2.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        sizes[name] = sum(value.numel() for value in checkpoint["state_dict"].values())
        if name == "lora":
            assert all(".lora_" in key for key in checkpoint["state_dict"])
        assert checkpoint["kto"]["policy"] == str(policy)
    assert sizes["lora"] < sizes["full"] / 5


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    policy: Path, train: Path, whole_runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    name = "adamw, cosine"
    options = (*TWO_EPOCHS, *SETTINGS[name], *EVERY_STEP)
    save = torch.save

    def full_disk(checkpoint: dict[str, Any], file: Any) -> None:
        if checkpoint["global_step"] == 4:
            file.write(b"the beginning of it")
            raise OSError(28, "No space left on device")
        save(checkpoint, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        fit(policy, train, tmp_path, *options, status=1)
    error = capsys.readouterr().err
    assert "step=4.ckpt cannot be written: [Errno 28] No space left on device" in error
    assert "--ckpt_path last" in error
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step=2.ckpt", "step=3.ckpt"]
    fit(policy, train, tmp_path, *options, "--ckpt_path", "last")
    assert_runs_equal(tmp_path, whole_runs(name))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _overwrite(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _weights_only(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in checkpoint.items() if k != "optimizer_states"}, path)


@pytest.mark.parametrize(
    "damage", [_truncate, _overwrite, _empty, _pipe, _directory, _weights_only]
)
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(
    damage, policy: Path, train: Path, whole_runs, tmp_path: Path, capsys
):
    name = "adamw, cosine"
    options = (*TWO_EPOCHS, *SETTINGS[name], *EVERY_STEP)
    fit_until(8, policy, train, tmp_path, *options)
    damage(tmp_path / "checkpoints" / "step=8.ckpt")
    fit(policy, train, tmp_path, *options, "--ckpt_path", "last")
    assert capsys.readouterr().err.count("step=8.ckpt is damaged") == 1
    assert_runs_equal(tmp_path, whole_runs(name))


def test_a_checkpoint_of_before_checksums_resumes(
    policy: Path, train: Path, whole_runs, tmp_path: Path
):
    name = "adamw, cosine"
    options = (*TWO_EPOCHS, *SETTINGS[name], *EVERY_STEP)
    fit_until(8, policy, train, tmp_path, *options)
    for _, path in list_checkpoints(tmp_path):
        strip_checksum(path)
    fit(policy, train, tmp_path, *options, "--ckpt_path", "last")
    assert_runs_equal(tmp_path, whole_runs(name))


def test_a_damaged_checkpoint_is_neither_exported_nor_validated(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = fit(policy, train, tmp_path / "run", "--trainer.max_steps", 1)
    checkpoint = output / "checkpoints" / "step=1.ckpt"
    content = bytearray(checkpoint.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 16] ^= 1  # the zip's index
    checkpoint.write_bytes(content)
    data = ("--data.validation", train, "--data.predict", train, "--ckpt_path", checkpoint)
    for arguments in (
        ("export", checkpoint, tmp_path / "exported"),
        ("validate", "--model.policy", policy, *data),
        ("predict", "--model.policy", policy, *data),
    ):
        assert run_cli(*arguments) == 1
        assert "step=1.ckpt is not a readable checkpoint" in capsys.readouterr().err


def refused(policy: Path, train: Path, output: Path, *options: Any, status: int) -> None:
    before = (output / "metrics.csv").read_bytes()
    fit(policy, train, output, "--trainer.max_steps", 4, *options, status=status)
    assert (output / "metrics.csv").read_bytes() == before


def test_what_cannot_be_resumed_is_refused(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = fit(policy, train, tmp_path / "run", "--trainer.max_steps", 2)
    checkpoint = output / "checkpoints" / "step=2.ckpt"
    last = ("--ckpt_path", "last")
    other_model = small_model(tmp_path / "other", "gpt2", n_embd=16)
    other_data = small_data(tmp_path / "other.jsonl", 30)
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("".join(reversed(train.read_text().splitlines(keepends=True))))
    capsys.readouterr()
    for arguments, status, part in (
        ((policy, train, output, *last, "--model.lora.r", 4), 2, "lora is {r: 4, alpha: 32.0, "),
        ((other_model, train, output, *last), 2, "other does not hold the weights of /"),
        ((policy, other_data, output, *last), 2, "was trained on 24 records, and now there are 30"),
        ((policy, backwards, output, *last), 2, "differs: their prompts, completions or order; "),
        ((policy, train, output, "--ckpt_path", output), 1, "is a directory. Give one of its"),
        ((policy, train, output, *last, "--data.batch_size", 8), 2, "batch_size is 8 (was 4)"),
        ((policy, train, output, *last, "--seed_everything", 1), 2, "seed_everything is 1 (was 0)"),
        (
            (policy, train, output, *last, "--model.optimizer", "sgd"),
            2,
            "optimizer is sgd (was adamw)",
        ),
        ((policy, train, output, "--ckpt_path", train), 1, "is not a readable checkpoint"),
        ((policy, train, output, "--ckpt_path", "missing"), 1, "there is no such checkpoint"),
    ):
        refused(*arguments, status=status)
        error = capsys.readouterr().err
        assert part in error
        assert "Traceback" not in error
    _truncate(checkpoint)
    refused(policy, train, output, *last, status=2)
    assert "metrics.csv, checkpoints/step=2.ckpt, model, and no checkpoint to" in (
        capsys.readouterr().err
    )


def test_validate_refuses_a_checkpoint_of_another_model(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = fit(policy, train, tmp_path, "--trainer.max_steps", 1, "--model.lora.r", 4)
    data = ("--data.validation", train, "--ckpt_path", output / "checkpoints" / "step=1.ckpt")
    assert run_cli("validate", "--model.policy", policy, *data) == 2
    assert "does not hold the weights of this policy" in capsys.readouterr().err


def _start(policy: Path, train: Path, output: Path, *options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "kto_lightning", "fit", "--model.policy", policy]
    command += ["--data.train", train, "--output_dir", output, "--data.batch_size", 4]
    command += ["--model.learning_rate", 1e-3, "--trainer.accelerator", "cpu", *options]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_sigkill_at_random_moments(
    seed: int, policy: Path, train: Path, tmp_path_factory, tmp_path: Path
):
    """A real process, killed some milliseconds after its first checkpoint, several times."""
    random = Random(seed)
    options = ("--trainer.max_epochs", 20, *EVERY_STEP, "--model.lr_schedule", "cosine")
    whole = fit(policy, train, tmp_path / "whole", *options)
    output = tmp_path / "killed"
    resume: tuple[Any, ...] = ()
    for _ in range(3):
        done = [step for step, _ in list_checkpoints(output)]
        process = _start(policy, train, output, *options, *resume)
        deadline = time.monotonic() + 120
        while [step for step, _ in list_checkpoints(output)] == done:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        resume = ("--ckpt_path", "last")
    assert not (output / "model").exists()
    fit(policy, train, output, *options, *resume)
    assert_runs_equal(output, whole)
