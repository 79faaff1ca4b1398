"""Loader workers that are killed, in the order in which the kernel lets their parent know."""

import os
import signal
import threading
import time
from typing import Any

import pytest
from torch.utils.data import Dataset, SequentialSampler

from kto_lightning.batches.workers import RememberingSampler, StepLoader


def lose_connection() -> None:
    raise ConnectionResetError("Connection reset by peer")


class LostOnTheWay:
    """What a worker has sent, and whose tensors are with a process that answers no more."""

    def __reduce__(self) -> Any:
        return lose_connection, ()


def end_slowly() -> None:
    """The kernel closes a killed process's files before its parent can ask for its status."""
    time.sleep(0.3)  # until the batch is sent
    os.closerange(3, 1024)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


class Batches(Dataset):
    def __init__(self, run: int) -> None:
        self._run = run

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        if index == 2 and os.getpid() != self._run:
            threading.Thread(target=end_slowly).start()
            return LostOnTheWay()
        return index


def test_a_worker_counts_as_killed_though_its_status_comes_after_its_connections_end(
    capfd: pytest.CaptureFixture[str],
):
    batches: Any = Batches(os.getpid())
    plans = RememberingSampler(SequentialSampler(batches))
    loader = StepLoader(batches, batch_size=None, sampler=plans, num_workers=1)
    assert list(loader) == list(range(6))
    assert loader.lost_worker
    assert "was killed by SIGKILL" in capfd.readouterr().err
