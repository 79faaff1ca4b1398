"""`benchmarks/real_model.py`: its statistics by hand, its runs on a tiny model, and going on."""

import importlib
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kto_lightning.demo.instructions import HELD_OUT_KINDS, TRAINED_KINDS
from tests.support.factories import make_tokenizer, save_model

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL, Lightning and peft


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("real_model")


@pytest.fixture(scope="module")
def worker(script: ModuleType) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("real_runs")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template."""
    directory = tmp_path_factory.mktemp("model")
    return save_model(directory, "llama", make_tokenizer(chat_template="qwen2_5"))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "feedback.jsonl"
    lines = [
        json.dumps(
            {
                "prompt": [{"role": "user", "content": f"Name {n} fruits."}],
                "completion": [{"role": "assistant", "content": "Fig." * (1 + n % 3)}],
                "label": n % 3 == 0,
            }
        )
        for n in range(12)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_difference_that_never_varies_has_no_interval(script):
    assert script.bootstrap(np.full((5, 40), 0.25)) == (0.25, 0.25, 0.25)


def test_the_interval_is_that_of_a_mean_over_instructions(script):
    # One seed's worth of differences: 30 instructions of 100 gained. The bootstrap's standard
    # error is that of a share, sqrt(0.3 * 0.7 / 100) = 0.0458.
    mean, low, high = script.bootstrap(np.array([[1.0] * 30 + [0.0] * 70] * 4))
    assert mean == 0.3
    assert (high - low) / 2 == pytest.approx(1.96 * 0.0458, rel=0.05)


def test_seeds_that_differ_widen_the_interval(script):
    # Two seeds of a mean 0 and 1, whatever the instruction: a resampled mean is 0, 0.5 or 1.
    assert script.bootstrap(np.array([[0.0] * 50, [1.0] * 50])) == (0.5, 0.0, 1.0)


def options(**given: Any) -> Namespace:
    return Namespace(**{"vary": None, "methods": ("ours", "TRL", "SFT")} | given)


def test_one_setting_is_varied_at_a_time(script):
    training = script.SMALL.training
    named = {
        each.name: each
        for each in script.variants_of(
            options(vary=["beta=0.05,0.5", "balance=no", "batch_size=4"]), script.SMALL
        )
    }
    assert {name: each.training for name, each in named.items()} == {
        "ours": training,
        "beta 0.05": replace(training, beta=0.05),
        "beta 0.5": replace(training, beta=0.5),
        "balance no": replace(training, balance=False),
        "batch_size 4": replace(training, batch_size=4),
    }
    assert {each.method for each in named.values()} == {"ours"}


@pytest.mark.parametrize("vary", ["gamma=1", "beta", "beta=low", "balance=maybe"])
def test_an_unknown_setting_or_value_is_refused(vary, script):
    with pytest.raises(SystemExit, match=vary.partition("=")[0]):
        script.variants_of(options(vary=[vary]), script.SMALL)


def make_run(worker: ModuleType, method: str, model: Path, records: Path, output: Path) -> Any:
    return worker.Run(
        method=method,
        seed=0,
        training=worker.Training(batch_size=4, learning_rate=1e-3),
        start=str(model),
        records=str(records),
        output=str(output),
        threads=1,
        num_held_out=len(TRAINED_KINDS),
        num_held_out_kinds=len(HELD_OUT_KINDS),
        max_new_tokens=4,
        text_windows=1,
        on_gpu=False,
    )


def finish(worker: ModuleType, run: Any, folder: Path) -> dict[str, Any]:
    """Run it in this process; its result."""
    folder.mkdir()
    run.write(folder / "run.json")
    assert worker.main(folder / "run.json") == 0
    return json.loads((folder / "result.json").read_text())


def test_ours_and_trl_train_the_same_model(worker, model, records, tmp_path):
    start, ours, trl, sft = (
        finish(
            worker,
            make_run(worker, method, model, records, tmp_path / f"{method}_out"),
            tmp_path / method,
        )
        for method in ("start", "ours", "TRL", "SFT")
    )
    # The untouched text's log-prob is a number that training moves in every digit.
    assert ours["text_logp"] == pytest.approx(trl["text_logp"], rel=1e-4)
    moved = abs(ours["text_logp"] - start["text_logp"])
    assert moved > 10 * abs(ours["text_logp"] - trl["text_logp"])
    assert abs(sft["text_logp"] - start["text_logp"]) > 10 * abs(
        ours["text_logp"] - trl["text_logp"]
    )
    assert abs(sft["text_logp"] - trl["text_logp"]) > 10 * abs(ours["text_logp"] - trl["text_logp"])
    kinds = [each["kind"] for each in ours["answers"]]
    assert kinds == [*TRAINED_KINDS, *HELD_OUT_KINDS]
    for result in (ours, trl, sft):
        assert result["seconds"] > 0
        assert result["peak_mib"] > 100
        assert len(result["good"]) == len(kinds)


def test_a_finished_run_is_not_repeated_nor_taken_for_another(
    script, model, records, tmp_path, monkeypatch
):
    given = Namespace(small=True, seeds=1, output=tmp_path, model=model, threads=1, minutes=None)
    experiment = script.Experiment(given)
    (tmp_path / "feedback_0.jsonl").write_text(records.read_text())
    started: list[Path] = []

    def run_worker(command: list[str], **_: Any) -> Any:
        started.append(Path(command[-1]))
        started[-1].with_name("result.json").write_text('{"good": []}')
        return Namespace(returncode=0)

    monkeypatch.setattr(script.subprocess, "run", run_worker)
    variant = script.Variant(name="ours", method="ours", training=script.SMALL.training)
    assert experiment.run(variant, 0) == experiment.run(variant, 0) == {"good": []}
    assert started == [tmp_path / "runs" / "ours_0" / "run.json"]
    other = replace(variant, training=replace(variant.training, beta=0.3))
    with pytest.raises(SystemExit, match="has other settings; choose another --output"):
        experiment.run(other, 0)
    experiment.stop_at = 0.0
    assert experiment.run(replace(other, name="beta 0.3"), 0) is None
    assert len(started) == 1


def test_the_table_says_what_changed(script):
    size = replace(script.SMALL, num_held_out=2, num_held_out_kinds=2)
    start = {"good": [False, False, True, False], "text_logp": -3.0}
    ours = {"good": [True, True, True, False], "text_logp": -3.1, "seconds": 7.6, "peak_mib": 40.2}
    before, row = script.compare(start, {"ours": [ours, ours]}, size)
    assert (before["trained kinds"], before["held-out kinds"]) == ("0.0%", "50.0%")
    assert (row["trained kinds"], row["held-out kinds"]) == ("100.0%", "50.0%")
    assert row["change, trained kinds"] == "+100.0 [+100.0, +100.0]"
    assert row["change, held-out kinds"] == "+0.0 [+0.0, +0.0]"
    assert row["text"] == "-0.100 [-0.100, -0.100]"
    assert (row["seconds"], row["MiB"]) == ("8", "40")
