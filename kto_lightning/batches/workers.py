"""A loader whose worker processes may be killed, and which are shielded from the run's signals."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader, Sampler
from torch.utils.data._utils import signal_handling

from kto_lightning.batches.types import StepBatch


class StepLoader(DataLoader[StepBatch]):
    """A loader that does not need its workers to the end.

    When a worker is killed, the batches that it owes and all later ones are made in this process:
    they are the same, and a run can stop between two steps. With workers, the sampler must be a
    `RememberingSampler`.
    """

    lost_worker = False
    """Whether a worker was killed."""
    _workers: frozenset[BaseProcess] = frozenset()

    def __iter__(self) -> Iterator[StepBatch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._steps() if self.num_workers else super().__iter__()

    def _steps(self) -> Iterator[StepBatch]:
        plans = self.sampler
        assert isinstance(plans, RememberingSampler)
        if self.lost_worker:
            iter(plans)
        else:
            yield from self._steps_of_workers(plans)
        for plan in plans.owed():
            yield self.dataset[plan]

    def _steps_of_workers(self, plans: "RememberingSampler") -> Iterator[StepBatch]:
        """Batches until the end of the epoch, or until a worker is killed."""
        batches: Iterator[StepBatch] | None = None
        while True:
            try:
                self._check_workers()
                with _calling_when_child_ends(self._check_workers):
                    if batches is None:  # its truth would be a length, which a stream has not
                        batches = self._start_workers()
                    batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                self._wait_for_end(error)
                if not self._ended_workers():
                    raise
                self._give_workers_up()
                return
            plans.handed_over()
            yield batch

    def _start_workers(self) -> Iterator[StepBatch]:
        before = set(multiprocessing.active_children())
        batches = super().__iter__()
        started = set(multiprocessing.active_children()) - before
        self._workers = frozenset(started) or self._workers  # they live on from epoch to epoch
        return batches

    def _wait_for_end(self, error: Exception) -> None:
        """Wait for the worker whose end may be behind an error: the kernel closes a process's
        connections first, its sentinel among them, and gives its exit status later."""
        limit = 10.0 if isinstance(error, OSError | EOFError) else 1.0
        closed = wait([worker.sentinel for worker in self._workers], timeout=limit)
        for worker in self._workers:
            if worker.sentinel in closed:
                worker.join(limit)

    def _ended_workers(self) -> list[BaseProcess]:
        return [worker for worker in self._workers if not worker.is_alive()]

    def _check_workers(self) -> None:
        if self._ended_workers():
            raise ChildProcessError("a loader worker ended")

    def _give_workers_up(self) -> None:
        self.lost_worker = True
        worker = self._ended_workers()[0]
        code = worker.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        print(
            f"warning: loader worker {worker.pid} {how}, perhaps because memory ran out. Its "
            "batches are made in the main process now.",
            file=sys.stderr,
        )


class RememberingSampler(Sampler):
    """A sampler that remembers which plans were drawn for workers that owe their batches."""

    def __init__(self, plans: Sampler) -> None:
        self._plans = plans
        self._drawn: deque[Any] = deque()
        self._iterator: Iterator[Any] = iter(())

    def __len__(self) -> int:
        return len(self._plans)  # pyright: ignore[reportArgumentType] (a stream has no length)

    def __iter__(self) -> Iterator[Any]:
        self._drawn.clear()
        self._iterator = iter(self._plans)
        return self._draw()

    def _draw(self) -> Iterator[Any]:
        for plan in self._iterator:
            self._drawn.append(plan)
            yield plan

    def handed_over(self) -> None:
        """Forget the first plan that was drawn: its batch has come."""
        self._drawn.popleft()

    def owed(self) -> Iterator[Any]:
        """The plans of this epoch whose batches have not come."""
        while self._drawn:
            yield self._drawn.popleft()
        yield from self._iterator

    def set_epoch(self, epoch: int) -> None:
        self._plans.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def _calling_when_child_ends(check: Callable[[], None]) -> Iterator[None]:
    """Call `check` if a child process ends during the block, and PyTorch's handler never.

    Its handler raises at any moment, in the middle of a step or of a checkpoint; and without one, a
    wait for what a killed worker has half written would not end.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.signal(signal.SIGCHLD, lambda *_: check())
    if getattr(before, "__module__", None) == signal_handling.__name__:
        before = signal.SIG_DFL  # of another loader in this process, which polls its workers too
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def init_worker(worker: int) -> None:
    """Shield a loader worker from signals to the process group, and end it with the run.

    Ctrl-C in a terminal and the signals of most schedulers reach every process of a group. A worker
    that such a signal ends would make the run stop too.
    """
    os.setsid()
    for signum in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_exit_with_run, daemon=True).start()


def _exit_with_run() -> None:
    """End this worker when the run ends, in whatever way.

    A PyTorch worker watches its parent process. With a fork server (Python 3.14's default) that is
    the server, and the two keep each other alive when the run is killed.
    """
    run = multiprocessing.parent_process()
    if run is not None:
        run.join()
        os._exit(1)
