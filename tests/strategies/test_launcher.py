"""Ranks started by Lightning or torchrun: when one fails, none is left running."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from lightning import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher, subprocess_script

from kto_lightning.strategies import launcher as launched
from kto_lightning.training.checkpoints import list_checkpoints
from tests.support.cli import ROOT, fit_arguments, rows
from tests.support.comparison import assert_runs_equal
from tests.support.ranks import fit_on_ranks, job

DEVICES = ("--trainer.devices", 2, "--trainer.strategy", "ddp")


def wait_for(condition: Callable[[], bool], *, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_started_ranks_have_a_grace_period(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launched, "_GRACE", 1.0)
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    launcher = trainer.strategy.launcher
    assert isinstance(launcher, _SubprocessScriptLauncher)
    with launched.terminate_ranks_together(trainer):
        started = [subprocess.Popen(["sh", "-c", c]) for c in ("exit 3", "exec sleep 600")]
        launcher.procs += started
    assert [process.returncode for process in started] == [3, -signal.SIGKILL]
    assert launcher.procs == []  # or Lightning would end this process for the 3
    assert launched._STARTED_BY not in os.environ


def launch_by_lightning(pid_file: Path) -> None:
    """For `prepare` of a job: remove torchrun's variables, and let Lightning start a rank that
    never joins this one."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK"):
        del os.environ[name]
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    launched._GRACE = 0.1
    script = f"echo $$ > {pid_file}; exec sleep 600"
    launching: Any = subprocess_script
    launching._basic_subprocess_cmd = lambda: ["sh", "-c", script]


def test_a_run_that_cannot_start_leaves_no_process(policy: Path, train: Path, tmp_path: Path):
    """The port of the process group is taken, by the job that this process belongs to."""
    arguments = fit_arguments(policy, train, tmp_path / "output", *DEVICES)
    prepare = partial(launch_by_lightning, tmp_path / "pid")
    with job("fit", *arguments, ranks=1, prepare=prepare) as running:
        (ended,) = running.wait()
    assert ended.status == 1
    assert "EADDRINUSE" in ended.err
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def start_a_rank(pid_file: Path) -> None:
    """Start a rank as Lightning does, by a fork instead of a new interpreter."""
    os.environ[launched._STARTED_BY] = str(os.getpid())
    if os.fork() == 0:
        os.environ["LOCAL_RANK"] = "1"
        trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
        with launched.terminate_ranks_together(trainer):
            pid_file.write_text(str(os.getpid()))
            time.sleep(600)
    time.sleep(600)


def test_a_rank_does_not_outlive_the_process_that_started_it(tmp_path: Path):
    pid_file = tmp_path / "pid"
    with job(ranks=1, prepare=partial(start_a_rank, pid_file)) as running:
        running.wait_for(lambda: pid_file.exists() and pid_file.read_text() != "")
        rank = psutil.Process(int(pid_file.read_text()))
        assert rank.is_running()
        running.signal(signal.SIGKILL)
        running.wait()
    wait_for(lambda: not rank.is_running(), seconds=60)


TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "-m")


def start(actions: str, *arguments: Any, by: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *by, "tests.support.failing_cli", actions, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks_of(output: Path) -> list[int]:
    """Ids of processes whose command line names an output directory."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(output) in (process.info["cmdline"] or []):
            found.append(process.pid)
    return found


@pytest.mark.slow  # imports twice, as do those below
@pytest.mark.parametrize(
    ("actions", "status", "message"),
    [
        ("0=fail,1=hang", 1, "error: this rank alone fails."),
        ("1=fail,0=hang", -signal.SIGKILL, "[rank 1] error: this rank alone fails."),
        ("0=fail,1=fail", 1, "error: this rank alone fails."),
        ("0=killed,1=hang", -signal.SIGKILL, "the process that started this rank has ended."),
    ],
)
def test_no_rank_is_left(
    actions: str, status: int, message: str, policy: Path, train: Path, tmp_path: Path
):
    options = (*DEVICES, "--data.num_workers", 1)
    process = start(actions, "fit", *fit_arguments(policy, train, tmp_path, *options))
    _, error = process.communicate(timeout=300)  # returns when all have closed the pipe
    assert process.returncode == status
    assert message in error
    assert "Traceback" not in error
    wait_for(lambda: not ranks_of(tmp_path), seconds=60)
    assert len(rows(tmp_path)) == 2


@pytest.mark.slow
def test_sigterm_to_the_launching_rank_saves_and_ends_all(
    policy: Path, train: Path, tmp_path: Path
):
    process = start("0=sigterm", "fit", *fit_arguments(policy, train, tmp_path, *DEVICES))
    _, error = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 3, which is saved" in error
    assert ranks_of(tmp_path) == []
    fit_on_ranks(policy, train, tmp_path, "--ckpt_path", "last")
    assert_runs_equal(tmp_path, fit_on_ranks(policy, train, tmp_path / "whole"))


@pytest.mark.slow
def test_torchrun_ends_the_others_of_a_killed_rank(policy: Path, train: Path, tmp_path: Path):
    arguments = fit_arguments(policy, train, tmp_path, *DEVICES)
    process = start("1=killed", "fit", *arguments, by=TORCHRUN)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "exitcode  : -9" in error  # printed by torchrun for the first that failed
    assert ranks_of(tmp_path) == []
    assert len(rows(tmp_path)) == 2


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_ends_all(policy: Path, train: Path, tmp_path: Path):
    options = ("--trainer.max_epochs", 10)
    arguments = fit_arguments(policy, train, tmp_path, *DEVICES, *options)
    process = start("0=sigterm_to_parent", "fit", *arguments, by=TORCHRUN)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1  # torchrun's own, for a signal
    ((step, _),) = list_checkpoints(tmp_path)
    assert 3 <= step < 60
    assert f"stopped by SIGTERM after step {step}, which is saved" in error
    assert ranks_of(tmp_path) == []
    fit_on_ranks(policy, train, tmp_path, *options, "--ckpt_path", "last")
    assert_runs_equal(tmp_path, fit_on_ranks(policy, train, tmp_path / "whole", *options))
