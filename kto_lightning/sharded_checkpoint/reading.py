"""Reading sharded checkpoints, whole or shard by shard."""

import os
import pickle
import warnings
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from kto_lightning.errors import KTOError
from kto_lightning.sharded_checkpoint.files import (
    HEADER,
    LIST,
    METADATA,
    checked_content,
    damaged_error,
    verify_directory,
)
from kto_lightning.sharded_checkpoint.tensors import map_tensors

_METADATA_TYPES = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata"),
            *("TensorProperties", "_MEM_FORMAT_ENCODING"),
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


class ShardedHeader(dict[str, Any]):
    """A checkpoint dict whose sharded tensors are on the device `meta`; `read_tensors` reads them.

    Attributes:
        path: the checkpoint's directory.
    """

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        super().__init__(values)
        self.path = path


def read_header(path: Path) -> ShardedHeader:
    """A checkpoint without its sharded tensors, which are on the device `meta`. The checksums of
    the header and of the metadata are compared, not those of the tensors.

    Raises:
        KTOError: if it is damaged or is no sharded checkpoint.
    """
    content = checked_content(path, HEADER)
    _read_metadata(path)
    try:
        header = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # unpickling a foreign file may raise any
        raise damaged_error(path, [HEADER]) from error
    if not isinstance(header, dict):
        raise damaged_error(path, [HEADER])
    return ShardedHeader(header, path)


def read_tensors(path: Path, into: Mapping[str, Tensor]) -> None:
    """Read tensors of a checkpoint in place; a `DTensor` gets its own shard only.

    No rank waits for another, and no process group is needed. Checksums are not compared, except
    for the header's and the metadata's: see `verify_directory`.

    Args:
        path: of the checkpoint.
        into: by name, in the shapes that the checkpoint has; values are rounded to their dtypes.

    Raises:
        KTOError: if one is missing, has another shape, or cannot be read.
    """
    sharded = _read_metadata(path).state_dict_metadata
    plain = {name: value for name, value in into.items() if name not in sharded}
    if plain:
        _copy_plain(read_header(path), path, plain)
    shards: dict[str, Any] = {name: value for name, value in into.items() if name in sharded}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(shards, storage_reader=_Reader(path), planner=planner, no_dist=True)
    except CheckpointException as error:
        raise _unreadable(path, next(iter(error.failures.values()))[0]) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A whole checkpoint in host memory, after its files were verified.

    Raises:
        KTOError: if it is damaged or is no sharded checkpoint.
    """
    verify_directory(path)
    tensors: dict[str, Tensor] = {}

    def allocate(name: str, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            tensor = tensors[name] = torch.empty_like(tensor, device="cpu")
        return tensor

    try:
        whole = map_tensors(read_header(path), allocate)
    except RuntimeError as error:  # no memory
        raise _unreadable(path, error) from error
    read_tensors(path, tensors)
    return whole


def _copy_plain(header: Mapping[str, Any], path: Path, into: Mapping[str, Tensor]) -> None:
    plain: dict[str, Tensor] = {}
    map_tensors(header, plain.__setitem__)
    for name, value in into.items():
        if name not in plain or plain[name].is_meta or plain[name].shape != value.shape:
            raise _unreadable(path, f"it has no tensor {name} of shape {tuple(value.shape)}")
        value.detach().copy_(plain[name])


class _MetadataUnpickler(pickle.Unpickler):
    """Builds nothing but what the metadata consist of, so that a foreign file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_TYPES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is not part of metadata")


def _read_metadata(path: Path) -> Any:
    file = path / LIST
    try:
        return _unpickled_metadata(path.absolute(), file.stat().st_mtime_ns)
    except OSError as error:
        raise damaged_error(path, [LIST]) from error


@lru_cache(maxsize=2)
def _unpickled_metadata(path: Path, changed_ns: int) -> Any:
    """The metadata; the time of change tells the cache of another checkpoint of that name."""
    content = checked_content(path, METADATA)
    try:
        metadata = _MetadataUnpickler(BytesIO(content)).load()
        files = {info.relative_path for info in metadata.storage_data.values()}
        if all(name == os.path.basename(name) for name in files):
            return metadata
    except MemoryError:
        raise
    except Exception as error:  # unpickling a foreign file may raise any
        raise damaged_error(path, [METADATA]) from error
    raise damaged_error(path, [METADATA])


class _Reader(FileSystemReader):
    """Reads metadata that were verified."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        return _read_metadata(Path(self.path))


def _unreadable(path: Path, cause: object) -> KTOError:
    return KTOError(f"{path} cannot be read: {cause}. Give an earlier checkpoint by its path.")
