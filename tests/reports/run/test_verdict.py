"""The rules of the verdict, on hand-made metrics."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kto_lightning.reports.finding import Finding, capitalize_first
from kto_lightning.reports.run import Run, headline, verdict
from kto_lightning.reports.run.run_file import RunFile


def run_of(
    num_steps: int = 100, *, non_finite: dict[str, int] | None = None, **columns: Any
) -> Run:
    """A healthy run except for these columns; `__` stands for `/`."""
    steps = np.arange(1, num_steps + 1)
    noise = np.random.default_rng(0).normal(0, 0.1, num_steps)
    good = 1.0 * steps / num_steps
    healthy = {
        "train/loss": 0.5 - 0.2 * good + 0.1 * noise,
        "train/z0": np.maximum(noise, 0.0),
        "train/z0_raw": noise,
        "train/reward/desirable": good + noise,
        "train/reward/undesirable": -good + noise,
        "train/reward/margin": 2 * good + noise,
        "train/gradient_left/desirable": np.full(num_steps, 0.9),
        "train/gradient_left/undesirable": np.full(num_steps, 0.9),
        "train/grad_norm": np.full(num_steps, 1.0),
        "train/lr": np.full(num_steps, 1e-5),
        "val/loss": np.where(steps == num_steps, 0.4, np.nan),
        "val/reward/auc": np.where(steps == num_steps, 0.81, np.nan),
        "val/reward/margin": np.where(steps == num_steps, 1.5, np.nan),
    }
    for name, values in columns.items():
        column = "train/" + name.replace("__", "/") if not name.startswith("val") else None
        column = column or name.replace("__", "/")
        healthy[column] = np.broadcast_to(np.asarray(values, dtype=float), num_steps).copy()
    return Run(
        directory=Path("output"),
        steps=steps,
        columns=healthy,
        non_finite=non_finite or {},
        settings={"model": {"beta": 0.1, "loss": "kto", "learning_rate": 1e-5}},
        file=RunFile(planned_steps=num_steps, finished=True),
    )


def by_grade(run: Run) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"problem": [], "warning": [], "note": [], "good": []}
    for one in verdict(run):
        found[one.grade].append(one.sentence)
    return found


def one_of(sentences: list[str], beginning: str) -> str:
    matching = [sentence for sentence in sentences if sentence.startswith(beginning)]
    assert len(matching) == 1, sentences
    return matching[0]


def test_a_healthy_run_has_good_findings_only() -> None:
    run = run_of()
    found = by_grade(run)
    assert (found["problem"], found["warning"], found["note"]) == ([], [], [])
    # 12 steps, an eighth: means of 2·(1..12)/100 and 2·(89..100)/100 are .13 and 1.89.
    assert one_of(found["good"], "The margin rose from").startswith("The margin rose from 0.1")
    assert "in 81% of the pairs" in one_of(found["good"], "The held-out AUC is 0.81")
    assert headline(verdict(run)).startswith("The margin rose from 0.1")


def test_a_run_without_steps() -> None:
    (only,) = verdict(run_of(0))
    assert (only.grade, only.what) == ("problem", "No optimizer step has been completed")


def test_one_step() -> None:
    found = by_grade(run_of(1))
    assert "Train for some hundred steps" in one_of(found["note"], "1 step is too few")


def test_non_finite_columns_are_problems() -> None:
    run = run_of(non_finite={"train/loss": 41, "train/grad_norm": 40})
    text = one_of(by_grade(run)["problem"], "train/grad_norm is not a finite number at step 40")
    assert "--model.learning_rate" in text
    assert headline(verdict(run)).startswith("train/grad_norm is not a finite number at step 40.")


def test_an_unfinished_run() -> None:
    run = run_of()
    run.file = RunFile(planned_steps=400)
    assert "--ckpt_path last" in one_of(by_grade(run)["warning"], "The run is at step 100 of 400")
    run.file = RunFile(planned_steps=400, finished=True)  # stopped early on purpose
    assert by_grade(run)["warning"] == []
    run.file = RunFile()  # an OUTPUT of before run.json
    assert by_grade(run)["warning"] == []


@pytest.mark.parametrize("absent", ["desirable", "undesirable"])
def test_one_class_only(absent: str) -> None:
    run = run_of(**{f"reward__{absent}": math.nan, "reward__margin": math.nan})
    text = one_of(by_grade(run)["problem"], f"There was no {absent} completion in any batch")
    assert f"Add {absent} records" in text


def test_single_class_batches() -> None:
    margins = np.where(np.arange(100) % 3 == 0, math.nan, np.arange(100) / 50)
    text = one_of(by_grade(run_of(reward__margin=margins))["warning"], "34% of the batches")
    assert "--data.batch_size" in text
    few = np.where(np.arange(100) % 6 == 0, math.nan, np.arange(100) / 50)
    assert by_grade(run_of(reward__margin=few))["warning"] == []


def test_a_margin_that_fell() -> None:
    margins = np.concatenate([np.full(100, 2.0), np.full(100, 0.5)])
    text = one_of(
        by_grade(run_of(200, reward__margin=margins))["warning"],
        "the margin fell from 2 to",
    )
    assert "lower --model.learning_rate" in text.lower()


def test_a_margin_that_only_scatters() -> None:
    scatter = np.random.default_rng(1).normal(0, 1, 100)
    found = by_grade(run_of(reward__margin=scatter))
    assert one_of(found["note"], "The margin did not clearly move")
    assert not any(text.startswith("The margin rose") for text in found["good"])


def test_a_policy_that_has_hardly_moved() -> None:
    still = {f"reward__{name}": 0.001 for name in ("desirable", "undesirable", "margin")}
    text = one_of(by_grade(run_of(**still))["warning"], "The policy has hardly moved")
    assert "--model.learning_rate (was 1e-05) three- to tenfold" in text


def test_desirable_completions_that_became_less_likely() -> None:
    run = run_of(reward__desirable=np.linspace(0, -3, 100))
    text = one_of(by_grade(run)["warning"], "Desirable completions became less likely")
    assert "--model.desirable_weight" in text


def test_z0_below_zero_throughout() -> None:
    run = run_of(z0=0.0, z0_raw=-0.5)
    assert "That is normal while" in one_of(by_grade(run)["note"], "z0 has been 0 for 100 steps")
    short = run_of(40, z0=0.0, z0_raw=-0.5)
    assert "-0.5 nats" in one_of(by_grade(short)["note"], "z0 stayed 0")
    run.settings["model"]["loss"] = "apo_zero_unpaired"
    assert not any(text.startswith("z0") for text in by_grade(run)["note"])


@pytest.mark.parametrize(
    ("reward", "grade", "words"),
    [(9.0, "note", "far beyond the reference point"), (-9.0, "warning", "on the wrong side")],
)
def test_a_saturated_class(reward: float, grade: str, words: str) -> None:
    left = np.where(np.arange(100) < 60, 0.9, 0.01)
    run = run_of(gradient_left__desirable=left, reward__desirable=reward)
    assert words in one_of(
        by_grade(run)[grade], "desirable completions have 1.0% of their gradient"
    )


def test_a_loss_that_rose() -> None:
    text = one_of(
        by_grade(run_of(loss=np.linspace(0.5, 0.9, 100)))["warning"], "The loss rose from"
    )
    assert "--model.gradient_clip_norm 1.0" in text


def test_zero_gradients_and_learning_rates() -> None:
    found = by_grade(run_of(grad_norm=0.0, lr=0.0))["problem"]
    assert one_of(found, "The gradient was 0 in every step")
    assert "--model.warmup_ratio" in one_of(found, "The learning rate was 0 in every step")


def test_steps_that_are_always_clipped() -> None:
    run = run_of(grad_norm=5.0)
    run.settings["model"]["gradient_clip_norm"] = "1.0"
    assert one_of(by_grade(run)["note"], "100% of the steps were clipped to a gradient norm of 1")
    run.settings["model"]["gradient_clip_norm"] = 10.0
    assert by_grade(run)["note"] == []


@pytest.mark.parametrize(
    ("auc", "grade"), [(0.7, "good"), (0.69, "note"), (0.55, "note"), (0.54, "warning")]
)
def test_the_grade_of_a_held_out_auc(auc: float, grade: str) -> None:
    values = np.where(np.arange(100) == 99, auc, math.nan)
    assert one_of(
        by_grade(run_of(val__reward__auc=values))[grade], f"The held-out AUC is {auc:.2f}"
    )


def test_overfitting() -> None:
    aucs = np.full(100, math.nan)
    aucs[[19, 59, 99]] = 0.6, 0.8, 0.72
    margins = np.where(np.arange(100) == 99, 0.2, math.nan)
    found = by_grade(run_of(val__reward__auc=aucs, val__reward__margin=margins))["warning"]
    assert "0.72 at the end" in one_of(found, "The held-out AUC was highest at step 60 (0.80)")
    assert "training records" in one_of(found, "The margin is 0.20 on held-out records")


def test_no_held_out_records() -> None:
    nothing = {f"val__{name}": math.nan for name in ("loss", "reward__auc", "reward__margin")}
    assert "--data.validation" in one_of(
        by_grade(run_of(**nothing))["note"], "No records were held out"
    )


def test_rules_whose_columns_are_missing_are_skipped() -> None:
    run = run_of()
    run.columns = {"train/loss": run.columns["train/loss"]}
    run.settings = {}
    assert [one.what for one in verdict(run)] == ["No records were held out"]


def test_a_finding_as_a_sentence() -> None:
    whole = Finding(grade="note", what="A thing", meaning="it matters", action="fix it")
    assert whole.sentence == "A thing: it matters. Fix it."
    assert Finding(grade="note", what="A thing", action="fix it").sentence == "A thing: fix it."
    assert Finding(grade="good", what="A thing").sentence == "A thing."
    assert [capitalize_first(text) for text in ("see there", "z0 is", "train/loss is", "--x")] == [
        *("See there", "z0 is", "train/loss is", "--x")
    ]
