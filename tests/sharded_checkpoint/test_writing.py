"""Sharded checkpoints as they are written: whole or absent, at once or in the background."""

import errno
import os
import shutil
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from kto_lightning.errors import KTOError
from kto_lightning.sharded_checkpoint import (
    CheckpointWriter,
    HashingFile,
    is_whole_directory,
    read_checkpoint,
    remove_checkpoint,
    remove_leftovers,
    verify_directory,
    write_directory,
    writing,
)
from kto_lightning.training.checkpoint_files import AtomicCheckpointIO
from tests.sharded_checkpoint.conftest import make_checkpoint, whole

pytestmark = pytest.mark.usefixtures("group")
EARLIER = {"state_dict": {}, "kto": {}, "global_step": 3}


def assert_only(directory: Path, *names: str) -> None:
    assert sorted(path.name for path in directory.iterdir()) == sorted(names)


def test_what_is_written_is_whole(tmp_path: Path):
    path = tmp_path / "checkpoints" / "step=3.ckpt"
    write_directory(make_checkpoint(), path)
    assert is_whole_directory(path)
    verify_directory(path)
    assert_only(path.parent, path.name)
    assert_only(path, ".metadata", "__0_0.distcp", "files.json", "header.pt")


def test_a_background_save_writes_the_values_of_its_start(tmp_path: Path, monkeypatch):
    saving = Event()
    sync = HashingFile.sync
    monkeypatch.setattr(HashingFile, "sync", lambda self: saving.wait() and sync(self))
    path, checkpoint, writer = tmp_path / "step=3.ckpt", make_checkpoint(), CheckpointWriter()
    expected = whole(make_checkpoint())
    writer.write(checkpoint, path, background=True)
    with torch.no_grad():
        checkpoint["state_dict"]["policy.a.weight"].zero_()
    checkpoint["optimizer_states"][0]["state"][0]["step"].zero_()
    checkpoint["kto"]["beta"] = 0.5
    assert not writer.finish(wait=False)
    assert not path.exists()
    saving.set()
    assert writer.finish(wait=True)
    torch.testing.assert_close(read_checkpoint(path), expected, rtol=0, atol=0)
    assert writer.finish(wait=False)


def test_the_next_save_waits_for_the_one_before(tmp_path: Path):
    writer = CheckpointWriter()
    for step in (1, 2):
        writer.write(make_checkpoint(step), tmp_path / f"step={step}.ckpt", background=True)
    assert is_whole_directory(tmp_path / "step=1.ckpt")
    writer.finish(wait=True)
    verify_directory(tmp_path / "step=2.ckpt")


def fill_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let writes to one file fail as on a full disk."""
    write = HashingFile.write

    def write_or_fail(self: Any, data: Any) -> int:
        if Path(self._file.name).name == name:
            self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise self.error
        return write(self, data)

    monkeypatch.setattr(HashingFile, "write", write_or_fail)


def save(writer: CheckpointWriter, path: Path, *, background: bool) -> None:
    writer.write(make_checkpoint(), path, background=background)
    writer.finish(wait=True)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("name", ["__0_0.distcp", "header.pt", ".metadata.tmp", "files.json"])
def test_a_full_disk_is_named_and_nothing_is_left(
    name: str, background: bool, tmp_path: Path, monkeypatch
):
    path, writer = tmp_path / "step=3.ckpt", CheckpointWriter()
    fill_disk(monkeypatch, name)
    with pytest.raises(KTOError, match=r"cannot be written: .*No space left on device"):
        save(writer, path, background=background)
    assert_only(tmp_path)
    monkeypatch.undo()
    save(writer, path, background=background)
    verify_directory(path)


def test_a_directory_that_hosts_do_not_share_is_named(tmp_path: Path, monkeypatch):
    write_data = writing._Writer.write_data

    def write_elsewhere(self: Any, plan: Any, planner: Any) -> Any:
        written = write_data(self, plan, planner)
        (self.path / "__0_0.distcp").unlink()
        return written

    monkeypatch.setattr(writing._Writer, "write_data", write_elsewhere)
    with pytest.raises(KTOError, match=r"does not see what rank 0 wrote there.*hosts share"):
        write_directory(make_checkpoint(), tmp_path / "step=3.ckpt")
    assert_only(tmp_path)


def make_part(path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    part.mkdir()
    (part / "__0_7.distcp").touch()


def make_older(path: Path) -> None:
    write_directory(make_checkpoint(seed=1), path)


def make_file(path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(EARLIER, path)


@pytest.mark.parametrize("make", [make_part, make_older, make_file])
def test_what_was_there_is_replaced(make: Any, tmp_path: Path):
    path = tmp_path / "step=3.ckpt"
    make(path)
    write_directory(make_checkpoint(), path)
    assert_only(tmp_path, path.name)
    expected = whole(make_checkpoint())
    torch.testing.assert_close(read_checkpoint(path), expected, rtol=0, atol=0)


def test_a_file_replaces_a_directory(tmp_path: Path):
    path = tmp_path / "step=3.ckpt"
    make_older(path)
    make_part(path)
    make_file(path)
    assert AtomicCheckpointIO().load_checkpoint(path) == EARLIER
    assert_only(tmp_path, path.name)


def test_half_a_removal_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch):
    path = tmp_path / "step=3.ckpt"
    make_older(path)

    def be_killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", be_killed)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoint(path)
    assert not path.exists()
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert_only(tmp_path)
