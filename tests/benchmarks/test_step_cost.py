"""`benchmarks/step_cost.py`: our step is at its floor, below TRL's, and cheaper with a cache."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL, Lightning and the counter's hooks


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("step_cost")


@pytest.fixture(scope="module")
def result(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    shape = importlib.import_module("inputs").Shape(
        hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, vocabulary=512
    )
    settings = benchmark.Settings(shape=shape, num_records=8, batch_size=4, max_length=64, words=12)
    records = benchmark.made_records(8, words=12, prompt_share=0.5)
    return benchmark.measure("made", records, settings, tmp_path_factory.mktemp("cost") / "made")


@pytest.fixture(scope="module")
def rows(result: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {
        (row["contestant"], row["reference"], row["micro_batches"]): row for row in result["rows"]
    }


SETTINGS = [(r, m) for r in ("computed", "cached") for m in ("one", "several")]


@pytest.mark.parametrize(("reference", "micro_batches"), SETTINGS)
def test_ours_is_at_its_floor(rows, reference: str, micro_batches: str) -> None:
    row = rows["ours", reference, micro_batches]
    # Nothing counted may be missing either: a step cannot cost less than its floor.
    assert 1 <= row["over_floor"] <= 1.03


@pytest.mark.parametrize(("reference", "micro_batches"), SETTINGS)
def test_ours_costs_less_than_trl(rows, reference: str, micro_batches: str) -> None:
    ours, compact, trl = (
        rows[contestant, reference, micro_batches]["over_sft"]
        for contestant in ("ours", "TRL, completions only", "TRL")
    )
    assert ours < compact < trl


def test_the_two_units(result: dict[str, Any]) -> None:
    """SFT that scores completions alone saves the head on prompts and on each last token."""
    saved = result["sft_operations"] - result["sft_completions_operations"]
    # An empty prompt would leave its first completion token unscored; the made ones never are.
    rows = result["prompt_tokens"]
    assert saved == 3 * rows * 2 * 32 * 512


def test_what_a_cache_and_one_micro_batch_save(rows) -> None:
    for contestant in ("ours", "TRL", "TRL, completions only"):
        for micro_batches in ("one", "several"):
            computed = rows[contestant, "computed", micro_batches]["operations"]
            assert rows[contestant, "cached", micro_batches]["operations"] < computed
    for reference in ("computed", "cached"):
        one = rows["ours", reference, "one"]["operations"]
        assert one < rows["ours", reference, "several"]["operations"]


def test_sft_is_counted_as_the_formula_says(benchmark: ModuleType, result, tmp_path: Path) -> None:
    """Forward and backward of whole sequences, the head on every position."""
    runs = importlib.import_module("step_runs")
    shape = runs.Shape(hidden_size=32, intermediate_size=64, num_layers=2, vocabulary=512)
    records = benchmark.made_records(2, words=12, prompt_share=0.5)
    directory = benchmark.save_model(tmp_path, records, shape)
    model = benchmark.AutoModelForCausalLM.from_pretrained(directory)
    unit = benchmark.UnitCosts.of(model)
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64  # q and o, k and v, the three of the MLP
    assert unit.token == 2 * 2 * layer
    with runs.counter() as counted:
        ids = torch.arange(20)[None]
        model(input_ids=ids, labels=ids).loss.backward()
    expected = 3 * 20 * (unit.token + unit.scored) + 3.5 * unit.pair * 20**2
    assert counted.get_total_flops() == pytest.approx(expected, rel=5e-3)  # rotary positions


def test_the_table_and_the_result_file(benchmark: ModuleType, result, tmp_path, capsys) -> None:
    benchmark.print_result(result)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(result["rows"]) == 14
    benchmark.write_result(tmp_path / "cost.json", {"torch": torch.__version__}, [result])
    written = json.loads((tmp_path / "cost.json").read_text())["results"][0]
    assert written["rows"] == result["rows"]
    assert written["prompt_tokens"] < written["tokens"]
