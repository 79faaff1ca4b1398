"""Commands whose stdout, stderr or stdin is closed, full or read by nobody."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import ROOT, fit, fit_arguments, rows

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


def run_shell(redirection: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """A command with a shell's redirections; `status` of the command, not of the pipe's reader."""
    command = shlex.join([sys.executable, "-m", "kto_lightning", *map(str, arguments)])
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} {redirection}"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "redirection", ["2>&1 | head -1", ">/dev/full 2>/dev/full", "<&- >&- 2>&-"]
)
def test_a_run_goes_on_without_its_output(
    redirection: str, policy: Path, train: Path, tmp_path: Path
):
    options = ("--trainer.max_steps", 2, "--data.num_workers", 1)
    ended = run_shell(redirection, "fit", *fit_arguments(policy, train, tmp_path, *options))
    assert ended.returncode == 0
    assert ended.stderr == ""
    assert len(rows(tmp_path)) == 2
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("redirection", "status", "error"),
    [
        ("| head -1", 0, ""),
        (">&-", 0, ""),
        (">/dev/full", 1, "error: the output cannot be written: No space left on device.\n"),
        (">/dev/full 2>&-", 1, ""),
    ],
)
def test_inspect_fails_only_where_its_output_is_lost(
    redirection: str, status: int, error: str, train: Path
):
    ended = run_shell(redirection, "inspect", train)
    assert (ended.returncode, ended.stderr) == (status, error)


@pytest.mark.parametrize("redirection", [">/dev/full 2>/dev/full", ">&- 2>&-", "2>&1 | true"])
def test_statuses_stay_where_messages_are_lost(redirection: str, tmp_path: Path):
    assert run_shell(redirection, "--help").returncode == 0
    assert run_shell(redirection, "unknown").returncode == 2
    assert run_shell(redirection, "report", tmp_path).returncode == 1


def test_what_a_terminal_cannot_show_is_replaced(tmp_path: Path):
    ended = subprocess.run(
        [sys.executable, "-m", "kto_lightning", "inspect", "λ.jsonl"],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert "\\u03bb.jsonl" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_report_does_not_need_its_output(policy: Path, train: Path, tmp_path: Path):
    output = fit(policy, train, tmp_path / "run", "--trainer.max_steps", 1)
    (output / "report.html").unlink()
    assert run_shell(">/dev/full", "report", output).returncode == 0
    assert (output / "report.html").exists()
