"""Ranks that Lightning starts itself, without torchrun or a scheduler: all of them end, whichever
of them fails.

Lightning's launcher kills all when one that it started fails. One that fails in the process that
started them leaves the others waiting for it, for as long as the strategy's timeout is.
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
"""The environment variable that tells a rank which process it is not to outlive."""
_GRACE = 5.0
"""Seconds in which ranks that meet the same error, or are done as well, end by themselves."""


@contextmanager
def terminate_ranks_together(trainer: Trainer) -> Iterator[None]:
    """Train, validate or predict in this block: what Lightning starts in it ends with it, or with
    this process.

    Args:
        trainer: the run's, which has started nothing yet.

    Raises:
        KTOError: in a rank that was started by a process that has ended since.
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
            launcher.procs.clear()  # else the launcher kills this process for what they return
            _wait_or_kill(started)


def _wait_or_kill(processes: list[Popen[bytes]]) -> None:
    """A rank that waits for another in a collective does not answer SIGTERM."""
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
    if not starter or os.environ.get("LOCAL_RANK") == "0":  # torchrun's or a scheduler's
        return
    if os.getppid() != starter:
        raise KTOError("the process that started this rank has ended.")
    threading.Thread(target=_exit_with_parent, args=(starter,), daemon=True).start()


def _exit_with_parent(starter: int) -> None:
    while os.getppid() == starter:
        time.sleep(1.0)
    print("error: the process that started this rank has ended.", file=sys.stderr, flush=True)
    os._exit(1)  # the main thread may wait for a rank that does not come any more
