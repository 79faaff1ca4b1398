"""Steps on a device that does not exist: no tensor is left on the CPU, and nothing waits."""

import subprocess
import sys

import pytest

from tests.support.cli import ROOT
from tests.support.factories import ARCHITECTURES
from tests.support.families import FAMILIES

EVERYDAY = ["qwen2", "lora", "lfm2", "padded"]
WAITING = {
    "jetmoe": "its experts' tokens are counted on the host",
    "falcon": "it indexes with a list, which is copied to the device",
    "xlnet": "it reads text both ways, which no route takes",
}
"""Models whose own code does."""
OTHERS = [kind for kind in ARCHITECTURES | FAMILIES if kind not in {*EVERYDAY, *WAITING}]


@pytest.mark.parametrize(
    "kinds", [EVERYDAY, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["everyday", "others"]
)
def test_forwards_and_losses(kinds: list[str]) -> None:
    command = [sys.executable, "-m", "tests.gpu.fake_device", *kinds]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    lines = dict(line.split(": ") for line in ended.stdout.splitlines())
    assert list(lines) == kinds
    if kinds == EVERYDAY:
        varlen = "packed by the variable-length kernel, runs"
        expected = {"qwen2": varlen, "lora": varlen, "lfm2": "cached, runs"}
        assert lines == expected | {"padded": "padded, runs"}
