"""`benchmarks/linear_logps.py`: contestants with wrong results are not timed."""

import argparse
import importlib
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("linear_logps")


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("common")


def test_a_wrong_result_gets_no_time(benchmark, monkeypatch) -> None:
    eager = benchmark.eager.linear_logps

    def off_by_one_token(hidden, weight, targets):
        return eager(hidden, weight[1:], targets.clamp(min=1) - 1)

    def scores(*_, **__):
        return {"eager": eager, "ours": benchmark.ours(), "wrong": off_by_one_token}

    monkeypatch.setattr(benchmark, "contestants", scores)
    problem = benchmark.Problem.make((24, 16, 200), CPU, torch.float32)
    arguments = argparse.Namespace(rounds=3)
    rows = {row["contestant"]: row for row in benchmark.measure(problem, "frozen", CPU, arguments)}
    assert len(rows["ours"]["total_ms"].samples_ms) == 3
    assert rows["ours"]["gemms"] == rows["eager"]["gemms"] == 2
    assert rows["eager"]["error_over_eager"] == 1
    assert "total_ms" not in rows["wrong"]
    assert benchmark.as_text(rows["wrong"])["error"].startswith("wrong")
    benchmark.print_table([benchmark.as_text(row) for row in rows.values()])


def test_a_peer_that_fails_is_named_and_the_others_are_timed(
    benchmark, monkeypatch, capsys
) -> None:
    def failing(*_):
        raise RuntimeError("no room\nfor this")

    def scores(*_, **__):
        return {"eager": benchmark.eager.linear_logps, "ours": benchmark.ours(), "TRL": failing}

    monkeypatch.setattr(benchmark, "contestants", scores)
    problem = benchmark.Problem.make((24, 16, 200), CPU, torch.float32)
    arguments = argparse.Namespace(rounds=1)
    rows = {row["contestant"]: row for row in benchmark.measure(problem, "frozen", CPU, arguments)}
    assert "total_ms" in rows["ours"]
    assert "total_ms" not in rows["TRL"]
    assert "TRL fails: RuntimeError: no room\n" in capsys.readouterr().out
    monkeypatch.setattr(benchmark, "contestants", lambda *_: scores() | {"ours": failing})
    with pytest.raises(RuntimeError, match="no room"):
        list(benchmark.measure(problem, "frozen", CPU, arguments))


def test_paired_times(common) -> None:
    mine = common.Times(samples_ms=(1.0, 2.0, 10.0))
    theirs = common.Times(samples_ms=(2.0, 6.0, 10.0))
    assert mine.median_ms == 2
    assert mine.quantile_ms(0.75) == 6
    assert mine.speedup_over(theirs) == 2  # of 2, 3 and 1: not 6 / 2, the ratio of the medians
    order = []
    contestants = [
        common.Contestant(name=name, run=lambda name=name: order.append(name)) for name in "ab"
    ]
    times = common.time_paired(contestants, CPU, rounds=2, warmup=0)
    assert order == ["a", "b", "b", "a"]
    assert len(times["a"].samples_ms) == 2


def test_peak_memory(common) -> None:
    contestant = common.Contestant(name="", run=lambda: torch.zeros(32, 2**20))
    found = common.peak_memory_mib(contestant, CPU)
    if found is None:
        pytest.skip("this system does not tell")
    assert 120 < found < 200
