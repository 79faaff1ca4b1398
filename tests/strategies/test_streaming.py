"""A stream on two ranks: the numbers of one, and runs that resume bit for bit."""

import json
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kto_lightning.training.checkpoints import list_checkpoints
from tests.support.cli import EVERY_STEP, LAST, TWO_EPOCHS, fit, fit_arguments, rows, small_data
from tests.support.comparison import assert_numbers_agree, assert_runs_equal, assert_weights_agree
from tests.support.factories import plain_records
from tests.support.faults import kill_ranks_in_step
from tests.support.ranks import fit_on_ranks, run_ranks

SMALL_BUFFERS = (
    *("--data.streaming", "true", "--data.buffer_size", 8),
    *("--model.desirable_weight", 1.0, "--model.undesirable_weight", 1.5),
)
SGD = ("--model.optimizer", "sgd", "--model.learning_rate", 0.1)
CASES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "shuffled": ("ddp", (*SGD, *TWO_EPOCHS, "--data.max_tokens", 60)),
    "file order, workers": ("ddp", (*SGD, "--data.shuffle", "false", "--data.num_workers", 1)),
    "fsdp2": ("fsdp2", SGD),
}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 records: in buffers of 8 the last one holds 9, and an epoch's last batch one."""
    return small_data(tmp_path_factory.mktemp("data") / "train.jsonl", 25)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_numbers_of_one(case: str, policy: Path, train: Path, tmp_path: Path):
    strategy, options = CASES[case]
    options = (*SMALL_BUFFERS, *options)
    two = fit_on_ranks(policy, train, tmp_path / "two", *options, strategy=strategy)
    one = fit(policy, train, tmp_path / "one", *options)
    assert_numbers_agree(two, one)
    assert_weights_agree(two, one)
    assert len(rows(two)) in (7, 14)


def test_a_killed_run_resumes(policy: Path, train: Path, tmp_path: Path):
    """Killed within a buffer: resumed on two ranks bit for bit, on one with the same numbers."""
    options = (*SMALL_BUFFERS, *SGD, *TWO_EPOCHS, *EVERY_STEP)
    whole = fit_on_ranks(policy, train, tmp_path / "whole", *options)
    killed = tmp_path / "killed"
    arguments = fit_arguments(policy, train, killed, "--trainer.devices", 2, *options)
    for rank in run_ranks("fit", *arguments, prepare=partial(kill_ranks_in_step, 4, 0, 1)):
        assert rank.status == -signal.SIGKILL
    assert [step for step, _ in list_checkpoints(killed)] == [2, 3]
    on_one = Path(shutil.copytree(killed, tmp_path / "on_one"))
    fit_on_ranks(policy, train, killed, *options, *LAST)
    assert_runs_equal(killed, whole)
    fit(policy, train, on_one, *options, *LAST)
    assert_numbers_agree(on_one, whole)
    assert_weights_agree(on_one, whole)


def test_bad_records_are_reported_once_and_end_every_rank(policy: Path, tmp_path: Path):
    data = tmp_path / "train.jsonl"
    good = "".join(json.dumps(record) + "\n" for record in plain_records(300))
    data.write_text(good + '{"prompt": "a", "completion": "b"}\n' * 400)
    options = ("--trainer.devices", 2, *SMALL_BUFFERS, "--data.batch_size", 32)
    first, second = run_ranks("fit", *fit_arguments(policy, data, tmp_path / "output", *options))
    assert (first.status, second.status) == (1, 1)
    assert first.err.count("warning: skipped:") == 5
    assert "error: 301 bad records and 300 usable ones so far" in first.err
    assert second.err.startswith("[rank 1] error: 301 bad records and 300 usable ones so far")
    assert 0 < len(rows(tmp_path / "output")) < 9
