"""Writing sharded checkpoints, by all ranks side by side, at once or in the background."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.tensor import DTensor
from torch.futures import Future

from kto_lightning.errors import KTOError
from kto_lightning.sharded_checkpoint.files import (
    HEADER,
    LIST,
    METADATA,
    HashingFile,
    delete,
    list_of_files,
    part_of,
    put_in_place,
    sync_directory,
)
from kto_lightning.sharded_checkpoint.tensors import map_tensors


class CheckpointWriter:
    """Writes the sharded checkpoints of a run, one at a time. Every rank makes one and calls its
    methods at the same steps.

    Args:
        timeout: how long a rank waits for another.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self._timeout = timeout
        self._group: Any = None
        self._pending: Any = None
        self._target = Path()

    def write(self, checkpoint: Mapping[str, Any], target: Path, *, background: bool) -> None:
        """Write a checkpoint in place of an older one of its name, after a pending one.

        Args:
            checkpoint: on rank 0 all of it, on the others at least their shards.
            target: the directory, in one that all hosts share.
            background: copy the shards to host memory and write them in a thread; `finish` tells
                when it is whole.

        Raises:
            KTOError: on all ranks, if it cannot be written.
        """
        self.finish(wait=True)
        if self._group is None:
            # A background save must not share a group with the steps that run beside it.
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        shards: dict[str, Any] = {}
        header = _without_shards(checkpoint, shards)
        writer = _Writer(target, _saved(header) if dist.get_rank() == 0 else b"")
        options: Any = {
            "storage_writer": writer,
            "planner": DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            "process_group": self._group,
        }
        self._target = target
        if background:
            stager = DefaultStager(StagingOptions(False, False, False, False))
            self._pending = async_save(shards, async_stager=stager, **options)
            self._pending.add_done_callback(lambda _: stager.close())
            return
        try:
            save(shards, **options)
        except CheckpointException as error:
            raise self._failure(error) from error

    def finish(self, *, wait: bool) -> bool:
        """Whether no checkpoint is being written any more, on all ranks alike.

        Args:
            wait: until it is.

        Raises:
            KTOError: on all ranks, if the pending one could not be written.
        """
        if self._pending is None:
            return True
        if not wait:
            done = [False] * dist.get_world_size()
            dist.all_gather_object(done, self._pending.done())
            if not all(done):
                return False
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except CheckpointException as error:
            raise self._failure(error) from error
        return True

    def _failure(self, error: CheckpointException) -> KTOError:
        shutil.rmtree(part_of(self._target), ignore_errors=True)
        rank, (cause, _) = min(error.failures.items(), key=lambda one: one[0])
        if isinstance(cause, KTOError):
            return cause
        where = f" (rank {rank})" if dist.get_world_size() > 1 else ""
        return writing_error(self._target, f"{cause}{where}")


def writing_error(target: Path, cause: object) -> KTOError:
    """The error for a checkpoint that could not be written."""
    return KTOError(
        f"the checkpoint {target} cannot be written: {cause}. Earlier checkpoints are whole; free "
        "some space, then resume with --ckpt_path last."
    )


def write_directory(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write one checkpoint, on all ranks; see `CheckpointWriter.write`."""
    CheckpointWriter().write(checkpoint, path, background=False)


def _without_shards(checkpoint: Mapping[str, Any], shards: dict[str, Any]) -> dict[str, Any]:
    """A copy of a checkpoint with its sharded tensors on `meta`, which go to `shards`."""

    def part(name: str, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            shards[name] = tensor
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        # A view would be saved with all of its storage, a background save needs the value of now.
        return tensor.detach().to("cpu", copy=True)

    return map_tensors(checkpoint, part)


def _saved(header: dict[str, Any]) -> bytes:
    buffer = BytesIO()
    torch.save(header, buffer)
    return buffer.getvalue()


class _HashingFiles(FileSystem):
    """Syncs each file to disk when it is closed, and keeps its size and SHA-256 in `written`."""

    def __init__(self) -> None:
        self.written: dict[str, tuple[int, str]] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with Path(path).open("wb") as file:
            hashing = HashingFile(file)
            try:
                yield hashing
                hashing.sync()
            except Exception as error:
                raise (hashing.error or error) from None
        self.written[Path(path).name] = (hashing.size, hashing.digest.hexdigest())


class _Writer(FileSystemWriter):
    """Writes the part of a checkpoint; the first rank makes it whole once all have written theirs.

    Args:
        target: the checkpoint's directory.
        header: content of its header file; used by the first rank only.
    """

    def __init__(self, target: Path, header: bytes) -> None:
        super().__init__(part_of(target), sync_files=False)
        self.fs: Any = _HashingFiles()
        self._part, self._target, self._header = part_of(target), target, header

    def storage_meta(self) -> None:
        """Nothing: a checkpoint may be moved."""

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        """On the first rank, before any writes."""
        delete(self._part)
        self._part.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: Any, planner: Any) -> Future[Any]:
        self._part.mkdir(parents=True, exist_ok=True)
        results = super().write_data(plan, planner).wait()
        sync_directory(self._part)
        written: Future[Any] = Future()
        written.set_result([*results, self.fs.written])
        return written

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:
        """On the first rank, after all have written."""
        files: dict[str, tuple[int, str]] = {}
        for rank, (*_, written) in enumerate(results):
            self._check_visible(rank, written)
            files |= written
        with self.fs.create_stream(self._part / HEADER, "wb") as file:
            file.write(self._header)
        super().finish(metadata, [one[:-1] for one in results])
        files |= self.fs.written
        files[METADATA] = files.pop(f"{METADATA}.tmp")
        with self.fs.create_stream(self._part / LIST, "wb") as file:
            file.write(list_of_files(files))
        sync_directory(self._part)
        put_in_place(self._part, self._target)

    def _check_visible(self, rank: int, written: dict[str, tuple[int, str]]) -> None:
        for name, (size, _) in written.items():
            path = self._part / name
            if not path.exists():
                raise KTOError(
                    f"the checkpoint {self._target} cannot be written: rank 0 does not see what "
                    f"rank {rank} wrote there. Give an --output_dir that all hosts share."
                )
            if path.stat().st_size != size:
                raise OSError(f"{name} has lost some of its bytes")
