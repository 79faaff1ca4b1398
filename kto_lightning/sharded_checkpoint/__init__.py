"""Sharded checkpoints: directories that all ranks write side by side, whole or absent.

    step=N.ckpt/
        header.pt              the checkpoint dict, its sharded tensors on the device `meta`
        .metadata, *.distcp    the sharded tensors, by `torch.distributed.checkpoint`
        files.json             size and SHA-256 of each of these files, and of this list itself

Everything is written to `.step=N.ckpt.part`, `files.json` last, which is then renamed. A sharded
tensor is named by its path in the checkpoint dict, joined by dots: a weight `policy.model.x.weight`
of `checkpoint["state_dict"]` is `state_dict.policy.model.x.weight`. Tensors that are not sharded
are part of the header, with the values of rank 0.
"""

from kto_lightning.sharded_checkpoint.files import (
    HashingFile,
    delete,
    is_sharded,
    is_whole_directory,
    part_of,
    put_in_place,
    remove_checkpoint,
    remove_leftovers,
    verify_directory,
)
from kto_lightning.sharded_checkpoint.reading import (
    ShardedHeader,
    read_checkpoint,
    read_header,
    read_tensors,
)
from kto_lightning.sharded_checkpoint.writing import (
    CheckpointWriter,
    write_directory,
    writing_error,
)

__all__ = [
    "CheckpointWriter",
    "HashingFile",
    "ShardedHeader",
    "delete",
    "is_sharded",
    "is_whole_directory",
    "part_of",
    "put_in_place",
    "read_checkpoint",
    "read_header",
    "read_tensors",
    "remove_checkpoint",
    "remove_leftovers",
    "verify_directory",
    "write_directory",
    "writing_error",
]
