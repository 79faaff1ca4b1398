"""`benchmarks/scaling.py`: the sizes it measures, and costs at the floor's ratio to SFT."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZES = ["--length", "16", "48", "--batch", "2", "4", "--vocabulary", "64"]

pytestmark = pytest.mark.filterwarnings("ignore")  # of the counter's hooks


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("scaling")


def test_one_thing_changes_at_a_time(benchmark: ModuleType) -> None:
    options = benchmark.parse([*SIZES, "--prompt-share", "0.5", "0.25"])
    found = list(benchmark.points(options))
    first = benchmark.Point(length=16, batch=2, vocabulary=64, prompt_share=0.5)
    assert [changed for changed, _ in found] == [
        *("length", "length", "batch", "batch", "prompt_share", "prompt_share")
    ]
    assert [point for _, point in found].count(first) == 3
    assert found[1][1] == benchmark.Point(length=48, batch=2, vocabulary=64, prompt_share=0.5)


@pytest.mark.parametrize(("share", "num_prompt"), [(0.0, 1), (0.25, 4), (1.0, 15)])
def test_a_step_has_the_sizes_asked_for(benchmark, share: float, num_prompt: int) -> None:
    point = benchmark.Point(length=16, batch=3, vocabulary=64, prompt_share=share)
    step = benchmark.make_step(point, benchmark.torch.device("cpu"))
    (batch,) = step.micro_batches
    assert batch.prompt_lengths == [num_prompt] * 3
    assert batch.matched.lengths == [16] * 3
    assert step.num_tokens == 48
    mismatched = batch.mismatched.input_ids.view(3, -1)
    matched = batch.matched.input_ids.view(3, 16)[:, num_prompt:]
    assert mismatched.equal(matched.roll(1, 0))


def test_the_table_and_the_result_file(benchmark, tmp_path: Path, capsys, monkeypatch) -> None:
    shape = benchmark.SHAPES["small"]
    shape = benchmark.replace(shape, hidden_size=32, intermediate_size=64, num_layers=1)
    monkeypatch.setitem(benchmark.SHAPES, "small", shape)
    options = [*SIZES, "--prompt-share", "0.5", "--rounds", "2", "--device", "cpu"]
    options += ["--threads", "1", "--json", str(tmp_path / "scaling.json")]
    assert benchmark.main(options) == 0
    rows = json.loads((tmp_path / "scaling.json").read_text())["results"]
    assert [row["contestant"] for row in rows] == ["SFT", "computed", "cached"] * 4
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    for row, line in zip(rows, table[2:], strict=True):
        assert line.startswith(f"| {row['changed']} {row[row['changed']]} ")
        assert f" {row['operations_over_sft']:.3f} " in line
        assert len(row["samples_ms"]) == 2
    for sft, computed, cached in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert sft["operations_over_sft"] == sft["time_over_sft"] == 1
        # P = C: SFT 3P + 3C, cached C more, computed P + 2C more, in the decoder's matrices; the
        # head scores completions alone, attention looks back at prompts: a little more.
        assert 1.13 < cached["operations_over_sft"] < 1.3
        assert 1.6 < computed["operations_over_sft"] < 1.85
    short, long = rows[1], rows[4]
    assert (short["length"], long["length"]) == (16, 48)
    assert long["tera_operations"] > 3 * short["tera_operations"]  # attention grows faster
    assert rows[7]["tera_operations"] * 2 == pytest.approx(rows[10]["tera_operations"])
