"""`benchmarks/long_sequences.py`: what is counted without data is what a real step takes."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = pytest.mark.filterwarnings("ignore")  # of the counter's hooks


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("long_sequences")


@pytest.fixture
def tiny(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = benchmark.Shape(hidden_size=32, intermediate_size=64, num_layers=2, vocabulary=128)
    monkeypatch.setitem(benchmark.SHAPES, "small", shape)


def test_bytes_are_tracked_while_their_tensors_live(benchmark: ModuleType) -> None:
    with benchmark.TrackedMemory() as memory:
        first = torch.ones(100)
        view = first.view(10, 10)
        second = first + 1
        assert memory.alive == 800
        del first, second
        assert memory.alive == 400  # the view holds it
        del view
        assert memory.alive == 0
        assert memory.peak == 800
        memory.reset_peak()
        assert memory.peak == 0


@pytest.mark.usefixtures("tiny")
def test_counts_without_data_are_those_with(benchmark: ModuleType, capsys) -> None:
    assert benchmark.main(["--real", "64", "--prompt", "0.75"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 6
    assert all(line.count(line.split("|")[3].strip()) >= 2 for line in lines[2:])


@pytest.mark.usefixtures("tiny")
def test_kept_memory_grows_with_the_length_and_checkpointing_saves_it(
    benchmark: ModuleType, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "SHORT", 256)
    options = ["--shape", "small", "--tokens", "512"]
    assert benchmark.main([*options, "--json", str(tmp_path / "long.json")]) == 0
    results = json.loads((tmp_path / "long.json").read_text())["results"]
    kept = {
        (one["checkpointing"], one["tokens"]): one["parts"]["forward"]["kept_bytes"]
        for one in results
    }
    assert kept[False, 512] / kept[False, 256] == pytest.approx(2, rel=0.01)
    assert kept[True, 512] < kept[False, 512] / 3
    assert len([line for line in capsys.readouterr().out.splitlines() if "small" in line]) == 4


def test_bytes_sent_worked_by_hand(benchmark: ModuleType) -> None:
    shape = benchmark.Shape(hidden_size=64, num_layers=3, num_heads=8, num_kv_heads=2)
    sent = benchmark.sent_bytes(shape, 1000, 4)
    # Heads of 8 numbers, bfloat16, 3 layers; three quarters go to other ranks.
    assert sent["ring"] == 1000 * 2 * 2 * 8 * 2 * 3 * 0.75
    assert sent["ulysses"] == 250 * (8 + 2 + 2 + 8) * 8 * 2 * 3 * 0.75
