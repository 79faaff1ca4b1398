"""Ranks that Lightning itself starts, without torchrun or a scheduler: when one fails, all end.

Lightning's launcher kills all ranks when one that it started fails. When the process that started
them fails, the others wait for it until the strategy's timeout.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from subprocess import Popen, TimeoutExpired

from lightning import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from kto_lightning.errors import KTOError

_STARTED_BY = "KTO_LIGHTNING_STARTED_BY"
"""Environment variable with the id of the process that a rank must not outlive."""
_GRACE = 5.0
"""Seconds for ranks that meet the same error, or have finished too, to end by themselves."""


@contextmanager
def terminate_ranks_together(trainer: Trainer) -> Iterator[None]:
    """End the ranks that Lightning starts within the block when the block or this process ends.

    Args:
        trainer: the run's, before it has started any.

    Raises:
        KTOError: in a rank whose parent process has ended already.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        yield
    elif launcher.cluster_environment.creates_processes_externally:
        _end_with_starter()
        yield
    else:
        os.environ[_STARTED_BY] = str(os.getpid())
        try:
            yield
        finally:
            del os.environ[_STARTED_BY]
            started = list(launcher.procs)
            launcher.procs.clear()  # else the launcher kills this process for their exit status
            _wait_or_kill(started)


def _wait_or_kill(processes: list[Popen[bytes]]) -> None:
    """Wait for `_GRACE`, then kill: a rank inside a collective does not react to SIGTERM."""
    until = time.monotonic() + _GRACE
    try:
        for process in processes:
            with suppress(TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _end_with_starter() -> None:
    starter = int(os.environ.get(_STARTED_BY, 0))
    if not starter or os.environ.get("LOCAL_RANK") == "0":  # started by torchrun or a scheduler
        return
    if os.getppid() != starter:
        raise KTOError("the process that started this rank has ended.")
    threading.Thread(target=_exit_with_parent, args=(starter,), daemon=True).start()


def _exit_with_parent(starter: int) -> None:
    while os.getppid() == starter:
        time.sleep(1.0)
    print("error: the process that started this rank has ended.", file=sys.stderr, flush=True)
    os._exit(1)  # the main thread may be waiting in a collective for a rank that has ended
