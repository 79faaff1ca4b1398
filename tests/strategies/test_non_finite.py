"""A number that is not finite on one rank: all ranks stop, or all skip the step."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kto_lightning.module import KTOModule
from tests.support.cli import checkpoint_tensors, fit, fit_arguments, rows, small_model
from tests.support.comparison import assert_numbers_agree, assert_weights_agree
from tests.support.faults import corrupt_policy
from tests.support.ranks import RankResult, run_ranks

SKIP = ("--model.non_finite", "skip")
FILE_ORDER = ("--data.shuffle", "false")
"""Example 9 (line 10) is then in the third batch of four, on one of the ranks."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("policy"), "gpt2")


def corrupt_example_nine(*, gradient: bool) -> None:
    """For `prepare` of a job: the policy gives NaN for that example."""
    corrupt_policy(pytest.MonkeyPatch(), 9, math.nan, gradient=gradient)


def corrupt_and_print_weights(*, gradient: bool) -> None:
    """The same, and every rank prints a checksum of its weights at the end."""
    corrupt_example_nine(gradient=gradient)
    on_train_end = KTOModule.on_train_end

    def print_weights(self: KTOModule) -> None:
        on_train_end(self)
        total = sum(float(p.detach().double().sum()) for p in self.parameters())
        print(f"weights add up to {total!r}", flush=True)

    KTOModule.on_train_end = print_weights


def fit_corrupted(
    prepare: Any, policy: Path, train: Path, output: Path, *options: Any, strategy: str
) -> list[RankResult]:
    devices = ("--trainer.devices", 2, "--trainer.strategy", strategy)
    arguments = fit_arguments(policy, train, output, *FILE_ORDER, *devices, *options)
    return run_ranks("fit", *arguments, prepare=prepare)


@pytest.mark.parametrize(("gradient", "strategy"), [(False, "ddp"), (True, "ddp"), (True, "fsdp2")])
def test_the_run_stops_on_both_and_names_the_records(
    gradient: bool, strategy: str, policy: Path, train: Path, tmp_path: Path
):
    prepare = partial(corrupt_example_nine, gradient=gradient)
    first, second = fit_corrupted(prepare, policy, train, tmp_path, strategy=strategy)
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
    prepare, two = partial(corrupt_and_print_weights, gradient=True), tmp_path / "two"
    first, second = fit_corrupted(prepare, policy, train, two, *options, strategy=strategy)
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


def sums_of_weights(rank: RankResult) -> list[str]:
    return [line for line in rank.out.splitlines() if "weights add up to" in line]
