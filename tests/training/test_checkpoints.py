"""The output directory: a used one is refused, and a full disk leaves a run that resumes."""

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kto_lightning.cli import lightning_cli as cli
from kto_lightning.module import KTOModule
from kto_lightning.training.checkpoint_files import is_whole
from kto_lightning.training.checkpoints import list_checkpoints
from tests.support.cli import (
    EVERY_STEP,
    LAST,
    fit,
    fit_arguments,
    rows,
    run_cli,
    small_data,
    weights,
)
from tests.support.comparison import assert_runs_equal
from tests.support.faults import kill_at_file_operation
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def whole(policy: Path, train: Path, tmp_path_factory) -> Path:
    return fit(policy, train, tmp_path_factory.mktemp("whole"))


def listing(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_a_new_run_into_a_used_directory_is_refused(
    policy: Path, train: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = listing(whole)
    fit(policy, train, whole, status=2)
    error = capsys.readouterr().err
    assert f"{whole} holds an earlier run: metrics.csv, checkpoints/step=6.ckpt, model." in error
    assert "resume it with --ckpt_path last" in error
    assert f"or remove {whole} first" in error
    # So is a run resumed from elsewhere.
    other = fit(policy, train, tmp_path / "other", "--trainer.max_steps", 1)
    fit(policy, train, whole, "--ckpt_path", other / "checkpoints" / "step=1.ckpt", status=2)
    assert listing(whole) == before


@pytest.mark.parametrize("left", ["metrics.csv", "model", "adapter"])
def test_any_part_of_a_run_makes_a_directory_used(
    left: str, policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    if left == "metrics.csv":
        (tmp_path / left).write_text("step,train/loss\n1,0.5\n")
    else:
        (tmp_path / left).mkdir()
        (tmp_path / left / "config.json").write_text("{}")
    fit(policy, train, tmp_path, status=2)
    error = capsys.readouterr().err
    assert f"holds an earlier run: {left}." in error
    assert ("--ckpt_path last" in error) == (left == "metrics.csv")


@pytest.mark.parametrize(
    "left", [None, "step,train/loss\n", "step,train/loss\n1,0.5\n", "step,tr\0\n1,"]
)
def test_a_run_killed_before_its_first_checkpoint_starts_over(
    left: str | None,
    policy: Path,
    train: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    output = tmp_path / "run"
    if left is not None:
        output.mkdir()
        (output / "metrics.csv").write_text(left)
    assert run_cli("validate", *fit_arguments(policy, train, output, *LAST)) == 1
    assert "there is no whole checkpoint in" in capsys.readouterr().err
    fit(policy, train, output, *LAST)
    assert f"warning: {output} has no checkpoint yet: starting over." in capsys.readouterr().err
    assert rows(output) == rows(whole)


def test_the_model_of_a_run_without_checkpoints_is_not_overwritten(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    fit(policy, train, tmp_path, *LAST, status=2)
    error = capsys.readouterr().err
    assert "holds an earlier run: model, and no checkpoint to resume from." in error
    assert "--ckpt_path last" not in error


@pytest.mark.parametrize("operation", [1, 4, 9, 14, 19, 25])
def test_a_run_killed_at_a_file_operation_is_resumed(
    operation: int, policy: Path, train: Path, whole: Path, tmp_path: Path
):
    output = tmp_path / "run"
    command = ("fit", *fit_arguments(policy, train, output, *EVERY_STEP))
    kill = partial(kill_at_file_operation, operation, output)
    (killed,) = run_ranks(*command, ranks=1, prepare=kill)
    assert killed.status == -signal.SIGKILL
    fit(policy, train, output, *EVERY_STEP, *LAST)
    assert_runs_equal(output, whole)
    assert not list(output.rglob("*.part"))


def test_a_run_that_ended_before_its_first_step_does_not_block_the_next(
    policy: Path, train: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: Any) -> None:
        raise OSError("an accident")

    fit(policy, small_data(tmp_path / "one.jsonl", 1), tmp_path / "run", status=1)
    with monkeypatch.context() as patch:
        patch.setattr(KTOModule, "training_step", fail)
        fit(policy, train, tmp_path / "run", status=1)
    assert (tmp_path / "run" / "metrics.csv").exists()
    assert rows(fit(policy, train, tmp_path / "run")) == rows(whole)


@contextmanager
def files_limited() -> Iterator[Callable[[int], None]]:
    """A function that limits the size of files, in bytes, until the block ends: a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("what", ["checkpoint", "metrics.csv", "model"])
def test_a_full_disk_is_an_error_and_keeps_the_last_checkpoint(
    what: str, policy: Path, train: Path, whole: Path, tmp_path: Path, capsys, monkeypatch
):
    step, save = KTOModule.training_step, cli.save_policy
    with files_limited() as limit, monkeypatch.context() as patch:

        def limited_step(self: KTOModule, *arguments: Any) -> None:
            if self.trainer.global_step == 3 and what != "model":
                limit(
                    100_000
                    if what == "checkpoint"
                    else (tmp_path / "metrics.csv").stat().st_size + 9
                )
            step(self, *arguments)

        def limited_save(*arguments: Any, **options: Any) -> None:
            limit(100_000)
            save(*arguments, **options)

        patch.setattr(KTOModule, "training_step", limited_step)
        patch.setattr(cli, "save_policy", limited_save)
        fit(policy, train, tmp_path, *EVERY_STEP, status=1)
    error = capsys.readouterr().err
    named = {"checkpoint": "step=4.ckpt", "metrics.csv": "metrics.csv", "model": "model"}[what]
    assert f"{named} cannot be written: " in error
    assert "File too large" in error
    assert "--ckpt_path last" in error
    assert "Traceback" not in error
    steps = [step for step, path in list_checkpoints(tmp_path) if is_whole(path)]
    assert steps == ([5, 6] if what == "model" else [2, 3])
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "model").exists()
    fit(policy, train, tmp_path, *EVERY_STEP, *LAST)
    assert rows(tmp_path) == rows(whole)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path).items())


@pytest.mark.parametrize("name", ["checkpoints", "model", "adapter"])
def test_a_file_in_place_of_a_directory_is_refused_before_the_run(
    name: str, policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / name).symlink_to("nowhere")
    fit(policy, train, tmp_path, status=2)
    error = capsys.readouterr().err
    assert f"{tmp_path / name} is not a directory, as the run's {name} will be" in error
    assert [path.name for path in tmp_path.iterdir()] == [name]
