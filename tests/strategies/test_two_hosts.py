"""Two hosts, in network namespaces: they give the numbers of one; a lost host ends the other in
time, with its name, and the run resumes bit for bit; what only one host has is an error of both."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kto_lightning.strategies.heartbeat import TIMEOUT_VARIABLE
from tests.support.cli import EVERY_STEP, LAST, fit, fit_arguments, rows
from tests.support.comparison import assert_runs_agree, assert_runs_equal
from tests.support.hosts import PORT, Host, Running, two_hosts, wait_until
from tests.support.ranks import fit_on_ranks

pytestmark = pytest.mark.slow

TIMEOUT = 15.0
"""Seconds after which a host is lost in these tests."""
TORCHRUN = ("-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1)
DYNAMIC = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"alpha:{PORT}", "--rdzv-id", "tests")
HOSTS = ("--trainer.num_nodes", 2, "--trainer.devices", 1)


def static(host: Host) -> tuple[Any, ...]:
    """torchrun's options without a rendezvous: the first host is known."""
    rank = int(host.name != "alpha")
    return ("--node-rank", rank, "--master-addr", "alpha", "--master-port", PORT)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


@pytest.fixture(scope="module")
def whole_runs(policy: Path, train: Path, tmp_path_factory) -> dict[str, Path]:
    """An uninterrupted run of two ranks on one host by its strategy."""
    return {
        strategy: fit_on_ranks(
            policy, train, tmp_path_factory.mktemp("whole"), *EVERY_STEP, strategy=strategy
        )
        for strategy in ("ddp", "fsdp2")
    }


def start(
    host: Host, launcher: tuple[Any, ...], arguments: list[Any], log: Path, **options: Any
) -> Running:
    """A rank on a host, by torchrun with these options; rank 1 pauses in step 3, in which rank 0
    waits for it."""
    command = (*TORCHRUN, *launcher, "-m", "tests.support.failing_cli", "1=pause", "fit")
    file = log / f"{host.name}.log"
    settings = {TIMEOUT_VARIABLE: str(TIMEOUT)}
    return host.start(*command, *arguments, file=file, **settings, **options)


def start_by_hand(host: Host, arguments: list[Any], log: Path) -> Running:
    """The same without torchrun, as a scheduler does: rank 0 serves the store."""
    ranks = {"LOCAL_RANK": "0", "NODE_RANK": str(int(host.name != "alpha"))}
    settings = {"MASTER_ADDR": "alpha", "MASTER_PORT": str(PORT), TIMEOUT_VARIABLE: str(TIMEOUT)}
    command = ("-u", "-m", "tests.support.failing_cli", "1=pause", "fit", *arguments)
    return host.start(*command, file=log / f"{host.name}.log", **ranks, **settings)


def in_step_three(output: Path, *running: Running) -> None:
    wait_until(lambda: (output / "metrics.csv").exists() and len(rows(output)) == 2, *running)
    time.sleep(0.5)


def silent(host: str) -> str:
    return f"error: host {host}.* has not answered for {TIMEOUT:g} s: it is down or cut off"


def assert_reports(pattern: str, running: Running) -> None:
    assert re.search(pattern, running.output), running.output


@pytest.mark.parametrize(("strategy", "dynamic"), [("ddp", True), ("fsdp2", False)])
def test_two_hosts_give_the_numbers_of_one(
    strategy: str, dynamic: bool, hosts, policy: Path, train: Path, tmp_path: Path
):
    output = tmp_path / "output"
    arguments = fit_arguments(policy, train, output, *HOSTS, "--trainer.strategy", strategy)
    running = [
        start(host, DYNAMIC if dynamic else static(host), arguments, tmp_path) for host in hosts
    ]
    for one in running:
        assert one.wait() == 0, one.output
    assert "has not answered" not in "".join(one.output for one in running)
    assert_runs_agree(output, fit(policy, train, tmp_path / "one"))


def lose(what: str, hosts: tuple[Host, Host]) -> list[Host]:
    """Lose a host; returns those whose processes go on."""
    alpha, beta = hosts
    if what in ("cut", "silent end"):
        beta.cut()
    if what in ("end", "silent end"):
        beta.kill()
    if what == "end of the first":
        alpha.kill()
        return [beta]
    return [alpha, beta] if what == "cut" else [alpha]


@pytest.mark.parametrize(
    ("what", "strategy", "message"),
    [
        ("cut", "ddp", silent("beta")),
        ("cut", "fsdp2", silent("beta")),
        ("silent end", "fsdp2", silent("beta")),
        ("end", "ddp", "error: another rank on host beta has ended while this one waited for it"),
        (
            "end of the first",
            "fsdp2",
            "error: another rank on host alpha has ended|" + silent("alpha"),
        ),
    ],
)
def test_a_lost_host_ends_the_other_and_the_run_resumes(
    what: str, strategy: str, message: str, hosts, policy, train, whole_runs, tmp_path: Path
):
    output = tmp_path / "output"
    options = ("--trainer.strategy", strategy, *EVERY_STEP)
    arguments = fit_arguments(policy, train, output, *HOSTS, *options)
    running = {host.name: start(host, static(host), arguments, tmp_path) for host in hosts}
    in_step_three(output, *running.values())
    left = lose(what, hosts)
    began = time.monotonic()
    for host in left:
        assert running[host.name].wait(TIMEOUT + 30) == 1
        other = silent("alpha") if host.name == "beta" and what == "cut" else message
        assert_reports(other, running[host.name])
    print(f"{what}, {strategy}: ended after {time.monotonic() - began:.0f} s")
    assert not (output / "model").exists()
    fit_on_ranks(policy, train, output, *EVERY_STEP, *LAST, strategy=strategy)
    assert_runs_equal(output, whole_runs[strategy])


def test_a_store_of_rank_0_is_lost_with_its_host(
    hosts, policy: Path, train: Path, whole_runs, tmp_path: Path
):
    output, (alpha, beta) = tmp_path / "output", hosts
    options = ("--trainer.strategy", "ddp", *EVERY_STEP)
    arguments = fit_arguments(policy, train, output, *HOSTS, *options)
    running = [start_by_hand(host, arguments, tmp_path) for host in hosts]
    in_step_three(output, *running)
    alpha.cut()
    alpha.kill()
    assert running[1].wait(TIMEOUT + 30) == 1
    assert_reports(silent("alpha"), running[1])
    assert beta.processes() == []
    fit_on_ranks(policy, train, output, *EVERY_STEP, *LAST)
    assert_runs_equal(output, whole_runs["ddp"])


@pytest.mark.parametrize("what", ["cut", "end"])
def test_torchrun_restarts_both_hosts_unattended(
    what: str, hosts, policy: Path, train: Path, whole_runs, tmp_path: Path
):
    """The link comes back, or the host does: it starts the same command as at first.

    By default torchrun's agents share a store whose address a new agent never learns.
    """
    output, beta = tmp_path / "output", hosts[1]
    options = ("--trainer.strategy", "ddp", *EVERY_STEP, *LAST)
    arguments = fit_arguments(policy, train, output, *HOSTS, *options)
    launcher = (*DYNAMIC, "--max-restarts", 3)
    setting = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    running = [start(host, launcher, arguments, tmp_path, **setting) for host in hosts]
    in_step_three(output, *running)
    if what == "cut":
        beta.cut()
        wait_until(lambda: all("has not answered" in one.output for one in running), *running)
        beta.join()
    else:
        beta.kill()
        wait_until(lambda: "on host beta has ended" in running[0].output, running[0])
        running[1] = start(beta, launcher, arguments, tmp_path, **setting)
    for one in running:
        assert one.wait() == 0, one.output
    assert_runs_equal(output, whole_runs["ddp"])


@pytest.mark.parametrize("missing", ["train.jsonl", "policy", "held_out.jsonl", "output"])
def test_what_only_one_host_has_is_an_error_of_both(
    missing: str, hosts, policy: Path, train: Path, tmp_path: Path
):
    running = []
    for host in hosts:
        own = tmp_path / host.name
        own.mkdir()
        for name, there in (("train.jsonl", train), ("held_out.jsonl", train), ("policy", policy)):
            if (host.name, name) != ("beta", missing):
                (own / name).symlink_to(there)
        output = Path("output") if missing == "output" else tmp_path / "shared"
        held_out = ("--data.validation", "held_out.jsonl")
        arguments = fit_arguments(Path("policy"), "train.jsonl", output, *HOSTS, *held_out)
        arguments += ["--trainer.strategy", "ddp"]
        running.append(start(host, static(host), arguments, tmp_path, cwd=own))
    for one in running:
        assert one.wait() == 1
        found = re.findall(r"error: on host beta: .*", one.output)
        assert len(found) == 1, one.output
        assert missing in found[0]
