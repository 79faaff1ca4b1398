"""Sharded checkpoints as they are read: whole, tensor by tensor, damaged or foreign."""

import os
import pickle
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kto_lightning.errors import KTOError
from kto_lightning.sharded_checkpoint import (
    ShardedHeader,
    files,
    is_whole_directory,
    read_checkpoint,
    read_header,
    read_tensors,
    verify_directory,
    write_directory,
)
from kto_lightning.training import checkpoint_files
from kto_lightning.training.checkpoint_files import AtomicCheckpointIO
from kto_lightning.training.checkpoints import find_checkpoint
from tests.sharded_checkpoint.conftest import make_checkpoint, sharded, whole

pytestmark = pytest.mark.usefixtures("group")
WEIGHT = "state_dict.policy.a.weight"


@pytest.fixture
def saved(tmp_path: Path, group: None) -> Path:
    path = tmp_path / "step=3.ckpt"
    write_directory(make_checkpoint(), path)
    return path


def test_all_of_it_is_read_without_a_process_group(saved: Path):
    expected = whole(make_checkpoint())
    dist.destroy_process_group()
    found = AtomicCheckpointIO().load_checkpoint(saved)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_header_has_all_but_the_sharded_tensors(saved: Path):
    header, expected = read_header(saved), make_checkpoint()
    assert isinstance(header, ShardedHeader)
    assert header.path == saved
    weights = header["state_dict"]
    assert weights["policy.a.weight"].is_meta
    assert weights["policy.a.weight"].shape == (5, 7)
    assert header["optimizer_states"][0]["state"][0]["exp_avg"].dtype == torch.bfloat16
    assert weights["policy.buffer"].equal(torch.arange(4))
    for name in ("callbacks", "kto", "global_step"):
        assert header[name] == expected[name]


def test_tensors_are_read_in_place(saved: Path):
    expected = whole(make_checkpoint())["state_dict"]
    into = {WEIGHT: sharded(torch.zeros(5, 7)), "state_dict.policy.b.bias": torch.zeros(3)}
    into["state_dict.policy.buffer"] = torch.zeros(4)
    read_tensors(saved, into)
    assert whole(into[WEIGHT]).equal(expected["policy.a.weight"])
    assert into["state_dict.policy.b.bias"].equal(expected["policy.b.bias"])
    assert into["state_dict.policy.buffer"].equal(expected["policy.buffer"].float())


@pytest.mark.parametrize("name", [WEIGHT, "state_dict.policy.buffer", "state_dict.policy.other"])
def test_a_tensor_that_it_does_not_have_is_named(name: str, saved: Path):
    with pytest.raises(KTOError, match=name):
        read_tensors(saved, {name: torch.zeros(5, 8)})


def test_every_single_changed_byte_is_found(saved: Path):
    random = Random(0)
    for file in sorted(saved.iterdir()):
        content = file.read_bytes()
        places = [*random.sample(range(len(content)), 40), 0, len(content) - 1]
        for place in range(len(content)) if file.name == "files.json" else places:
            changed = bytearray(content)
            changed[place] ^= 1 << random.randrange(8)
            file.write_bytes(changed)
            with pytest.raises(KTOError, match=rf"damaged \({file.name}\)"):
                verify_directory(saved, together=bool(place % 2))
            if file.suffix != ".distcp":
                assert not is_whole_directory(saved) or file.suffix != ".json"
                with pytest.raises(KTOError, match="it is damaged"):
                    read_checkpoint(saved)
        file.write_bytes(content)
        verify_directory(saved)


@pytest.mark.parametrize("name", ["__0_0.distcp", "header.pt", ".metadata", "files.json"])
def test_a_missing_or_shortened_file_is_found(name: str, saved: Path):
    os.truncate(saved / name, (saved / name).stat().st_size - 1)
    for _ in range(2):
        assert not is_whole_directory(saved)
        assert checkpoint_files.read_header(saved) is None
        with pytest.raises(KTOError, match="is damaged"):
            AtomicCheckpointIO().load_checkpoint(saved)
        with pytest.raises(KTOError, match="is damaged"):
            find_checkpoint(str(saved), str(saved.parent), trains=False)
        (saved / name).unlink(missing_ok=True)


def with_checksums(path: Path, **contents: bytes) -> None:
    """Replace files of a checkpoint, and their checksums."""
    listed = files._listed(path)
    assert listed is not None
    for name, content in contents.items():
        (path / name).write_bytes(content)
        listed[name] = len(content), files.sha256(content).hexdigest()
    (path / "files.json").write_bytes(files.list_of_files(listed))


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", [".metadata", "header.pt"])
def test_a_foreign_checkpoint_cannot_run_code(name: str, saved: Path, tmp_path: Path):
    with_checksums(saved, **{name: pickle.dumps(Evil(tmp_path / "made"))})
    assert is_whole_directory(saved)
    with pytest.raises(KTOError, match="is damaged"):
        read_checkpoint(saved)
    assert not (tmp_path / "made").exists()


def test_files_outside_the_directory_are_not_read(saved: Path):
    listed = files._listed(saved)
    assert listed is not None
    listed["../other"] = listed["header.pt"]
    (saved / "files.json").write_bytes(files.list_of_files(listed))
    (saved.parent / "other").write_bytes((saved / "header.pt").read_bytes())
    assert not is_whole_directory(saved)


def test_a_pipe_in_place_of_a_file_does_not_hang(saved: Path):
    for name in ("header.pt", "files.json"):
        (saved / name).unlink()
        os.mkfifo(saved / name)
        assert checkpoint_files.read_header(saved) is None


def test_a_directory_of_another_kind_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(KTOError, match=r"is a directory\. Give one of its checkpoints"):
        find_checkpoint(str(tmp_path), str(tmp_path), trains=False)
