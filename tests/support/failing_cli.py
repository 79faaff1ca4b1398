"""The command line as a process of its own, to whose ranks something happens in step 3.

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
    """As in a collective of NCCL: no other rank's end is noticed, and no signal answered."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    time.sleep(600)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_asked_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def ask_the_launcher() -> None:
    os.kill(os.getppid(), signal.SIGTERM)


ACTIONS = {
    "fail": fail,
    "hang": hang,
    "killed": be_killed,
    "asked": be_asked_to_stop,
    "asks": ask_the_launcher,
}


def act_in_step_three(given: str) -> None:
    """Give this process's rank what is meant for it.

    Args:
        given: rank and action (`0=fail`), several of them with commas.
    """
    actions = dict(part.split("=") for part in given.split(","))
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
