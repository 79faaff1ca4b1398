"""The command line as a process whose ranks fail, hang or get a signal in step 3.

python -m tests.support.failing_cli 0=fail,1=hang fit …
"""

import os
import signal
import sys
import time
from typing import Any

from kto_lightning.errors import ModelError
from kto_lightning.module import KTOModule


def fail() -> None:
    raise ModelError("this rank alone fails.")


def hang() -> None:
    """As in a collective of NCCL: neither signals nor the end of another rank interrupt it."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    time.sleep(600)


def pause() -> None:
    """Long enough for a test to notice the step and act within it."""
    time.sleep(3.0)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate_self() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def terminate_parent() -> None:
    os.kill(os.getppid(), signal.SIGTERM)


ACTIONS = {
    "fail": fail,
    "hang": hang,
    "pause": pause,
    "killed": kill_self,
    "sigterm": terminate_self,
    "sigterm_to_parent": terminate_parent,
}


def act_in_step_three(arguments: str) -> None:
    """Let this process's rank perform its action in step 3.

    Args:
        arguments: rank and action (`0=fail`), separated by commas.
    """
    actions = dict(part.split("=") for part in arguments.split(","))
    step = KTOModule.training_step

    def training_step(self: KTOModule, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 2 and str(self.global_rank) in actions:
            ACTIONS[actions[str(self.global_rank)]]()
        step(self, batch, batch_idx)

    KTOModule.training_step = training_step


if __name__ == "__main__":
    from kto_lightning.__main__ import main

    act_in_step_three(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
