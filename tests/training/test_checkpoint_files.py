"""Checkpoint files: every damaged byte is found, and a file of another type never hangs."""

import os
import pickle
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from kto_lightning.errors import KTOError
from kto_lightning.training.checkpoint_files import (
    AtomicCheckpointIO,
    is_whole,
    part_of,
    read_header,
)

TRAILER_SIZE = len(b"\nkto_lightning sha256 ") + 64 + 1


def checkpoint() -> dict[str, Any]:
    tensors = {f"weight.{i}": torch.randn(5, 7) for i in range(6)}
    return {"state_dict": tensors, "kto": {"beta": 0.1}, "global_step": 3}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "step=3.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(), path)
    return path


def strip_checksum(path: Path) -> None:
    """Make it a file of before there were checksums."""
    os.truncate(path, path.stat().st_size - TRAILER_SIZE)


def test_the_checksum_is_no_obstacle_to_other_readers(saved: Path):
    for mmap in (False, True):
        loaded = torch.load(saved, weights_only=True, mmap=mmap)
        assert loaded["kto"] == {"beta": 0.1}
    assert zipfile.ZipFile(saved).testzip() is None
    assert is_whole(saved)
    assert not list(saved.parent.glob(".*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named_in_the_words_of_the_system(tmp_path: Path):
    path = tmp_path / "step=3.ckpt"
    part_of(path).symlink_to("/dev/full")
    large = checkpoint() | {"padding": torch.zeros(100_000)}
    with pytest.raises(KTOError, match=r"cannot be written: .*No space left on device"):
        AtomicCheckpointIO().save_checkpoint(large, path)
    assert not path.exists()


def test_every_single_changed_byte_is_found(saved: Path):
    content = saved.read_bytes()
    random, size = Random(0), len(content)
    index = content.rindex(b"PK\x01\x02")  # the zip's index, its end, and the checksum
    places = [*random.sample(range(index), 300), *range(index, size)]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << random.randrange(8)
        saved.write_bytes(changed)
        assert not is_whole(saved), place
    for length in (0, 1, 21, size // 2, size - TRAILER_SIZE - 1, size - TRAILER_SIZE + 1, size - 1):
        saved.write_bytes(content[:length])
        assert not is_whole(saved), length


def test_a_file_of_before_checksums_is_checked_by_its_zip(saved: Path):
    strip_checksum(saved)
    assert is_whole(saved)
    header = read_header(saved)
    assert header is not None
    assert header["global_step"] == 3
    content = saved.read_bytes()
    start, end = content.index(b"PK\x01\x02"), len(content)
    for place in [content.index(b"data/0") + 80, *range(start, end, 7)]:
        changed = bytearray(content)
        changed[place] ^= 0xFF
        saved.write_bytes(changed)
        found = is_whole(saved)  # whatever it says, it raises nothing, and neither does reading
        assert read_header(saved) is None or found


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def make_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(checkpoint()["kto"]))


def make_other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"no pickle")


def make_foreign(path: Path) -> None:
    torch.save({"state_dict": {}, "epoch": 1}, path)


def make_unreadable(path: Path) -> None:
    path.write_bytes(b"x")
    path.chmod(0)


OTHERS = (
    Path.mkdir,
    Path.touch,
    make_pipe,
    make_link_to_nothing,
    make_pickle,
    make_other_zip,
    make_foreign,
    make_unreadable,
)


@pytest.mark.parametrize("make", OTHERS)
def test_what_is_no_checkpoint_is_refused(make: Any, tmp_path: Path):
    path = tmp_path / "step=1.ckpt"
    make(path)
    assert read_header(path) is None
    with pytest.raises(KTOError, match=r"is not a readable checkpoint|was not written by"):
        AtomicCheckpointIO().load_checkpoint(path)
