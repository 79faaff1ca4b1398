"""Ranks started by the first one or torchrun: when one fails, none is left running."""

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

from kto_lightning.strategies import launcher, parent
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


def trainer_of_two() -> Trainer:
    return Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)


def as_command(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let the ranks that are started run a shell script."""
    monkeypatch.setattr(sys, "executable", "sh")
    monkeypatch.setattr(sys, "orig_argv", ["", "-c", script])


@pytest.fixture
def launched_ranks(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that are started, in an environment without a launcher's variables."""
    started: list[subprocess.Popen[bytes]] = []

    def popen(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(launcher, "Popen", popen)
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return started


def test_ranks_get_their_variables_and_this_process_loses_them(
    launched_ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names = ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", parent.STARTED_BY)
    script = "; ".join(f"echo ${name} >> {tmp_path}/names" for name in names)
    as_command(monkeypatch, script)
    trainer = trainer_of_two()
    strategy: Any = trainer.strategy
    with launcher.launch_ranks(trainer):
        assert strategy.cluster_environment.creates_processes_externally
    assert [rank.returncode for rank in launched_ranks] == [0]
    found = (tmp_path / "names").read_text().split()
    assert found == ["1", "2", "0", "127.0.0.1", str(os.getpid())]
    assert not {*names, "MASTER_PORT"} & set(os.environ)


@pytest.mark.parametrize(("script", "status"), [("exit 3", 3), ("exec sleep 600", -signal.SIGKILL)])
def test_started_ranks_have_a_grace_period(
    script: str, status: int, launched_ranks, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launcher, "GRACE", 1.0)
    as_command(monkeypatch, script)
    with launcher.launch_ranks(trainer_of_two()):
        pass
    assert [rank.returncode for rank in launched_ranks] == [status]


def launch_by_itself(pid_file: Path) -> None:
    """For `prepare` of a job: remove torchrun's variables, and start a rank that never joins."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK"):
        del os.environ[name]
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    launcher.GRACE = 0.1
    sys.executable = "sh"
    sys.orig_argv = ["", "-c", f"echo $$ > {pid_file}; exec sleep 600"]


def test_a_run_that_cannot_start_leaves_no_process(policy: Path, train: Path, tmp_path: Path):
    """The port of the process group is taken, by the job that this process belongs to."""
    arguments = fit_arguments(policy, train, tmp_path / "output", *DEVICES)
    prepare = partial(launch_by_itself, tmp_path / "pid")
    with job("fit", *arguments, ranks=1, prepare=prepare) as running:
        (ended,) = running.wait()
    assert ended.status == 1
    assert "EADDRINUSE" in ended.err
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def launch_for_ever(script: str) -> None:
    """For `prepare` of a job: start a rank, then wait as in a collective."""
    for name in ("LOCAL_RANK", *(n for n in os.environ if n.startswith("TORCHELASTIC_"))):
        del os.environ[name]
    launcher.GRACE = 0.1
    sys.orig_argv = ["", "-c", script]
    with launcher.launch_ranks(trainer_of_two()):
        time.sleep(600)


ORPHAN = """
import os, sys, time
sys.path.insert(0, {root!r})
from kto_lightning.strategies.parent import end_with_parent
end_with_parent()
with open({file!r}, "w") as file:
    file.write(str(os.getpid()))
time.sleep(600)
"""


def test_a_rank_does_not_outlive_the_process_that_started_it(tmp_path: Path):
    pid_file = tmp_path / "pid"
    script = ORPHAN.format(root=str(ROOT), file=str(pid_file))
    with job(ranks=1, prepare=partial(launch_for_ever, script)) as running:
        running.wait_for(lambda: pid_file.exists() and pid_file.read_text() != "")
        rank = psutil.Process(int(pid_file.read_text()))
        assert rank.is_running()
        running.signal(signal.SIGKILL)
        running.wait()
    wait_for(lambda: not rank.is_running(), seconds=5)


def test_a_rank_whose_parent_has_ended_before_it_could_ask_ends_itself(monkeypatch):
    monkeypatch.setenv(parent.STARTED_BY, "1")
    monkeypatch.setattr(parent, "_PR_SET_PDEATHSIG", 0)  # this process goes on
    with pytest.raises(SystemExit, match="the process that started this rank has ended"):
        parent.end_with_parent()
    assert parent.STARTED_BY not in os.environ


def test_a_rank_that_fails_alone_ends_the_first(tmp_path: Path):
    with job(ranks=1, prepare=partial(launch_for_ever, "raise SystemExit(3)")) as running:
        (ended,) = running.wait()
    assert ended.status == 1
    assert "error: rank 1 of this machine has ended with exit status 3." in ended.err


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
        ("1=fail,0=hang", 1, "[rank 1] error: this rank alone fails."),
        ("0=fail,1=fail", 1, "error: this rank alone fails."),
        ("0=killed,1=hang", -signal.SIGKILL, ""),
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
