"""Checkpoint files: written whole with a checksum of every byte, checked before they are read.

A strategy that shards the model writes directories instead (`sharded_checkpoint`), which are read
here too.

A file is what `torch.save` writes, followed by a line with the SHA-256 of all bytes before it,
which `torch.load` and `zipfile` ignore. The CRC-32 that the zip format keeps for each entry does
not cover the zip's own index, and a changed byte there can load one tensor in place of another. A
file without that line is one of before it was written, if it ends where its zip ends, and is
checked by the CRC-32 of its entries; anything else behind the zip is a damaged checksum.
"""

import stat
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZipFile

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH

from kto_lightning import sharded_checkpoint
from kto_lightning.errors import KTOError
from kto_lightning.sharded_checkpoint import (
    HashingFile,
    delete,
    is_whole_directory,
    part_of,
    put_in_place,
    read_checkpoint,
    writing_error,
)

_MARK = b"\nkto_lightning sha256 "
_TRAILER_SIZE = len(_MARK) + 64 + 1
_END_OF_ZIP = b"PK\x05\x06"
_END_OF_ZIP_SIZE = 22
"""Bytes of the zip's last record, without a comment."""
_CHUNK = 1 << 20
_TICK_NS = 2 * 10**9
"""A file that changed within this time may change again without another time of change."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a file beside the target, syncs it to disk and renames it.

    Lightning's own writes to the default temporary directory and moves the file, which is not
    atomic across file systems.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(target)
        hashing: Any = None
        try:
            if part.is_dir():  # left by a killed run that wrote directories
                delete(part)
            with part.open("wb") as file:
                hashing = HashingFile(file)  # with what `torch.save` needs of a file
                torch.save(checkpoint, hashing)
                file.write(_trailer(hashing.digest.hexdigest()))
                hashing.sync()
            put_in_place(part, target)
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            # `torch.save` hides it behind its own.
            raise writing_error(target, (hashing and hashing.error) or error) from error

    def load_checkpoint(
        self,
        path: _PATH,
        map_location: Callable | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load tensors and plain values only, so that a foreign checkpoint cannot run code.

        Raises:
            KTOError: if the checkpoint is damaged or was not written by `fit`.
        """
        if Path(path).is_dir():
            return _checked(read_checkpoint(Path(path)), path)
        return _load(path, map_location=map_location)

    def map_checkpoint(self, path: _PATH) -> dict[str, Any]:
        """Load a file whose tensors are mapped into memory, so that only what is used of them is
        read; they must be copied before the file may be removed.

        Raises:
            KTOError: as `load_checkpoint`.
        """
        return _load(path, map_location="cpu", mmap=True)

    def remove_checkpoint(self, path: _PATH) -> None:
        sharded_checkpoint.remove_checkpoint(Path(path))


def _load(path: _PATH, **options: Any) -> dict[str, Any]:
    if not is_whole(Path(path)):
        raise _unreadable(path)
    try:
        checkpoint = torch.load(path, weights_only=True, **options)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # unpickling a foreign file may raise any
        raise _unreadable(path) from error
    return _checked(checkpoint, path)


def _checked(checkpoint: dict[str, Any], path: _PATH) -> dict[str, Any]:
    problem = problem_of(checkpoint)
    if problem is not None:
        raise KTOError(
            f"{path} was not written by kto_lightning: it has {problem}. Give a checkpoint "
            "that `fit` wrote."
        )
    return checkpoint


def _unreadable(path: _PATH) -> KTOError:
    return KTOError(
        f"{path} is not a readable checkpoint, or it is damaged. Give one that `fit` wrote, or "
        "--ckpt_path last."
    )


def _trailer(digest: str) -> bytes:
    return _MARK + digest.encode() + b"\n"


def is_whole(path: Path) -> bool:
    """Whether this is a regular file of which every byte matches its checksum, or a directory with
    all files of a sharded checkpoint in their sizes.

    A file is read to its end, once per process as long as it stays as it is; the checksums of a
    directory are compared when it is loaded.
    """
    if path.is_dir():
        return is_whole_directory(path)
    try:
        status = path.stat()  # before it is opened: a pipe would never end
        if not stat.S_ISREG(status.st_mode):
            return False
        key = path.resolve(), status.st_ino, status.st_size, status.st_mtime_ns
        if time.time_ns() - status.st_mtime_ns < _TICK_NS:
            return _matches_checksum.__wrapped__(*key)
        return _matches_checksum(*key)
    except OSError:
        return False


@lru_cache(maxsize=8)
def _matches_checksum(path: Path, inode: int, size: int, changed_ns: int) -> bool:
    """Whether the content is whole; inode, size and time of change tell the cache of another."""
    with path.open("rb") as file:
        file.seek(max(0, size - _TRAILER_SIZE))
        end = file.read()
        if not end.startswith(_MARK):
            return _matches_zip(file, end)
        file.seek(0)
        digest, left = sha256(), size - _TRAILER_SIZE
        while left > 0 and (chunk := file.read(min(_CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
        return end == _trailer(digest.hexdigest())


def _matches_zip(file: BinaryIO, end: bytes) -> bool:
    """Whether a file without checksum is a zip, to its last byte, and its entries match theirs."""
    last = end[-_END_OF_ZIP_SIZE:]
    if not last.startswith(_END_OF_ZIP) or not last.endswith(b"\0\0"):
        return False
    try:
        with ZipFile(file) as archive:
            return archive.testzip() is None
    except OSError:
        raise
    except Exception:  # what a damaged index leads to: an unknown method, encryption, any offset
        return False


def read_header(path: Path) -> dict[str, Any] | None:
    """A checkpoint without the data of its large tensors, which are on the device `meta`; None if
    it is damaged or was not written by `fit`."""
    if not is_whole(path):
        return None
    try:
        if path.is_dir():
            header = sharded_checkpoint.read_header(path)
        else:
            header = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except (OSError, MemoryError):
        raise
    except Exception:  # unpickling a foreign file may raise any
        return None
    return header if problem_of(header) is None else None


def problem_of(checkpoint: Any) -> str | None:
    """What a checkpoint lacks that `fit` writes in every one; None: nothing."""
    if not isinstance(checkpoint, Mapping):
        return "no checkpoint"
    for name, kind in (("state_dict", Mapping), ("kto", Mapping), ("global_step", int)):
        if not isinstance(checkpoint.get(name), kind):
            return f"no {name}"
    return None


def problem_of_resuming(checkpoint: Mapping[str, Any]) -> str | None:
    """What a checkpoint lacks to be trained further; None: nothing."""
    for name in ("optimizer_states", "lr_schedulers"):
        states = checkpoint.get(name)
        if not isinstance(states, list) or not all(isinstance(one, dict) for one in states):
            return f"no {name}"
        if len(states) != 1:
            return f"no {name}"
    loops = checkpoint.get("loops")
    fit_loop = loops.get("fit_loop") if isinstance(loops, Mapping) else None
    if not isinstance(fit_loop, Mapping) or "epoch_progress" not in fit_loop:
        return "no loops"
    return None
