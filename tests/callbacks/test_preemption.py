"""Preemption: a signalled run saves a checkpoint, says how to resume, and resumes bit for bit."""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from kto_lightning.callbacks.preemption import SIGNALS
from kto_lightning.callbacks.reporting import Summary
from kto_lightning.module import KTOModule
from kto_lightning.training.checkpoints import list_checkpoints
from tests.support.cli import LAST, fit, fit_arguments, rows, run_cli, small_model
from tests.support.comparison import assert_runs_equal
from tests.support.faults import call_in_step
from tests.support.ranks import fit_on_ranks, run_ranks

VALIDATION = ("--data.validation", 0.2, "--trainer.val_check_interval", 2)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("policy"), "gpt2")


@pytest.fixture(scope="module")
def whole_runs(policy: Path, train: Path, tmp_path_factory) -> Callable[..., Path]:
    """Uninterrupted runs with these options, each made once."""
    made: dict[tuple[Any, ...], Path] = {}

    def run(*options: Any) -> Path:
        if options not in made:
            made[options] = fit(policy, train, tmp_path_factory.mktemp("whole"), *options)
        return made[options]

    return run


def fit_signalled(
    signum: int, step: int, method: str, *arguments: Any, times: int = 1, status: int
) -> None:
    """A run whose process gets a signal during a step or a validation."""

    def send() -> None:
        for _ in range(times):
            os.kill(os.getpid(), signum)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KTOModule, method, getattr(KTOModule, method))  # restored at the end
        call_in_step(send, step, method)
        fit(*arguments, status=status)


@pytest.mark.parametrize(
    ("signum", "step", "method", "options"),
    [
        (signal.SIGTERM, 3, "training_step", ("--data.num_workers", 2)),
        (signal.SIGTERM, 6, "training_step", ()),  # the last one
        (signal.SIGUSR1, 2, "training_step", VALIDATION),
        (signal.SIGHUP, 2, "training_step", ()),  # a closed terminal
        (signal.SIGINT, 4, "validation_step", VALIDATION),
        (signal.SIGTERM, 5, "validation_step", ("--data.validation", 0.2)),
    ],
)
def test_a_signalled_run_is_saved_and_resumes(
    signum: int,
    step: int,
    method: str,
    options: tuple[Any, ...],
    policy: Path,
    train: Path,
    whole_runs: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    before = [signal.getsignal(number) for number in SIGNALS]
    fit_signalled(signum, step, method, policy, train, tmp_path, *options, status=128 + int(signum))
    assert [signal.getsignal(number) for number in SIGNALS] == before
    name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
    error = capsys.readouterr().err
    assert f"stopped by {name} after step {step}, " in error
    assert "with the same command and --ckpt_path last" in error
    assert "Traceback" not in error
    assert "error" not in error
    assert [saved for saved, _ in list_checkpoints(tmp_path)] == [step]
    assert len(rows(tmp_path)) == step
    assert not (tmp_path / "model").exists()
    fit(policy, train, tmp_path, *options, *LAST)
    assert_runs_equal(tmp_path, whole_runs(*options))


def test_a_second_ctrl_c_stops_at_once_and_names_the_last_checkpoint(
    policy: Path, train: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    options = ("--checkpoint.every_n_steps", 2)
    fit_signalled(
        *(signal.SIGINT, 4, "training_step", policy, train, tmp_path, *options),
        times=2,
        status=130,
    )
    error = capfd.readouterr().err
    assert "Press Ctrl-C again to stop at once" in error
    assert f"the last checkpoint is {tmp_path / 'checkpoints' / 'step=2.ckpt'}. Resume" in error
    assert "Traceback" not in error
    assert not (tmp_path / "model").exists()


def test_an_ignored_signal_stays_ignored(policy: Path, train: Path, tmp_path: Path):
    """As under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fit_signalled(signal.SIGHUP, 2, "training_step", policy, train, tmp_path, status=0)
    finally:
        signal.signal(signal.SIGHUP, before)


def kill_worker() -> None:
    """As the kernel does when memory runs out. Workers of earlier runs may still wait for their
    loader to be collected."""
    workers = [psutil.Process(child.pid) for child in multiprocessing.active_children()]
    max(workers, key=psutil.Process.create_time).kill()


@pytest.mark.parametrize(
    ("step", "method", "options"),
    [(2, "training_step", ()), (6, "training_step", ()), (4, "validation_step", VALIDATION)],
)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_run_whose_loader_worker_is_killed_is_saved_and_resumes(
    step: int,
    method: str,
    options: tuple[Any, ...],
    num_workers: int,
    policy: Path,
    train: Path,
    whole_runs: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    workers = ("--data.num_workers", num_workers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KTOModule, method, getattr(KTOModule, method))  # restored at the end
        call_in_step(kill_worker, step, method)
        # Workers prefetch: the last steps do not need the one that is killed.
        fit(policy, train, tmp_path, *options, *workers, status=0 if step == 6 else 1)
    error = capsys.readouterr().err
    if step < 6:
        assert "was killed by SIGKILL, perhaps because memory ran out" in error
        assert "error: a loader worker was killed: stopped after step" in error
        assert "with the same command and --ckpt_path last" in error
        ((saved, _),) = list_checkpoints(tmp_path)
        assert len(rows(tmp_path)) == saved >= step
        fit(policy, train, tmp_path, *options, *workers, *LAST)
    assert "Traceback" not in error
    assert_runs_equal(tmp_path, whole_runs(*options))


def test_predict_goes_on_without_a_killed_worker(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = shutil.copy(train, tmp_path)
    arguments = ("predict", "--model.policy", policy, "--data.predict", data)
    arguments += ("--data.batch_size", 2, "--trainer.accelerator", "cpu")
    assert run_cli(*arguments) == 0
    expected = Path(f"{data}.rewards.jsonl").read_text(encoding="utf-8")
    step, calls = KTOModule.predict_step, []

    def predict_step(self: KTOModule, batch: Any, batch_idx: int) -> Any:
        calls.append(batch_idx)
        if batch_idx == 3:
            kill_worker()
        return step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KTOModule, "predict_step", predict_step)
        assert run_cli(*arguments, "--data.num_workers", 2) == 0
    assert len(calls) == 12
    assert Path(f"{data}.rewards.jsonl").read_text(encoding="utf-8") == expected
    assert "its batches" in capsys.readouterr().err.lower()


def signal_ranks(*ranks: int) -> None:
    """For `prepare` of a job: some of its ranks get SIGTERM in step 3."""
    if int(os.environ["RANK"]) in ranks:
        call_in_step(partial(os.kill, os.getpid(), signal.SIGTERM), 3, "training_step")


@pytest.fixture(scope="module")
def whole_runs_on_two(policy: Path, train: Path, tmp_path_factory) -> Callable[[str], Path]:
    """Uninterrupted runs of two ranks under a strategy, each made once."""
    made: dict[str, Path] = {}

    def run(strategy: str) -> Path:
        if strategy not in made:
            output = tmp_path_factory.mktemp("whole")
            made[strategy] = fit_on_ranks(policy, train, output, strategy=strategy)
        return made[strategy]

    return run


@pytest.mark.parametrize(
    ("strategy", "asked"), [("ddp", (1,)), ("ddp", (0, 1)), ("fsdp2", (0,)), ("fsdp2", (0, 1))]
)
def test_ranks_stop_together_whichever_is_signalled(
    strategy: str,
    asked: tuple[int, ...],
    policy: Path,
    train: Path,
    whole_runs_on_two: Callable[[str], Path],
    tmp_path: Path,
):
    options = ("--trainer.devices", 2, "--trainer.strategy", strategy)
    arguments = ("fit", *fit_arguments(policy, train, tmp_path, *options))
    ended = run_ranks(*arguments, prepare=partial(signal_ranks, *asked))
    assert [rank.status for rank in ended] == [143, 143], "\n".join(rank.err for rank in ended)
    assert "stopped by SIGTERM after step 3" in ended[0].err
    assert [saved for saved, _ in list_checkpoints(tmp_path)] == [3]
    fit_on_ranks(policy, train, tmp_path, *LAST, strategy=strategy)
    assert_runs_equal(tmp_path, whole_runs_on_two(strategy))


def kill_worker_of_second_rank() -> None:
    """For `prepare` of a job."""
    if os.environ["RANK"] == "1":
        call_in_step(kill_worker, 2, "training_step")


def test_ranks_stop_together_when_one_loses_a_loader_worker(
    policy: Path, train: Path, whole_runs_on_two: Callable[[str], Path], tmp_path: Path
):
    options = ("--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.num_workers", 1)
    arguments = ("fit", *fit_arguments(policy, train, tmp_path, *options))
    ended = run_ranks(*arguments, prepare=kill_worker_of_second_rank)
    assert [rank.status for rank in ended] == [1, 1], "\n".join(rank.err for rank in ended)
    assert "was killed by SIGKILL" in ended[1].err
    assert "a loader worker was killed: stopped after step" in ended[0].err
    fit_on_ranks(policy, train, tmp_path, *LAST, strategy="ddp")
    assert_runs_equal(tmp_path, whole_runs_on_two("ddp"))


def signal_first_rank_in(method: str, owner: type) -> None:
    """For `prepare` of a job: the first rank gets SIGTERM in a method, in which it then waits."""
    original = getattr(owner, method)

    def method_with_signal(*arguments: Any) -> None:
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.0)
        original(*arguments)

    setattr(owner, method, method_with_signal)


def test_ranks_stop_together_when_signalled_before_the_first_step(
    policy: Path, train: Path, tmp_path: Path
):
    arguments = ("fit", *fit_arguments(policy, train, tmp_path, "--trainer.devices", 2))
    ended = run_ranks(*arguments, prepare=partial(signal_first_rank_in, "on_train_start", Summary))
    assert [rank.status for rank in ended] == [143, 143], "\n".join(rank.err for rank in ended)
    assert "stopped by SIGTERM after step 1" in ended[0].err


def test_outside_training_all_ranks_end_at_once(policy: Path, train: Path, tmp_path: Path):
    options = ["--model.policy", policy, "--data.validation", train, "--output_dir", tmp_path]
    options += ["--trainer.accelerator", "cpu", "--trainer.devices", 2]
    prepare = partial(signal_first_rank_in, "validation_step", KTOModule)
    first, second = run_ranks("validate", *options, prepare=prepare)
    assert first.status == -signal.SIGTERM
    assert second.status == 1
    assert "another rank has ended" in second.err


def interrupt_process_group() -> None:
    """For `prepare` of a job: Ctrl-C as a terminal sends it, to the loader's workers as well."""
    os.setpgrp()
    call_in_step(partial(os.killpg, os.getpid(), signal.SIGINT), 3, "training_step")


def test_ctrl_c_in_a_terminal_does_not_stop_the_loader_workers(
    policy: Path, train: Path, whole_runs: Callable[..., Path], tmp_path: Path
):
    options = ("--data.num_workers", 2)
    arguments = ("fit", *fit_arguments(policy, train, tmp_path, *options))
    (ended,) = run_ranks(*arguments, ranks=1, prepare=interrupt_process_group)
    assert ended.status == 130, ended.err
    assert "stopped by Ctrl-C after step 3" in ended.err
    assert "Traceback" not in ended.err
    fit(policy, train, tmp_path, *options, *LAST)
    assert_runs_equal(tmp_path, whole_runs(*options))
