"""OpenMP's threads sleep soon while they wait, unless their owner said otherwise."""

import os
import subprocess
import sys

import pytest

from kto_lightning.cli.waiting import SETTINGS, SPIN_COUNT, wait_passively
from tests.support.cli import ROOT


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in SETTINGS:
        monkeypatch.setenv(name, "")  # given back at the end
        monkeypatch.delenv(name)
    return monkeypatch


def test_they_sleep_soon_unless_told_otherwise(unset):
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    assert os.environ["GOMP_SPINCOUNT"] == str(SPIN_COUNT)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_owner_set_stays(name, unset):
    unset.setenv(name, "7")
    wait_passively()
    assert {each: os.environ.get(each) for each in SETTINGS} == {
        each: "7" if each == name else None for each in SETTINGS
    }


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP shows what it has read")
def test_the_command_line_settles_it_before_openmp_is_loaded(unset):
    unset.setenv("OMP_DISPLAY_ENV", "verbose")
    command = [sys.executable, "-m", "kto_lightning", "fit", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in done.stderr
