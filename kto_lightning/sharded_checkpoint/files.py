"""Files of a sharded checkpoint: their checksums, the names they get, and how they are removed."""

import json
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import torch.distributed as dist

from kto_lightning.errors import KTOError

HEADER = "header.pt"
METADATA = ".metadata"
LIST = "files.json"
_CHUNK = 1 << 20


class HashingFile:
    """A file to write to, from its start to its end, which hashes what is written.

    Attributes:
        digest: of the bytes so far.
        size: of the file, in bytes.
        error: what the operating system refused; `torch.save` hides it behind its own.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.size += written
        return written

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Nothing: who opened the file closes it."""

    def sync(self) -> None:
        """Write what was buffered to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())


def is_whole_directory(path: Path) -> bool:
    """Whether this is a checkpoint directory in which every file has its size. Only the list of
    files is read; `verify_directory` reads the rest."""
    try:
        files = _listed(path)
        return files is not None and all(
            stat.S_ISREG(status.st_mode) and status.st_size == size
            for name, (size, _) in files.items()
            for status in [(path / name).lstat()]
        )
    except OSError:
        return False


def is_sharded(path: Path) -> bool:
    """Whether this is a directory that holds files of a sharded checkpoint, damaged or not."""
    return any((path / name).exists() for name in (HEADER, LIST))


def verify_directory(path: Path, *, together: bool = False) -> None:
    """Compare every file with its checksum.

    Args:
        path: of the checkpoint.
        together: each rank reads its share of the files and learns what the others found; every
            rank must call it.

    Raises:
        KTOError: with the files that are damaged or missing, on all ranks alike.
    """
    together = together and dist.is_initialized()
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    files = _listed(path) if is_whole_directory(path) else None
    damaged: list[str] = [LIST] if files is None else []
    for name, (_, digest) in sorted((files or {}).items())[rank::num_ranks]:
        if _digest(path / name) != digest:
            damaged.append(name)
    if together:
        found: list[list[str]] = [[] for _ in range(num_ranks)]
        dist.all_gather_object(found, damaged)
        damaged = sorted({name for names in found for name in names})
    if damaged:
        raise damaged_error(path, damaged)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, a file or a directory, so that no part of it can look whole."""
    hidden = path.with_name(f".{path.name}.removed")
    delete(hidden)
    with suppress(FileNotFoundError):  # removed by hand
        os.replace(path, hidden)
    delete(hidden)


def remove_leftovers(directory: Path) -> None:
    """Remove what killed runs left of checkpoints that they wrote or removed."""
    for kind in ("part", "removed"):
        for path in directory.glob(f".step=*.ckpt.{kind}"):
            with suppress(OSError):
                delete(path)


def put_in_place(part: Path, target: Path) -> None:
    """Give a checkpoint its name, in place of an older one, and sync the directory."""
    older = os.path.lexists(target) and (target.is_dir() or part.is_dir())
    hidden = target.with_name(f".{target.name}.removed")
    if older:  # only a file can replace a file in one step
        delete(hidden)
        os.replace(target, hidden)
    os.replace(part, target)
    sync_directory(target.parent)
    if older:
        delete(hidden)


def part_of(checkpoint: Path) -> Path:
    """The name under which a checkpoint is written before it is whole."""
    return checkpoint.with_name(f".{checkpoint.name}.part")


def sync_directory(directory: Path) -> None:
    """Write the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete(path: Path) -> None:
    """Remove a file or a directory with all that is in it, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def list_of_files(files: Mapping[str, tuple[int, str]]) -> bytes:
    """The content of the list of files: one form for one list, so that no byte of it can change."""
    listed = {name: {"size": size, "sha256": digest} for name, (size, digest) in files.items()}
    own = sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    content = {"files": listed, "sha256": own}
    return f"{json.dumps(content, sort_keys=True, indent=1)}\n".encode()


def _listed(path: Path) -> dict[str, tuple[int, str]] | None:
    """Size and SHA-256 of each file of a checkpoint; None: it is damaged, or no checkpoint.

    Raises:
        OSError: if the list cannot be read.
    """
    file = path / LIST
    if not stat.S_ISREG(file.lstat().st_mode):
        return None
    content = file.read_bytes()
    try:
        files = {
            str(name): (int(one["size"]), str(one["sha256"]))
            for name, one in json.loads(content)["files"].items()
        }
        whole = list_of_files(files) == content
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    plain = all(name == os.path.basename(name) for name in files)
    return files if whole and plain and {HEADER, METADATA} <= files.keys() else None


def _digest(file: Path) -> str | None:
    """The SHA-256 of a file; None: it cannot be read."""
    try:
        with file.open("rb") as opened:
            digest = sha256()
            while chunk := opened.read(_CHUNK):
                digest.update(chunk)
            return digest.hexdigest()
    except OSError:
        return None


def checked_content(path: Path, name: str) -> bytes:
    """The content of a file that matches its checksum."""
    try:
        files = _listed(path) if is_whole_directory(path) else None
        content = (path / name).read_bytes()
    except OSError as error:
        raise damaged_error(path, [name]) from error
    if files is None or sha256(content).hexdigest() != files[name][1]:
        raise damaged_error(path, [LIST if files is None else name])
    return content


def damaged_error(path: Path, names: Iterable[str]) -> KTOError:
    """The error for a checkpoint of which these files are damaged or missing."""
    return KTOError(
        f"{path} is not a readable checkpoint, or it is damaged ({', '.join(names)}). Give an "
        "earlier one by its path."
    )
