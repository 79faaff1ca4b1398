"""`benchmarks/throughput.py`: all train on the same, and different work gets no ratio."""

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZE = ["--hidden", 32, "--intermediate", 64, "--layers", 2, "--vocabulary", 512, "--words", 20]
RUN = ["--batch-size", 4, "--max-length", 64, "--steps", 3, "--warmup", 1, "--turn", 1]

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL, Lightning and peft


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("throughput")


def run(benchmark: ModuleType, json_file: Path, *options: Any) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))  # handed on to the contestants
        patch.setenv("HF_DATASETS_CACHE", "")  # set by the script, given back here
        arguments = [*SIZE, *RUN, "--threads", 1, "--device", "cpu", "--json", json_file, *options]
        assert benchmark.main([str(argument) for argument in arguments]) == 0
    return json.loads(json_file.read_text())


def check(result: dict[str, Any]) -> None:
    assert result["disagreement"] is None
    ours, theirs = result["rows"]["ours"], result["rows"]["TRL"]
    for row in (ours, theirs):
        assert len(row["steps"]) == 4
        # The same median, since the timed steps are an odd number.
        assert row["examples_per_second"] == pytest.approx(4000 / row["step_ms"])
        assert row["step_ms_10"] <= row["step_ms"] <= row["step_ms_90"]
        assert row["cpu_ms"] > 0
        assert row["idle_mib"] > 100  # torch alone
        assert all(step["num_tokens"] > 4 for step in row["steps"])
        peaks = [step["peak_mib"] for step in row["steps"]]
        assert peaks == sorted(peaks)
        assert row["peak_mib"] == peaks[-1] > 0
    for mine, other in zip(ours["steps"], theirs["steps"], strict=True):
        assert mine["num_tokens"] == other["num_tokens"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert mine["logps"] == pytest.approx(other["logps"], rel=1e-4)
        assert mine["logps"]
        assert mine["floor_operations"] > 0
    assert math.isfinite(result["speedup"])
    assert result["memory_share"] == ours["peak_mib"] / theirs["peak_mib"]


def test_three_processes_train_on_the_same_in_turn(benchmark, tmp_path: Path, capsys) -> None:
    content = run(benchmark, tmp_path / "throughput.json", "--reference", "computed", "--sft")
    (result,) = content["results"]
    assert result["reference"] == "computed"
    check(result)
    assert content["header"]["threads"] == 1
    assert json.loads(content["header"]["settings"])["shape"]["hidden_size"] == 32
    printed = capsys.readouterr().out.splitlines()
    table = [line for line in printed if line.startswith("|")]
    assert len(table) == 5
    for line, (name, row) in zip(table[2:], result["rows"].items(), strict=True):
        assert f" {name} " in line
        assert f" {row['cpu_ms']:.0f} " in line
    assert printed[-2].startswith(f"computed: ours takes {result['speedup']:.2f} times")
    over = result["time_over_sft"]
    assert printed[-1].startswith(f"computed: a step takes {over:.2f} times the time of TRL's SFT")
    sft, ours = result["rows"]["TRL SFT"]["steps"], result["rows"]["ours"]["steps"]
    assert [step["num_tokens"] for step in sft] == [step["num_tokens"] for step in ours]
    assert len({step["loss"] for step in sft}) == len(sft)
    assert all(step["loss"] > 0 for step in sft)


@pytest.mark.slow
def test_cached_and_with_an_adapter(benchmark, tmp_path: Path) -> None:
    content = run(benchmark, tmp_path / "throughput.json", "--lora")
    assert [result["reference"] for result in content["results"]] == ["computed", "cached"]
    for result in content["results"]:
        check(result)
    computed, cached = (r["rows"]["ours"]["steps"] for r in content["results"])
    for whole, rest in zip(computed, cached, strict=True):
        assert rest["floor_operations"] < whole["floor_operations"]


def made_lines(benchmark: ModuleType) -> dict[str, Any]:
    """Three steps each of two contestants that agree."""
    contestants, race = (importlib.import_module(name) for name in ("contestants", "race"))
    step = contestants.Step(
        seconds=0.5,
        cpu_seconds=0.4,
        peak_mib=100.0,
        loss=0.5,
        logps={"desirable": -80.0, "undesirable": -90.0},
        num_tokens=64,
        floor_operations=1e9,
    )
    slower = replace(step, seconds=2.0, cpu_seconds=1.2, peak_mib=400.0, floor_operations=None)
    lines = {benchmark.OURS: [step] * 3, benchmark.TRL: [slower] * 3}
    return {name: race.Measurements(idle_mib=300.0, steps=steps) for name, steps in lines.items()}


def test_the_ratios(benchmark: ModuleType) -> None:
    result = benchmark.compare(made_lines(benchmark), benchmark.parse(["--device", "cpu"]))
    assert result["speedup"] == pytest.approx(4)
    assert result["cpu_speedup"] == pytest.approx(3)
    assert result["memory_share"] == 0.25
    assert result["rows"]["ours"]["examples_per_second"] == 16
    assert result["rows"]["TRL"]["tokens_per_second"] == 32


def test_the_ratios_with_sft(benchmark: ModuleType) -> None:
    lines = made_lines(benchmark)
    faster = [replace(step, seconds=0.25, logps={}) for step in lines[benchmark.OURS].steps]
    lines[benchmark.SFT] = replace(lines[benchmark.OURS], steps=faster)
    result = benchmark.compare(lines, benchmark.parse(["--device", "cpu"]))
    assert result["time_over_sft"] == pytest.approx(2)
    assert result["trl_time_over_sft"] == pytest.approx(8)
    assert result["speedup"] == pytest.approx(4)
    faster[1] = replace(faster[1], num_tokens=65)
    result = benchmark.compare(lines, benchmark.parse(["--device", "cpu"]))
    assert result["disagreement"] == "step 2: 64 tokens, SFT's 65"
    assert "time_over_sft" not in result


@pytest.mark.parametrize(
    "change",
    [
        {"loss": 0.51},
        {"loss": math.nan},
        {"logps": {"desirable": -80.0, "undesirable": -90.1}},
        {"logps": {"desirable": -80.0}},
        {"num_tokens": 65},
    ],
    ids=["loss", "nan", "logps", "class", "tokens"],
)
def test_no_ratio_of_different_work(benchmark, monkeypatch, capsys, tmp_path, change) -> None:
    """One step that differs, even in the warm-up: no ratio, and exit status 1."""
    lines = made_lines(benchmark)
    theirs = lines[benchmark.TRL]
    theirs.steps[0] = replace(theirs.steps[0], **change)
    options = benchmark.parse(["--device", "cpu"])
    result = {"reference": "computed"} | benchmark.compare(lines, options)
    assert result["disagreement"].startswith("step 1: ")
    assert "speedup" not in result
    monkeypatch.setattr(benchmark, "measure", lambda *_: [result])
    monkeypatch.setenv("HF_DATASETS_CACHE", "")
    assert benchmark.main(["--device", "cpu", "--json", str(tmp_path / "result.json")]) == 1
    assert "no ratio" in capsys.readouterr().out
    assert "speedup" not in (tmp_path / "result.json").read_text()


def test_a_contestant_that_fails_says_why(benchmark, monkeypatch, capsys, tmp_path) -> None:
    """A bad record: the error of the process is reported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("HF_DATASETS_CACHE", "")
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "a", "completion": "b", "label": "perhaps"}\n')
    options = [*SIZE, *RUN, "--threads", 1, "--device", "cpu", "--data", data]
    assert benchmark.main([str(option) for option in options]) == 1
    assert "'label'" in capsys.readouterr().err


def test_a_published_shape_can_be_cut(benchmark: ModuleType) -> None:
    shape = benchmark.shape_of(benchmark.parse(["--shape", "qwen2.5-7b", "--layers", "2"]))
    assert (shape.hidden_size, shape.vocabulary, shape.tied) == (3584, 152064, False)
    assert shape.num_layers == 2


def test_load_lasts_as_long_as_its_block() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        load = importlib.import_module("load")
    before = set(psutil.Process().children())  # of the races of other tests
    with load.busy_processes(2):
        started = set(psutil.Process().children()) - before
        assert len(started) == 2
    assert not any(psutil.pid_exists(process.pid) for process in started)
