"""`config.yaml` and `run.json`: what a run was stays what it was, and whether it still runs."""

import signal
from pathlib import Path

import pytest
import yaml

from kto_lightning.reports.run import read_run, verdict
from kto_lightning.reports.run.run_file import read_run_file
from tests.support.cli import EVERY_STEP, LAST, fit, fit_arguments, rows, run_cli
from tests.support.faults import call_in_step, kill_ranks_in_step
from tests.support.ranks import job, run_ranks
from tests.training.test_run_lock import block_signal_and_wait_in_step_two


def settings(output: Path) -> dict:
    return yaml.safe_load((output / "config.yaml").read_text())


def test_a_refused_command_does_not_change_the_settings(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = fit(policy, train, tmp_path / "run", "--trainer.max_steps", 2)
    before = (output / "config.yaml").read_bytes(), (output / "run.json").read_bytes()
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for data, options, status in (
        (train, ("--model.beta", 0.7), 2),  # the directory is in use
        (train, (*LAST, "--model.beta", 0.7, "--model.lora.r", 4), 2),
        (train, (*LAST, "--model.beta", 0.7, "--data.batch_size", 2), 2),
        (empty, (*LAST, "--model.beta", 0.7), 1),
    ):
        fit(policy, data, output, *options, status=status)
        assert ((output / "config.yaml").read_bytes(), (output / "run.json").read_bytes()) == before


def test_the_settings_of_a_resumed_run_start_the_same_run_again(
    policy: Path, train: Path, tmp_path: Path
):
    whole = fit(policy, train, tmp_path / "whole")
    output = fit(policy, train, tmp_path / "run", "--trainer.max_steps", 2, *EVERY_STEP)
    checkpoint = output / "checkpoints" / "step=1.ckpt"
    fit(policy, train, output, "--ckpt_path", checkpoint)
    assert settings(output)["ckpt_path"] == "last"
    config = output / "config.yaml"
    assert run_cli("fit", "--config", config, "--output_dir", tmp_path / "again") == 0
    assert rows(tmp_path / "again") == rows(output) == rows(whole)
    fit(policy, train, tmp_path / "other", "--ckpt_path", output / "checkpoints" / "step=6.ckpt")
    assert not (tmp_path / "other" / "config.yaml").exists()  # no step was left to take


def test_the_status_of_a_run(policy: Path, train: Path, tmp_path: Path):
    output = tmp_path / "run"
    command = ("fit", *fit_arguments(policy, train, output, *EVERY_STEP))
    with job(*command, ranks=1, prepare=block_signal_and_wait_in_step_two) as running:
        running.wait_for(lambda: (output / "checkpoints" / "step=1.ckpt").exists())
        assert read_run(output).status == "running"
        (finding, _) = verdict(read_run(output))[:2]
        pid = running.processes[0].pid
        assert f"it is still running, as process {pid} on host" in finding.sentence
        running.signal(signal.SIGKILL)
        running.wait()
    assert read_run(output).status == "killed"
    finding = verdict(read_run(output))[0]
    assert finding.what == "The run was killed at step 1 of 6"
    assert "--ckpt_path last" in finding.action
    fit(policy, train, output, *LAST)
    assert read_run(output).status == "finished"


def fail_in_step_two() -> None:
    """For `prepare` of a job."""
    call_in_step(lambda: 1 / 0, 2, "training_step")


def test_a_run_that_fails_is_neither_running_nor_killed(policy: Path, train: Path, tmp_path: Path):
    run_ranks("fit", *fit_arguments(policy, train, tmp_path), ranks=1, prepare=fail_in_step_two)
    found = read_run_file(tmp_path)
    assert (found.status, found.reason) == ("stopped", "division by zero")
    finding = verdict(read_run(tmp_path))[0]
    assert "it was stopped (division by zero)" in finding.sentence


def kill_in_step_one() -> None:
    """For `prepare` of a job."""
    kill_ranks_in_step(1, 0)


def test_a_run_killed_before_its_first_row(policy: Path, train: Path, tmp_path: Path):
    run_ranks("fit", *fit_arguments(policy, train, tmp_path), ranks=1, prepare=kill_in_step_one)
    (finding,) = verdict(read_run(tmp_path))
    assert "its process has ended without a word" in finding.meaning
