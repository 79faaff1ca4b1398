"""Checkpoints that are whole or not there at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH

from kto_lightning.errors import KTOError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, renames.

    Lightning's own writes to the default temporary directory and moves, which is not atomic across
    file systems.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
            _sync_directory(target.parent)
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            raise KTOError(
                f"the checkpoint {target} cannot be written: {error}. Checkpoints before it are "
                "whole; make room or choose another --output_dir, then go on with --ckpt_path last."
            ) from error

    def load_checkpoint(
        self,
        path: _PATH,
        map_location: Callable | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load tensors and plain values only: a checkpoint from elsewhere cannot run code."""
        return super().load_checkpoint(path, map_location, weights_only=True)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
