"""A check at the start of a run on several hosts: all of them see the same OUTPUT."""

import time
from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from kto_lightning.distributed import raise_together
from kto_lightning.errors import ConfigError
from kto_lightning.training.run_lock import NAME, Holder, holder_from, this_process

PATIENCE = 20.0
"""Seconds for the lock file to appear on another host, whose file system may cache what it saw."""


class SharedOutput(Callback):
    """Ends a run on several hosts, on all ranks, if one of them has an OUTPUT of its own: its part
    of a checkpoint, or the checkpoint to resume from, would be missing.

    The lock file, which rank 0 has written, tells.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or trainer.num_nodes == 1:
            return
        output = Path(trainer.default_root_dir)
        holder = trainer.strategy.broadcast(this_process())
        problem = None
        if not _appears(holder, output / NAME):
            problem = ConfigError(
                f"--output_dir {output.resolve()} is not the directory of the same name on host "
                f"{holder.host}: {NAME}, which was written there, is missing. Give a directory on "
                "a file system that all hosts share."
            )
        raise_together(problem)


def _appears(holder: Holder, path: Path) -> bool:
    """Whether a file names a holder, now or before `PATIENCE` has passed."""
    until = time.monotonic() + PATIENCE
    while _holder_at(path) != holder:
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def _holder_at(path: Path) -> Holder | None:
    try:
        return holder_from(path.read_bytes())
    except OSError:
        return None
