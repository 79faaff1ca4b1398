"""Contestants in processes of their own, and the requests that let them step in turn."""

import multiprocessing
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from contestants import Step, Task, run_contestant

EXIT_TIMEOUT_S = 30


class ContestantFailed(Exception):
    """A contestant's process ended early or sent an exception."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurements:
    """All steps of one contestant."""

    idle_mib: float
    steps: list[Step]

    def timed(self, warmup: int) -> list[Step]:
        return self.steps[warmup:]


class ContestantProcess:
    """A contestant's process, seen from the parent."""

    def __init__(self, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=run_contestant, args=(theirs, task), daemon=True)
        self._process.start()
        theirs.close()
        self._num_steps = task.num_steps
        self.steps: list[Step] = []
        self.idle_mib = self._receive()["idle_mib"]

    def step(self) -> None:
        """Request the next step and receive it."""
        self._connection.send("go")
        self.steps.append(self._receive())

    def _receive(self) -> Any:
        try:
            message = self._connection.recv()
        except EOFError:
            self._process.join()
            raise ContestantFailed(f"it ended with status {self._process.exitcode}") from None
        if isinstance(message, str):
            raise ContestantFailed(message)
        return message

    def close(self) -> None:
        """End the process: on its own if it has taken all its steps, else by killing it."""
        if len(self.steps) == self._num_steps:
            self._connection.send("go")
            self._process.join(EXIT_TIMEOUT_S)
        self._process.kill()
        self._process.join()


def race(tasks: Sequence[Task], *, turn: int) -> list[Measurements]:
    """Let each contestant take `turn` steps per round; each round starts with another one."""
    with ExitStack() as stack:
        children = []
        for task in tasks:
            children.append(ContestantProcess(task))
            stack.callback(children[-1].close)
        for number, done in enumerate(range(0, tasks[0].num_steps, turn)):
            first = number % len(children)
            for child in (*children[first:], *children[:first]):
                for _ in range(min(turn, tasks[0].num_steps - done)):
                    child.step()
        return [Measurements(idle_mib=child.idle_mib, steps=child.steps) for child in children]
