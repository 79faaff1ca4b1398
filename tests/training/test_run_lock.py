"""One OUTPUT, one run: who holds it is named, and what a killed run left is taken over."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kto_lightning.errors import ConfigError
from kto_lightning.training import run_lock as locks
from kto_lightning.training.run_lock import NAME, Holder, is_running, run_lock, this_process
from tests.support.cli import EVERY_STEP, LAST, fit, fit_arguments, rows
from tests.support.comparison import assert_runs_equal
from tests.support.faults import call_in_step
from tests.support.ranks import job

HOLD = """
import os, sys, time
from kto_lightning.training.run_lock import run_lock
with run_lock(sys.argv[1]):
    child = os.fork() if "fork" in sys.argv else 1
    if child:
        print("held", flush=True)
    time.sleep(60)
"""


def hold(output: Path, *options: str) -> subprocess.Popen[str]:
    """A process that holds the lock until it is killed."""
    command = [sys.executable, "-c", HOLD, str(output), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.stdout.close()
    return process


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    monkeypatch.setattr(locks, "WATCHED", 0.4)


def content(output: Path) -> dict[str, Any]:
    return json.loads((output / NAME).read_text())


def leave(output: Path, **changes: Any) -> None:
    """A lock file without a lock, as a killed process leaves it."""
    own = this_process()
    found = {"pid": own.pid, "host": own.host, "started": own.started, "job": None}
    (output / NAME).write_text(json.dumps(found | changes))


def test_a_held_lock_names_its_holder_and_a_killed_holder_is_replaced(tmp_path: Path):
    output = tmp_path / "a" / "b"
    holder = hold(output)
    try:
        with pytest.raises(ConfigError, match=f"process {holder.pid} on host "), run_lock(output):
            pass
        assert content(output)["pid"] == holder.pid
        known = Holder(**content(output))
        assert is_running(output, known)
    finally:
        holder.kill()
        holder.wait()
    assert (output / NAME).exists()
    assert not is_running(output, known)
    with run_lock(output):
        assert content(output)["pid"] == os.getpid()
    assert not tmp_path.joinpath("a", "b", NAME).exists()


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_run(tmp_path: Path):
    holder = hold(tmp_path, "fork")
    holder.kill()
    holder.wait()
    with run_lock(tmp_path):  # its child still runs, and ends by itself
        pass


def test_directories_made_for_a_lock_alone_are_removed(tmp_path: Path):
    with run_lock(tmp_path / "a" / "b"):
        pass
    assert not list(tmp_path.iterdir())
    with run_lock(tmp_path / "a"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": 2**22 + 1},  # no such process
        {"started": "another start of the same id"},
        {"host": "elsewhere"},  # not renewed any more
        {"pid": "x"},
    ],
)
def test_a_stale_lock_is_taken_over(changes: dict[str, Any], tmp_path: Path):
    leave(tmp_path, **changes)
    with run_lock(tmp_path):
        assert content(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("garbage", [b"", b"\0" * 50, b"[" * 9999, b'{"pid": 1e999}', b"\xff"])
def test_a_damaged_lock_file_is_taken_over(garbage: bytes, tmp_path: Path):
    (tmp_path / NAME).write_bytes(garbage)
    with run_lock(tmp_path):
        pass


def test_a_run_on_another_host_is_noticed_by_its_renewals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    leave(tmp_path, host="elsewhere", job="7")
    times = iter(range(1000))
    monkeypatch.setattr(locks, "_changed", lambda path: next(times))
    with pytest.raises(ConfigError, match="on host elsewhere"), run_lock(tmp_path):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # requeued by SLURM: its former process has ended
    with run_lock(tmp_path):
        assert content(tmp_path)["job"] == "7"


def test_a_held_lock_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(locks, "RENEWED_EVERY", 0.02)
    with run_lock(tmp_path):
        os.utime(tmp_path / NAME, (0, 0))
        until = time.monotonic() + 10
        while (tmp_path / NAME).stat().st_mtime == 0:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_a_pipe_in_place_of_the_lock_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(ConfigError, match=r"run\.lock is not a regular file"), run_lock(tmp_path):
        pass


def wait_in_step_two() -> None:
    """For `prepare` of a job: stop for a signal in step 2."""
    call_in_step(lambda: signal.sigtimedwait([signal.SIGCONT], 60), 2, "training_step")


def block_signal_and_wait_in_step_two() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCONT])
    wait_in_step_two()


def test_of_two_runs_into_one_directory_one_is_refused(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole = fit(policy, train, tmp_path / "whole", *EVERY_STEP)
    capsys.readouterr()
    output = tmp_path / "run"
    command = ("fit", *fit_arguments(policy, train, output, *EVERY_STEP))
    with job(*command, ranks=1, prepare=block_signal_and_wait_in_step_two) as running:
        running.wait_for(lambda: (output / "checkpoints" / "step=1.ckpt").exists())
        before = sorted(output.rglob("*"))
        for resume in ((), LAST):
            fit(policy, train, output, *EVERY_STEP, *resume, status=2)
            error = capsys.readouterr().err
            assert f"is in use by a run: process {running.processes[0].pid} on host" in error
            assert "Traceback" not in error
        assert sorted(output.rglob("*")) == before
        running.signal(signal.SIGCONT)
        (ended,) = running.wait()
    assert ended.status == 0
    assert_runs_equal(output, whole)
    assert not (output / NAME).exists()


def test_two_runs_started_at_once_leave_one(policy: Path, train: Path, tmp_path: Path):
    command = ("fit", *fit_arguments(policy, train, tmp_path / "run"))
    with job(*command, ranks=1) as one, job(*command, ranks=1) as other:
        (first,), (second,) = one.wait(), other.wait()
    assert sorted([first.status, second.status]) == [0, 2], first.err + second.err
    refused = first if first.status else second
    # Refused because of the other's lock or, if that has just ended, of its results.
    assert "is in use by a run: process" in refused.err or "holds an earlier run" in refused.err
    assert "Traceback" not in refused.err
    assert len(rows(tmp_path / "run")) == 6
