"""The benchmark of z0: its statistics against numbers worked by hand, and a run on tiny sizes."""

import importlib
import json
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.factories import make_tokenizer, plain_records, save_model, write_jsonl

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning


def _module(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def statistics() -> ModuleType:
    return _module("estimator_statistics")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return _module("reference_point")


def test_means_of_whole_batches(statistics: ModuleType):
    values = np.array([3.0, -1.0, 4.0, -2.0, 100.0])
    order = np.array([0, 2, 1, 3, 4])
    means = statistics.batch_means(values, order, 2)
    assert means.tolist() == [3.5, -1.5]


def test_an_estimate_by_hand(statistics: ModuleType):
    # Log-ratios 3, −1, 4, −2: E = 1. Pairs (3, 4) and (−1, −2): means 3.5 and −1.5, clamped 3.5
    # and 0. Deviations of ±2.5 and ±1.75 from their own means, over n − 1 = 1.
    row = statistics.estimate(np.array([3.5, -1.5]), size=2, sigma=math.sqrt(26 / 3), truth=1.0)
    assert row.se == pytest.approx(math.sqrt(2 * 2.5**2))
    assert row.se_clamped == pytest.approx(math.sqrt(2 * 1.75**2))
    assert row.se_independent == pytest.approx(math.sqrt(13 / 3))
    assert row.bias == pytest.approx(0.75)  # (3.5 + 0) / 2 − 1
    assert row.rmse == pytest.approx(math.sqrt((2.5**2 + 1.0**2) / 2))
    assert row.num_batches == 2


def test_the_clamp_is_biased_where_the_mean_is_negative_too(statistics: ModuleType):
    row = statistics.estimate(np.array([1.0, -5.0]), size=1, sigma=1.0, truth=-2.0)
    assert row.bias == 0.5  # (1 + 0) / 2 − max(0, −2)


def test_a_difference_by_hand(statistics: ModuleType):
    # Differences 1, 2, 3: mean 2, standard deviation 1. Of the 8 ways to sign them only + + + and
    # − − − take the sum as far as 6.
    found = statistics.paired_difference([10.0, 20.0, 30.0], [11.0, 22.0, 33.0])
    assert found.mean == pytest.approx(2.0)
    assert found.se == pytest.approx(1 / math.sqrt(3))
    assert found.p == 2 / 8
    assert found.is_noise


def test_signs_that_cancel(statistics: ModuleType):
    # 1, −1, 2: sums of ±1 ±1 ±2 are ±4 once each, ±2 twice each and 0 twice; |2| or more: 6 of 8.
    assert statistics.paired_difference([0.0] * 3, [1.0, -1.0, 2.0]).p == 6 / 8
    assert statistics.paired_difference([1.5, 2.5], [1.5, 2.5]).p == 1.0
    # Sums that are equal but for rounding: all signs alike are 2 of 2^6 ways.
    tenths = statistics.paired_difference([0.0] * 6, [0.1, 0.2, 0.3, 0.1, 0.2, 0.3])
    assert tenths.p == 2 / 64
    assert not tenths.is_noise


@pytest.mark.parametrize("pairs", [1, 17])
def test_too_few_or_too_many_pairs(statistics: ModuleType, pairs: int):
    with pytest.raises(ValueError, match=f"got {pairs}"):
        statistics.paired_difference([0.0] * pairs, [1.0] * pairs)


def test_the_verdict_says_noise_where_it_is(statistics: ModuleType):
    verdict = _module("estimator_tables").verdict
    noise = verdict(statistics.Difference(mean=0.02, se=0.05, p=0.6), 4.0, 6)
    assert (
        noise == "Held-out margin: within noise over 6 seeds (+0.0200 ± 0.0500 nats, +0.5% of it)."
    )
    lower = verdict(statistics.Difference(mean=-0.4, se=0.05, p=0.03125), 4.0, 6)
    assert "lower with z0 over micro-batches of 2 (-0.4000 ± 0.0500 nats, -10.0% of it)" in lower


def test_z0_is_followed_by_stretch():
    runs = _module("estimator_runs")
    rows: list[Any] = [{"z0": float(step)} for step in range(4)]
    ours = [runs.Run(train=rows), runs.Run(train=[{"z0": row["z0"] + 2.0} for row in rows])]
    theirs = [SimpleNamespace(micro_z0s=[[1.0, 3.0]] * 4), SimpleNamespace(micro_z0s=[[4.0]] * 4)]
    comparison = _module("estimator_comparison")
    path = comparison.z0_path({comparison.OURS: ours, comparison.THEIRS: theirs})
    assert [(row["from"], row["to"]) for row in path] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert [row["whole"] for row in path] == [1.0, 2.0, 3.0, 4.0]  # seeds 0, 2; 1, 3; …
    assert path[0]["whole_se"] == pytest.approx(1.0)  # 0 and 2: √2 / √2
    assert path[0]["micro"] == 3.0  # of 2 and 4
    assert path[0]["micro_spread"] == 0.5  # of 1, 3: 1; of 4 alone: 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "somewhere"],
        ["--seeds", "1"],
        ["--steps", "7"],
        ["--accumulation", "0"],
        ["--processes", "0"],
    ],
)
def test_wrong_usage(benchmark: ModuleType, arguments: list[str], capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.parse(arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_run_on_tiny_sizes(benchmark: ModuleType, tmp_path: Path, monkeypatch, capsys):
    # This process belongs to all tests.
    monkeypatch.setattr(benchmark, "set_up_process", lambda: None)
    tokenizer = make_tokenizer()
    model = save_model(tmp_path / "model", "llama", tokenizer)
    data = write_jsonl(tmp_path / "tiny.jsonl", plain_records(40))
    result_file = tmp_path / "result.json"
    arguments = ["--model", model, "--data", data, "--json", result_file, "--held-out", 0.5]
    arguments += ["--steps", 4, "--seeds", 2, "--accumulation", 4, "--sizes", 1, 2, 8, 16]
    arguments += ["--learning-rate", 1e-3, "--processes", 1]
    assert benchmark.main([str(argument) for argument in arguments]) == 0

    written = json.loads(result_file.read_text())
    assert written["header"]["seeds"] == [0, 1]
    (result,) = written["results"]
    first = result["estimates"]
    assert first["log_ratios"] == 40 * benchmark.NUM_PAIRINGS
    assert [row["size"] for row in first["rows"]] == [1, 2, 8]  # 16 would leave 2 batches
    one = first["rows"][0]
    # Over single examples every epoch sees the whole data set: its own spread, and no more.
    assert one["se"] == pytest.approx(first["sigma"], rel=1e-2)
    assert one["se_independent"] == pytest.approx(first["sigma"])
    for row in first["rows"]:
        assert row["bias"] >= -1e-9
        assert row["rmse"] ** 2 == pytest.approx(
            row["bias"] ** 2 + row["se_clamped"] ** 2, rel=1e-2
        )

    (comparison,) = result["comparisons"]
    assert comparison["batch_size"] == 8
    differences = {row["metric"]: row["difference"]["mean"] for row in comparison["rows"]}
    assert all(math.isfinite(mean) for mean in differences.values())
    assert differences["training loss, last quarter"] != 0.0, "the contestants train differently"
    assert written["header"]["torch"] == torch.__version__
    assert "Held-out margin:" in capsys.readouterr().out


def test_the_seed_draws_the_order_and_the_start_is_one(tmp_path: Path):
    runs = _module("estimator_runs")
    model = save_model(tmp_path / "model", "llama", make_tokenizer())
    settings = runs.Settings(
        model=model,
        train=write_jsonl(tmp_path / "tiny.jsonl", plain_records(40)),
        batch_size=8,
        steps=2,
        beta=0.1,
        learning_rate=1e-3,
        max_length=1024,
        held_out=0.5,
    )
    ours, theirs, again, other = (
        runs.train((name, settings, seed))
        for name, seed in zip([*runs.CONTESTANTS] * 2, (0, 0, 0, 1), strict=True)
    )
    assert ours.train[0]["logps/desirable"] == theirs.train[0]["logps/desirable"]
    assert ours.held_out[0]["tokens"] == theirs.held_out[0]["tokens"]
    assert [row["loss"] for row in ours.train] == [row["loss"] for row in again.train]
    assert ours.train[0]["logps/desirable"] != other.train[0]["logps/desirable"]
