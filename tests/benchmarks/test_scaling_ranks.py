"""`benchmarks/scaling_ranks.py`: its ideals worked by hand, two ranks beside them, its table."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.cli import small_data, small_model

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("scaling_ranks")


@pytest.mark.parametrize(
    ("strategy", "ranks", "replicas", "expected"),
    [
        ("ddp", 1, 1, 0),
        ("ddp", 4, 1, 2 * 100 * 3 / 4),
        # Policy: three times 80 and once 20; reference: twice and once; gradients: 100.
        ("fsdp2", 2, 1, (260 + 180 + 100) / 2),
        ("fsdp2", 4, 1, 540 * 3 / 4),
        # Half of it within two groups of two, and half of the gradients between them.
        ("hybrid", 4, 2, 540 / 2 + 2 * 50 / 2),
    ],
)
def test_the_ideal_of_bytes_sent_worked_by_hand(
    benchmark: ModuleType, strategy: str, ranks: int, replicas: int, expected: float
) -> None:
    case = benchmark.Case(strategy=strategy, ranks=ranks, replicas=replicas)
    assert benchmark.ideal_bytes(case, layers=80, rest=20) == expected


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_do_half_each_and_send_what_they_must(
    benchmark: ModuleType, strategy: str, tmp_path: Path
) -> None:
    inputs = {"model": small_model(tmp_path / "model"), "train": small_data(tmp_path / "t.jsonl")}
    one, two = (
        benchmark.measure(benchmark.Case(strategy=strategy, ranks=ranks), inputs, 12)
        for ranks in (1, 2)
    )
    assert two["operations"] == pytest.approx(one["operations"] / 2, rel=0.05)
    ideal = benchmark.ideal_bytes(
        benchmark.Case(strategy=strategy, ranks=2), layers=two["layers"], rest=two["rest"]
    )
    # Beside weights and gradients a step sends sums of its metrics, and FSDP2 one layer once more.
    assert ideal <= two["sent"] <= 1.2 * ideal


@pytest.mark.slow
def test_the_table_has_a_row_for_every_strategy(benchmark: ModuleType) -> None:
    rows = benchmark.memory_table()
    assert len(rows) == 20
    of_seven = {row["strategy"]: row for row in rows[:5]}
    assert of_seven["fsdp2_hybrid"]["16 GPUs"] == of_seven["fsdp2"]["8 GPUs"]
    assert of_seven["ddp"]["8 GPUs"] == of_seven["ddp"]["16 GPUs"]
    docs = (BENCHMARKS.parent / "docs" / "many_gpus.md").read_text(encoding="utf-8")
    for row in rows:
        cells = [f"| {row['model']} ", *(row[k] for k in ("8 GPUs", "16 GPUs"))]
        assert any(all(cell in line for cell in cells) for line in docs.splitlines()), row
