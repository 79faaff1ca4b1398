"""Ranks of this machine without torchrun or a scheduler: the first starts the others, and all end
together.

Lightning would start them too. It takes ranks that have `LOCAL_RANK` for started, as its
documentation of `ClusterEnvironment` says, so that how they end is decided here.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from subprocess import Popen, TimeoutExpired

from lightning import Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import ParallelStrategy

from kto_lightning.strategies.parent import STARTED_BY

GRACE = 5.0
"""Seconds for ranks that meet the same error, or have finished too, to end by themselves."""


@contextmanager
def launch_ranks(trainer: Trainer) -> Iterator[None]:
    """Start the other ranks of this machine if no launcher has, as this process was started, and
    end them when the block or this process ends. One that fails alone ends this process.

    Args:
        trainer: the run's, before it has started any.
    """
    strategy = trainer.strategy
    environment = strategy.cluster_environment if isinstance(strategy, ParallelStrategy) else None
    launched = getattr(environment, "creates_processes_externally", True)
    if launched or not isinstance(environment, LightningEnvironment) or trainer.num_devices == 1:
        yield
        return
    settings = _settings(environment, trainer)
    os.environ.update(settings)
    ranks: list[Popen[bytes]] = []
    ended = threading.Event()
    try:
        for local_rank in range(1, trainer.num_devices):
            own = {"LOCAL_RANK": str(local_rank), STARTED_BY: str(os.getpid())}
            command = [sys.executable, *sys.orig_argv[1:]]
            ranks.append(Popen(command, env=os.environ | own))
        threading.Thread(target=_end_with_failed, args=(ranks, ended), daemon=True).start()
        yield
    finally:
        ended.set()
        _wait_or_kill(ranks)
        for name in settings:
            os.environ.pop(name, None)


def _settings(environment: LightningEnvironment, trainer: Trainer) -> dict[str, str]:
    """The environment variables by which the ranks find each other."""
    return {
        "MASTER_ADDR": environment.main_address,
        "MASTER_PORT": str(environment.main_port),
        "NODE_RANK": str(environment.node_rank()),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(trainer.num_devices * trainer.num_nodes),
    }


def _end_with_failed(ranks: list[Popen[bytes]], ended: threading.Event) -> None:
    """End this process if a rank has failed and the block does not end: its main thread may be in
    a collective with that rank. The kernel then ends the other ranks."""
    while not ended.wait(0.5):
        failed = [number for number, rank in enumerate(ranks, start=1) if rank.poll()]
        if failed and not ended.wait(GRACE):
            status = ranks[failed[0] - 1].returncode
            status = status if status > 0 else 128 - status  # as a shell tells a signal
            message = f"rank {failed[0]} of this machine has ended with exit status {status}."
            print(f"error: {message}", file=sys.stderr, flush=True)
            _kill(ranks)
            os._exit(1)


def _wait_or_kill(ranks: list[Popen[bytes]]) -> None:
    """Wait for `GRACE`, then kill: a rank inside a collective does not react to SIGTERM."""
    until = time.monotonic() + GRACE
    try:
        for rank in ranks:
            with suppress(TimeoutExpired):
                rank.wait(max(0.0, until - time.monotonic()))
    finally:
        _kill(ranks)


def _kill(ranks: list[Popen[bytes]]) -> None:
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.wait()
