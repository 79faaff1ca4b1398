"""`benchmarks/startup.py`: a process is timed until training would begin."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = pytest.mark.filterwarnings("ignore")  # of step_runs' imports


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))  # kept: the script imports when it needs to
        yield importlib.import_module("startup")


def check(reading: dict[str, float]) -> None:
    assert 0 < reading["imports_s"] < reading["step_s"]
    assert 0 < reading["imports_cpu_s"] < reading["step_cpu_s"]


def made_inputs(tmp_path: Path):
    inputs, step_runs = (importlib.import_module(name) for name in ("inputs", "step_runs"))
    records = inputs.made_records(8, words=10, prompt_share=0.5)
    shape = inputs.Shape(hidden_size=16, intermediate_size=32, num_layers=1, vocabulary=512)
    return step_runs.Inputs(
        model=inputs.save_model(tmp_path / "model", records, shape),
        train=inputs.write_jsonl(tmp_path / "train.jsonl", records),
    )


def test_a_run_is_timed_at_its_first_step(benchmark, tmp_path: Path) -> None:
    """`fit` got to its summary and data report, and no further."""
    check(benchmark.run_once(benchmark.OURS, made_inputs(tmp_path), tmp_path))
    assert (tmp_path / "output" / "data_report.json").is_file()
    assert (tmp_path / "caches_ours").is_dir()
    assert not (tmp_path / "output" / "model").exists()


@pytest.mark.slow
def test_the_table_and_the_result_file(benchmark, tmp_path: Path, capsys) -> None:
    options = ["--records", "16", "--words", "10", "--json", str(tmp_path / "startup.json")]
    assert benchmark.main(options) == 0
    rows = json.loads((tmp_path / "startup.json").read_text())["results"]
    assert [row["contestant"] for row in rows] == ["ours", "ours, again", "TRL"]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    for row, line in zip(rows, table[2:], strict=True):
        assert row["records"] == 16
        check(row)
        assert line.startswith(f"| {row['contestant']} ")
        assert f" {row['step_s']:.1f} " in line


@pytest.mark.slow
def test_a_run_that_does_not_reach_a_step_says_why(benchmark, tmp_path: Path) -> None:
    inputs = made_inputs(tmp_path)
    inputs.train.write_text('{"prompt": "a", "completion": "b", "label": "perhaps"}\n')
    with pytest.raises(SystemExit, match=r"did not reach its first step(.|\n)*'label'"):
        benchmark.run_once(benchmark.OURS, inputs, tmp_path)
