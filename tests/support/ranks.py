"""The command line on several CPU ranks, as torchrun would start it, with a single import.

A fork server imports everything when the first job is started and forks every rank of every job.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.distributed import TCPStore

from tests.support.cli import ROOT, fit_arguments

TIME_LIMIT = 120.0
"""Seconds after which a job is regarded as hanging; the small jobs of the tests take a few."""
_CONTEXT: Any = multiprocessing.get_context("forkserver")


@dataclass(slots=True)
class RankResult:
    """Exit status and output of a rank."""

    status: int
    """−N if signal N ended it."""
    out: str
    err: str


@dataclass(slots=True)
class Job:
    """Running ranks."""

    processes: list[BaseProcess]
    directory: Path
    """Contains their output."""
    store: TCPStore = field(repr=False)
    """Their rendezvous; its port stays theirs as long as this object lives."""
    time_limit: float

    def signal(self, signal_number: int, *ranks: int) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            pid = self.processes[rank].pid
            assert pid is not None
            os.kill(pid, signal_number)

    def output(self, rank: int) -> tuple[str, str]:
        """Stdout and stderr of a rank so far."""
        files = _files(self.directory, rank)
        return tuple(f.read_text() if f.exists() else "" for f in files)  # pyright: ignore[reportReturnType]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition is true.

        Raises:
            AssertionError: if all ranks end before that, or after the time limit.
        """
        until = time.monotonic() + self.time_limit
        while not condition():
            running = any(process.is_alive() for process in self.processes)
            if not running or time.monotonic() > until:
                self.fail("the condition was never true")
            time.sleep(0.01)

    def wait(self) -> list[RankResult]:
        """Wait for all ranks.

        Raises:
            AssertionError: if one is still running after the time limit.
        """
        until = time.monotonic() + self.time_limit
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        if any(process.is_alive() for process in self.processes):
            self.fail("the job hangs")
        return [
            RankResult(process.exitcode or 0, *self.output(rank))
            for rank, process in enumerate(self.processes)
        ]

    def fail(self, why: str) -> None:
        """Raise AssertionError with the output of every rank."""
        outputs = []
        for rank, process in enumerate(self.processes):
            out, err = self.output(rank)
            outputs.append(f"--- rank {rank}, exit status {process.exitcode}\n{out}\n{err}")
        raise AssertionError("\n".join([why, *outputs]))

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                self.signal(signal.SIGKILL, self.processes.index(process))
            process.join()


@contextmanager
def job(
    *arguments: Any,
    ranks: int = 2,
    environment: dict[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
    time_limit: float = TIME_LIMIT,
) -> Iterator[Job]:
    """Start the ranks of a job; those still running at the end of the block are killed.

    Args:
        arguments: of the command line, the same for all.
        ranks: how many.
        environment: additions to that of every rank.
        prepare: a function of some module, called in every rank first.
        time_limit: seconds.
    """
    _CONTEXT.set_forkserver_preload(["pytest", "tests.support.rank_process"])
    with chdir(ROOT):  # so that the server finds this package
        forkserver.ensure_running()
    # Kept open by this process, as by torchrun's agent, so that the port cannot be taken.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with TemporaryDirectory(prefix="kto_lightning_ranks_") as name:
        directory = Path(name)
        processes = []
        for rank in range(ranks):
            settings = _as_torchrun(rank, ranks, store.port) | (environment or {})
            given = ([str(a) for a in arguments], settings, _files(directory, rank), prepare)
            processes.append(_CONTEXT.Process(target=_run_rank, args=given))
        started = Job(processes=processes, directory=directory, store=store, time_limit=time_limit)
        try:
            for process in processes:
                process.start()
            yield started
        finally:
            started.kill()


def run_ranks(*arguments: Any, **options: Any) -> list[RankResult]:
    """Run a job to its end; the arguments are those of `job`."""
    with job(*arguments, **options) as started:
        return started.wait()


def fit_on_ranks(
    policy: Path,
    train: Any,
    output: Path,
    *options: Any,
    strategy: str = "ddp",
    ranks: int = 2,
    **job_options: Any,
) -> Path:
    """`tests.support.cli.fit` on several ranks; returns the output directory."""
    devices = ("--trainer.devices", ranks, "--trainer.strategy", strategy)
    arguments = ("fit", *fit_arguments(policy, train, output, *devices, *options))
    ended = run_ranks(*arguments, ranks=ranks, **job_options)
    assert [rank.status for rank in ended] == [0] * ranks, "\n".join(r.err + r.out for r in ended)
    return output


def _run_rank(*arguments: Any) -> None:
    from tests.support.rank_process import (
        run_rank,  # by a rank alone: it changes how modules are imported
    )

    run_rank(*arguments)


def _files(directory: Path, rank: int) -> tuple[Path, Path]:
    return directory / f"{rank}.out", directory / f"{rank}.err"


def _as_torchrun(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment variables of `torchrun --nproc-per-node RANKS`."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }
