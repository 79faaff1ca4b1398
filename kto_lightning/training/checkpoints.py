"""Checkpoints that are whole or not there at all."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from torch import nn

from kto_lightning.errors import ConfigError, KTOError


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
        try:
            return super().load_checkpoint(path, map_location, weights_only=True)
        except (UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
            raise KTOError(
                f"{path} is no checkpoint that can be read, or it is damaged. Give one that `fit` "
                "wrote, or --ckpt_path last."
            ) from error


def is_whole(path: Path) -> bool:
    """Whether every byte of a checkpoint file is as it was written; a sharded one's is not read."""
    if path.is_dir():
        return True
    try:
        with ZipFile(path) as archive:  # which `torch.save` writes, with a checksum per entry
            return archive.testzip() is None
    except (BadZipFile, OSError, EOFError, zlib.error):
        return False


def check_weights_fit(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Refuse a checkpoint of another model: what does not fit would be left out without a word.

    Raises:
        ConfigError: unless it holds every trained weight of `module`, in its shape, and no other.
    """
    saved = checkpoint.get("state_dict")
    if not saved:
        return  # sharded: each rank loads its own part
    own = {name: weight.shape for name, weight in module.state_dict().items()}
    trained = [n for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad]
    wrong = [name for name in trained if name not in saved]
    wrong += [n for n, value in saved.items() if n not in own or own[n] != value.shape]
    if not wrong:
        return
    origin = checkpoint.get("kto", {})
    raise ConfigError(
        f"the checkpoint does not hold the weights of this policy ({len(wrong)} do not fit, "
        f"{wrong[0]} is one). It was saved with --model.policy {origin.get('policy')} and "
        f"--model.lora {origin.get('lora')}: give the same."
    )


def without_frozen(state: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """The part of a module's state that training changes: frozen weights are left out."""
    # Tied weights stand in the state under each of their names.
    parameters = module.named_parameters(remove_duplicate=False)
    frozen = {name for name, p in parameters if not p.requires_grad}
    # Four-bit weights keep their scales beside them, as `….weight.absmax`.
    return {
        name: value
        for name, value in state.items()
        if name not in frozen and _weight_of(name) not in frozen
    }


def _weight_of(name: str) -> str | None:
    weight, dot, _ = name.rpartition(".weight.")
    return f"{weight}.weight" if dot else None


def settle_progress(fit_loop: dict[str, Any], *, num_epochs: int, num_in_epoch: int) -> None:
    """Write where a run is in the one form from which Lightning 2.6 goes on rightly: within an
    epoch, its steps so far complete; after an epoch's last step, within the next, before its first.

    As it counts by itself, what it makes of a checkpoint depends on the hook that wrote it and on
    `max_steps`, and a run resumed at an epoch's edge writes counts that begin the epoch anew.

    Args:
        fit_loop: the state of the loops in a checkpoint.
        num_epochs: whole epochs that are done.
        num_in_epoch: steps of the next one that are done, fewer than it has.
    """
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]
    num_steps = batches["total"]["processed"]
    batches["total"] = dict.fromkeys(batches["total"], num_steps)
    batches["current"] = dict.fromkeys(batches["current"], num_in_epoch)
    batches["is_last_batch"] = False
    begun = {"ready": num_epochs + 1, "started": num_epochs + 1}
    for part in ("total", "current"):
        epochs[part] = {**begun, "processed": num_epochs, "completed": num_epochs}


def check_epochs_left(checkpoint: dict[str, Any], max_epochs: int | None) -> None:
    """Refuse to go on from behind where a run is to end.

    Raises:
        ConfigError: if more epochs are done than `max_epochs`; None or negative: unbounded.
    """
    done = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if max_epochs is not None and 0 <= max_epochs < done:
        raise ConfigError(
            f"{done} epochs are done where this checkpoint was saved, more than "
            f"--trainer.max_epochs {max_epochs}. Raise it, or go on from an earlier checkpoint."
        )


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
