"""Ranks that end alone, by SIGKILL or an error: no other hangs, and the run resumes bit for bit."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest

from kto_lightning.errors import ModelError
from kto_lightning.sharded_checkpoint import HashingFile, verify_directory
from kto_lightning.training.checkpoints import list_checkpoints
from tests.support.cli import EVERY_STEP, LAST, fit_arguments, small_model
from tests.support.comparison import assert_runs_equal
from tests.support.faults import (
    call_in_step,
    fill_disk_of_rank,
    kill_ranks_in_step,
    save_in_background,
)
from tests.support.ranks import RankResult, fit_on_ranks, job, run_ranks

EVERY_OTHER = ("--checkpoint.every_n_steps", 2, "--model.lr_schedule", "cosine")
MANY_STEPS = ("--trainer.max_epochs", 20, *EVERY_STEP, "--model.lr_schedule", "cosine")
LONG = 360.0
"""Seconds for a run of many steps, each of which is saved and synced to disk."""
SETTINGS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "validation, a worker": (
        "ddp",
        ("--data.validation", 0.2, "--trainer.val_check_interval", 2, "--data.num_workers", 1),
    ),
    "lora with dropout": ("ddp", ("--model.lora.r", 4, "--model.lora.dropout", 0.2)),
    "a reference that follows": ("ddp", ("--model.follow.every_n_steps", 2)),
    "fsdp2": ("fsdp2", ("--model.dropout", "true")),
    "fsdp2, a reference that follows": ("fsdp2", ("--model.follow.every_n_steps", 2)),
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("policy"), "gpt2", attn_pdrop=0.2)


@pytest.fixture(scope="module")
def whole_runs(policy: Path, train: Path, tmp_path_factory) -> Callable[..., Path]:
    """Uninterrupted runs of two ranks, with one of `SETTINGS` and these options, each made once."""
    made: dict[tuple[Any, ...], Path] = {}

    def run(name: str, *options: Any) -> Path:
        key, (strategy, settings) = (name, *options), SETTINGS[name]
        if key not in made:
            output = tmp_path_factory.mktemp("whole")
            given = (*settings, *options)
            made[key] = fit_on_ranks(
                policy, train, output, *given, strategy=strategy, time_limit=LONG
            )
        return made[key]

    return run


def arguments(policy: Path, train: Path, output: Path, strategy: str, *options: Any) -> list[Any]:
    devices = ("--trainer.devices", 2, "--trainer.strategy", strategy)
    return ["fit", *fit_arguments(policy, train, output, *devices, *options)]


def assert_reports_lost_rank(survivor: RankResult) -> None:
    assert survivor.status == 1
    assert "error: another rank has ended while this one waited for it" in survivor.err
    assert "Traceback" not in survivor.err


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("validation, a worker", (0, 1)),
        ("lora with dropout", (1,)),
        ("fsdp2, a reference that follows", (0,)),
    ],
)
def test_killed_ranks_leave_none_hanging_and_the_run_resumes(
    name: str, ranks: tuple[int, ...], policy: Path, train: Path, whole_runs, tmp_path: Path
):
    strategy, settings = SETTINGS[name]
    options = (*settings, *EVERY_OTHER)
    command = arguments(policy, train, tmp_path, strategy, *options)
    ended = run_ranks(*command, prepare=partial(kill_ranks_in_step, 4, *ranks))
    for rank, left in enumerate(ended):
        if rank in ranks:
            assert left.status == -signal.SIGKILL
        else:
            assert_reports_lost_rank(left)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]
    assert not (tmp_path / "model").exists()
    fit_on_ranks(policy, train, tmp_path, *options, *LAST, strategy=strategy)
    assert_runs_equal(tmp_path, whole_runs(name, *EVERY_OTHER))


def last_step(output: Path) -> int:
    return max((step for step, _ in list_checkpoints(output)), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(len(SETTINGS)))
def test_sigkill_at_random_moments(
    seed: int, policy: Path, train: Path, whole_runs, tmp_path: Path
):
    """Both ranks or one of them, some milliseconds after the first new checkpoint, five times."""
    random, name = Random(seed), list(SETTINGS)[seed]
    strategy, settings = SETTINGS[name]
    options = (*settings, *MANY_STEPS)
    resume: tuple[Any, ...] = ()
    for _ in range(5):
        before = last_step(tmp_path)
        command = arguments(policy, train, tmp_path, strategy, *options, *resume)
        with job(*command) as running:
            running.wait_for(lambda before=before: last_step(tmp_path) > before)
            time.sleep(random.uniform(0.0, 0.3))
            ranks = random.choice([(0, 1), (0,), (1,)])
            running.signal(signal.SIGKILL, *ranks)
            ended = running.wait()
        assert all(ended[rank].status == -signal.SIGKILL for rank in ranks)
        for rank in {0, 1} - set(ranks):
            assert_reports_lost_rank(ended[rank])
        resume = LAST
    assert not (tmp_path / "model").exists()
    fit_on_ranks(policy, train, tmp_path, *options, *LAST, strategy=strategy, time_limit=LONG)
    assert_runs_equal(tmp_path, whole_runs(name, *MANY_STEPS))


@pytest.mark.parametrize("prepare", [None, save_in_background], ids=["at once", "in background"])
def test_a_run_killed_while_it_saves_resumes(
    prepare: Callable[[], None] | None, policy: Path, train: Path, whole_runs, tmp_path: Path
):
    options = (*SETTINGS["fsdp2"][1], *EVERY_OTHER)
    command = arguments(policy, train, tmp_path, "fsdp2", *options)
    part = tmp_path / "checkpoints" / ".step=4.ckpt.part"
    with job(*command, prepare=partial(save_slowly, prepare)) as running:
        running.wait_for(part.exists)
        running.signal(signal.SIGKILL)
        running.wait()
    assert part.exists()
    ((step, checkpoint),) = list_checkpoints(tmp_path)
    assert step == 2
    verify_directory(checkpoint)
    fit_on_ranks(policy, train, tmp_path, *options, *LAST, strategy="fsdp2", prepare=prepare)
    assert_runs_equal(tmp_path, whole_runs("fsdp2", *EVERY_OTHER))
    assert [step for step, _ in list_checkpoints(tmp_path)] == [4, 6]
    assert not list(part.parent.glob(".*"))


def save_slowly(prepare: Callable[[], None] | None) -> None:
    """For `prepare` of a job: every file of a checkpoint takes a while."""
    if prepare is not None:
        prepare()
    sync = HashingFile.sync

    def sync_late(self: HashingFile) -> None:
        time.sleep(0.3)
        sync(self)

    HashingFile.sync = sync_late


def test_a_full_disk_of_one_rank_ends_all_alike(policy: Path, train: Path, tmp_path: Path):
    command = arguments(policy, train, tmp_path, "fsdp2", *EVERY_STEP)
    for rank in run_ranks(*command, prepare=partial(fill_disk_of_rank, 1, 2)):
        assert rank.status == 1
        assert "step=3.ckpt cannot be written: [Errno 28] No space left on device (rank 1)" in (
            rank.err
        )
        assert "Traceback" not in rank.err
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 2]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def fail_in_step_three(rank: int) -> None:
    """For `prepare` of a job: one rank fails in step 3."""
    if int(os.environ["RANK"]) == rank:
        call_in_step(_fail, 3, "training_step")


def _fail() -> None:
    raise ModelError("this rank alone fails.")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_alone_ends_the_other(
    rank: int, policy: Path, train: Path, tmp_path: Path
):
    command = arguments(policy, train, tmp_path, "ddp")
    ended = run_ranks(*command, prepare=partial(fail_in_step_three, rank))
    assert ended[rank].status == 1
    assert "error: this rank alone fails." in ended[rank].err
    assert_reports_lost_rank(ended[1 - rank])


def hang_in_step_two(start_method: str) -> None:
    """For `prepare` of a job: every rank waits to be killed in step 2."""
    multiprocessing.set_start_method(start_method, force=True)
    call_in_step(partial(time.sleep, 600.0), 2, "training_step")


@pytest.mark.parametrize(
    "start_method",  # Python's own up to 3.13, and after; the second imports everything again
    ["fork", pytest.param("forkserver", marks=pytest.mark.slow)],
)
def test_a_killed_rank_takes_its_workers_with_it(
    start_method: str, policy: Path, train: Path, tmp_path: Path
):
    command = arguments(policy, train, tmp_path, "ddp", "--data.num_workers", 2, *EVERY_STEP)
    with job(*command, prepare=partial(hang_in_step_two, start_method)) as running:
        ranks = [psutil.Process(process.pid) for process in running.processes]

        def started() -> list[psutil.Process]:
            return [child for rank in ranks for child in rank.children(recursive=True)]

        running.wait_for(lambda: last_step(tmp_path) == 1 and len(started()) >= 4)
        workers = started()
        running.signal(signal.SIGKILL)
        running.wait()
    _, left = psutil.wait_procs(workers, timeout=30.0)
    assert left == []
