"""Faults injected into a run: a kill, an action during a step, a number that is not finite."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kto_lightning.batches.types import Logps, PackedBatch
from kto_lightning.callbacks.checkpoints import Checkpoints
from kto_lightning.models.policy import Policy
from kto_lightning.module import KTOModule
from kto_lightning.sharded_checkpoint import HashingFile
from tests.support.cli import fit


class Killed(BaseException):
    """Simulates the end of the process: nothing is written after it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int, *, after_checkpoint: bool) -> None:
    """Raise `Killed` at a step, once its row is written or once its checkpoint is."""
    name = "_save" if after_checkpoint else "on_train_batch_end"
    method = getattr(Checkpoints, name)

    def method_or_end(self: Checkpoints, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if after_checkpoint:
            method(self, trainer, *args, **kwargs)
        if trainer.global_step == step:
            raise Killed
        if not after_checkpoint:
            method(self, trainer, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, name, method_or_end)


def fit_until(step: int, *arguments: Any, after_checkpoint: bool = True) -> None:
    """`tests.support.cli.fit`, killed at a step."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, step, after_checkpoint=after_checkpoint)
        with pytest.raises(Killed):
            fit(*arguments)


def call_in_step(action: Callable[[], object], step: int, method: str) -> None:
    """Call `action` in this process during a training step, or at the start of the validation
    after it.

    Args:
        action: takes no arguments.
        step: counted from 1.
        method: `training_step` or `validation_step`.
    """
    original = getattr(KTOModule, method)

    def method_with_action(self: KTOModule, batch: Any, batch_idx: int) -> None:
        current = self.trainer.global_step + (method == "training_step")
        if current == step and (method == "training_step" or batch_idx == 0):
            action()
        original(self, batch, batch_idx)

    setattr(KTOModule, method, method_with_action)


def kill_ranks_in_step(step: int, *ranks: int) -> None:
    """For `prepare` of a job: SIGKILL to some of its ranks during a step."""
    if int(os.environ["RANK"]) in ranks:
        call_in_step(partial(os.kill, os.getpid(), signal.SIGKILL), step, "training_step")


def save_in_background() -> None:
    """For `prepare` of a job: let sharded checkpoints be written beside the steps, as when saving
    has taken longer than a step."""
    on_train_start = Checkpoints.on_train_start

    def start_slow(self: Checkpoints, *args: Any) -> None:
        self._saves_slowly = True
        on_train_start(self, *args)

    Checkpoints.on_train_start = start_slow


def fill_disk_of_rank(rank: int, num_files: int) -> None:
    """For `prepare` of a job: let a rank's disk be full after some files, one in each checkpoint,
    which are written in the background."""
    save_in_background()
    if int(os.environ["RANK"]) != rank:
        return
    sync, done = HashingFile.sync, 0

    def sync_or_fail(self: HashingFile) -> None:
        nonlocal done
        done += 1
        if done > num_files:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(self)

    HashingFile.sync = sync_or_fail


def corrupt_policy(
    monkeypatch: pytest.MonkeyPatch, example: int, value: float, *, gradient: bool
) -> None:
    """Set the policy's log-prob of one example, or the gradient of it, to `value` in training."""
    forward = Policy.forward

    def corrupted_forward(self: Policy, batch: PackedBatch, **options: Any) -> Logps:
        logps = forward(self, batch, **options)
        trains = torch.is_grad_enabled() and logps.matched is not None
        if trains and example in batch.indices and not batch.is_filler.any():
            mask = torch.zeros(len(batch), dtype=torch.bool)
            mask[batch.indices.index(example)] = True
            if gradient:
                logps.matched.register_hook(lambda grad: torch.where(mask, value, grad))
            else:
                logps.matched = torch.where(mask, value, logps.matched)
        return logps

    monkeypatch.setattr(Policy, "forward", corrupted_forward)


def kill_at_file_operation(number: int, directory: Path) -> None:
    """For `prepare` of a job: SIGKILL before its n-th change of a file below a directory.

    Args:
        number: counted from 1; opening for writing, creating, renaming and removing count.
        directory: whose files count.
    """
    changes = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
    done = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        writes = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if (writes or event in changes) and str(arguments[0]).startswith(str(directory)):
            done += 1
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
