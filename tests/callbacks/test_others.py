"""Lightning's callbacks beside a run: what they change is resumed exactly, or they are refused."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from kto_lightning.module import KTOModule
from tests.support.cli import (
    EVERY_STEP,
    LAST,
    TWO_EPOCHS,
    fit,
    rows,
    run_cli,
    small_model,
    weights,
)
from tests.support.comparison import assert_runs_equal
from tests.support.faults import fit_until

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")
CALLBACKS = "lightning.pytorch.callbacks."
EMA = (
    *("--trainer.callbacks", f"{CALLBACKS}EMAWeightAveraging"),
    *("--trainer.callbacks.decay", 0.7, "--trainer.callbacks.update_every_n_steps", 2),
)
LORA = ("--model.lora.r", 4, "--model.lora.dropout", 0.2)
HELD_OUT = ("--data.validation", 0.2, "--trainer.val_check_interval", 2)
STOPPING = (
    *("--data.validation", 0.2, "--trainer.callbacks", f"{CALLBACKS}EarlyStopping"),
    *("--trainer.callbacks.monitor", "val/loss", "--trainer.callbacks.min_delta", 9),
    *("--trainer.callbacks.patience", 2, "--trainer.max_epochs", 6),
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("policy"), "gpt2")


def checkpoint_at(output: Path, step: int) -> dict[str, Any]:
    return torch.load(output / "checkpoints" / f"step={step}.ckpt", weights_only=True)


def assert_same_tensors(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("options", [(), LORA, HELD_OUT], ids=["full", "lora", "validation"])
def test_averaged_weights_are_resumed_bit_for_bit(
    options: tuple[Any, ...], policy: Path, train: Path, tmp_path: Path, capsys
):
    settings = (*TWO_EPOCHS, *options, *EMA)
    whole = fit(policy, train, tmp_path / "whole", *settings)
    assert "model (weights averaged by EMAWeightAveraging)" in capsys.readouterr().out
    output = tmp_path / "cut"
    fit_until(3, policy, train, output, *settings, *EVERY_STEP)
    fit_until(6, policy, train, output, *settings, *EVERY_STEP, *LAST)
    fit(policy, train, output, *settings, *EVERY_STEP, *LAST)
    assert_runs_equal(output, whole)
    last = len(rows(whole))
    one, other = checkpoint_at(output, last), checkpoint_at(whole, last)
    for name in ("state_dict", "current_model_state", "averaging_state"):
        assert_same_tensors(one[name], other[name])
    assert any(
        not torch.equal(value, one["current_model_state"][name])
        for name, value in one["state_dict"].items()
    )
    if options == LORA:
        assert all(".lora_" in name for name in one["current_model_state"])
    # What is exported is the average, also by a run whose steps are all taken, and by `export`.
    expected = weights(whole)
    fit(policy, train, output, *settings, *EVERY_STEP, *LAST)
    assert f"complete  at step {last}" in capsys.readouterr().out
    assert_same_tensors(weights(output), expected)
    path = output / "checkpoints" / f"step={last}.ckpt"
    merge = ("--merge",) if options == LORA else ()
    assert run_cli("export", path, tmp_path / "exported" / "model", *merge) == 0
    assert_same_tensors(weights(tmp_path / "exported"), expected)


def test_a_run_stopped_during_its_validation_keeps_both_sets_of_weights(
    policy: Path, train: Path, tmp_path: Path
):
    settings = (*HELD_OUT, *EMA)
    whole = fit(policy, train, tmp_path / "whole", *settings)
    output, validate = tmp_path / "cut", KTOModule.validation_step

    def stop(self: KTOModule, *args: Any) -> None:
        if self.trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        validate(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KTOModule, "validation_step", stop)
        fit(policy, train, output, *settings, status=128 + signal.SIGTERM)
    fit(policy, train, output, *settings, *LAST)
    assert_runs_equal(output, whole)


def test_averaging_is_not_taken_up_or_dropped_on_the_way(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    two = ("--trainer.max_steps", 2)
    averaged = fit(policy, train, tmp_path / "averaged", *two, *EMA)
    plain = fit(policy, train, tmp_path / "plain", *two)
    capsys.readouterr()
    fit(policy, train, averaged, *LAST, status=2)
    assert "the run of --ckpt_path had a WeightAveraging callback" in capsys.readouterr().err
    fit(policy, train, plain, *LAST, *EMA, status=2)
    assert "the run of --ckpt_path had no WeightAveraging callback" in capsys.readouterr().err
    fit(policy, train, averaged, *LAST, *EMA, "--trainer.callbacks.decay", 0.9)
    assert "changed   --trainer.callbacks " in capsys.readouterr().out


class Scales(Callback):
    """Changes the weights when training ends."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(2.0)


def test_the_last_checkpoint_is_of_before_other_callbacks_end(
    policy: Path, train: Path, tmp_path: Path
):
    three = ("--trainer.max_steps", 3)
    plain = fit(policy, train, tmp_path / "plain", *three)
    scales = ("--trainer.callbacks", f"{__name__}.Scales")
    output = fit(policy, train, tmp_path / "scaled", *three, *scales)
    one, other = checkpoint_at(output, 3), checkpoint_at(plain, 3)
    assert_same_tensors(one["state_dict"], other["state_dict"])
    expected = weights(plain)
    assert all(torch.equal(value, 2 * expected[name]) for name, value in weights(output).items())


def test_early_stopping_is_resumed_and_a_stopped_run_stays_stopped(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole = fit(policy, train, tmp_path / "whole", *STOPPING)
    assert len(rows(whole)) == 15  # three epochs of five steps, of six
    output = tmp_path / "cut"
    for step in (5, 10):  # epochs end there
        resume = LAST if step > 5 else ()
        fit_until(step, policy, train, output, *STOPPING, *EVERY_STEP, *resume)
    fit(policy, train, output, *STOPPING, *EVERY_STEP, *LAST)
    assert_runs_equal(output, whole)
    capsys.readouterr()
    fit(policy, train, output, *STOPPING, *EVERY_STEP, *LAST)
    assert "stopped   early, at step 15, before it was resumed" in capsys.readouterr().out
    assert_runs_equal(output, whole)
