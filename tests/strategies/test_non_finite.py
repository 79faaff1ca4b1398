"""A number that is not finite on one rank alone: all ranks stop, or skip the step, alike."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kto_lightning.module import KTOModule
from tests.support.cli import checkpoint_tensors, fit, fit_arguments, rows, small_model
from tests.support.comparison import assert_numbers_agree, assert_weights_agree
from tests.support.faults import corrupt_policy
from tests.support.ranks import Ended, run_ranks

SKIP = ("--model.non_finite", "skip")
FILE_ORDER = ("--data.shuffle", "false")
"""In which example 9 (line 10) is in the third batch of four, and so on one of the ranks."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("policy"), "gpt2")


def spoil_example_nine(*, gradient: bool) -> None:
    """In a process of a job: what the policy makes of that example is not a number."""
    corrupt_policy(pytest.MonkeyPatch(), 9, math.nan, gradient=gradient)


def spoil_and_tell(*, gradient: bool) -> None:
    """The same; every rank prints a checksum of its weights at the end."""
    spoil_example_nine(gradient=gradient)
    conclude = KTOModule.on_train_end

    def tell(self: KTOModule) -> None:
        conclude(self)
        total = sum(float(p.detach().double().sum()) for p in self.parameters())
        print(f"weights add up to {total!r}", flush=True)

    KTOModule.on_train_end = tell


def fit_spoilt(
    prepare: Any, policy: Path, train: Path, output: Path, *options: Any, strategy: str
) -> list[Ended]:
    devices = ("--trainer.devices", 2, "--trainer.strategy", strategy)
    arguments = fit_arguments(policy, train, output, *FILE_ORDER, *devices, *options)
    return run_ranks("fit", *arguments, prepare=prepare)


@pytest.mark.parametrize(("gradient", "strategy"), [(False, "ddp"), (True, "ddp"), (True, "fsdp2")])
def test_the_run_stops_on_both_and_names_the_records(
    gradient: bool, strategy: str, policy: Path, train: Path, tmp_path: Path
):
    prepare = partial(spoil_example_nine, gradient=gradient)
    first, second = fit_spoilt(prepare, policy, train, tmp_path, strategy=strategy)
    assert (first.status, second.status) == (1, 1), first.err + second.err
    assert first.err.startswith("error: step 3 is not finite")
    assert f"Its batch: {train}:9,10,11,12." in first.err  # of both ranks
    assert (f"Log-probs that are not finite: {train}:10 (policy)." in first.err) is not gradient
    assert second.err == ""
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2"]
    ((step, saved),) = checkpoint_tensors(tmp_path).items()
    assert step == 2
    assert all(value.isfinite().all() for value in saved.values())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_step_is_skipped_on_both(
    strategy: str, policy: Path, train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = (*SKIP, "--model.optimizer", "sgd", "--model.learning_rate", 0.1)
    prepare, two = partial(spoil_and_tell, gradient=True), tmp_path / "two"
    first, second = fit_spoilt(prepare, policy, train, two, *options, strategy=strategy)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert "step 3 is not finite" in first.err
    assert "1 steps were skipped" in first.err
    assert second.err == ""
    corrupt_policy(monkeypatch, 9, math.nan, gradient=True)
    one = fit(policy, train, tmp_path / "one", *FILE_ORDER, *options)
    assert rows(two)[2]["train/grad_norm"] == "nan"
    assert_numbers_agree(two, one)
    assert_weights_agree(two, one)
    assert "weights add up to" in first.out
    if strategy == "ddp":  # of which each rank has its own
        assert sums_of_weights(first) == sums_of_weights(second)


def sums_of_weights(rank: Ended) -> list[str]:
    return [line for line in rank.out.splitlines() if "weights add up to" in line]
