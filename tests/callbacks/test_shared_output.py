"""Two ranks as on two hosts, each in a directory of its own: what only one has ends both."""

import os
import socket
from functools import partial
from pathlib import Path

import pytest

from kto_lightning.callbacks import shared_output
from tests.support.cli import fit_arguments
from tests.support.ranks import RankResult, run_ranks


def on_own_host(directory: Path) -> None:
    """For `prepare` of a job: this rank is the only one of its host."""
    rank = int(os.environ["RANK"])
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank)}
    name = ("alpha", "beta")[rank]
    socket.gethostname = lambda: name
    os.chdir(directory / name)
    shared_output.PATIENCE = 0.2


def fit_on_hosts(policy: Path, train: Path, tmp_path: Path, missing: str) -> list[RankResult]:
    for name in ("alpha", "beta"):
        (tmp_path / name).mkdir()
        if (name, missing) != ("beta", "train.jsonl"):
            (tmp_path / name / "train.jsonl").symlink_to(train)
        if missing != "output":
            (tmp_path / name / "output").symlink_to(tmp_path / "shared")
    (tmp_path / "shared").mkdir()
    hosts = ("--trainer.num_nodes", 2, "--trainer.devices", 1, "--trainer.strategy", "ddp")
    arguments = fit_arguments(policy, "train.jsonl", Path("output"), *hosts)
    return run_ranks("fit", *arguments, prepare=partial(on_own_host, tmp_path))


def test_two_hosts_share_their_output(policy: Path, train: Path, tmp_path: Path):
    ended = fit_on_hosts(policy, train, tmp_path, "nothing")
    assert [rank.status for rank in ended] == [0, 0], ended
    assert (tmp_path / "shared/model/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("missing", "status", "message"),
    [
        ("train.jsonl", 1, "error: on host beta: there is no file 'train.jsonl'"),
        ("output", 2, "error: on host beta: --output_dir {}/beta/output is not the directory of"),
    ],
)
def test_what_one_host_lacks_ends_both(
    missing: str, status: int, message: str, policy: Path, train: Path, tmp_path: Path
):
    ended = fit_on_hosts(policy, train, tmp_path, missing)
    assert [rank.status for rank in ended] == [status, status], ended
    for rank in ended:
        assert message.format(tmp_path) in rank.err
