"""Contestants in processes of their own, told when to take their steps."""

import multiprocessing
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from contestants import Step, Task, work

PATIENCE_S = 30
"""For a process to end."""


class Failed(Exception):
    """A contestant ended before its time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """What a contestant did."""

    idle_mib: float
    steps: list[Step]

    def timed(self, warmup: int) -> list[Step]:
        return self.steps[warmup:]


class Child:
    """A contestant's process."""

    def __init__(self, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, task), daemon=True)
        self._process.start()
        theirs.close()
        self._num_steps = task.num_steps
        self.steps: list[Step] = []
        self.idle_mib = self._receive()["idle_mib"]

    def step(self) -> None:
        """Let it take its next step."""
        self._connection.send("go")
        self.steps.append(self._receive())

    def _receive(self) -> Any:
        try:
            message = self._connection.recv()
        except EOFError:
            self._process.join()
            raise Failed(f"it ended with status {self._process.exitcode}") from None
        if isinstance(message, str):
            raise Failed(message)
        return message

    def close(self) -> None:
        """Let it end by itself if it has taken all its steps."""
        if len(self.steps) == self._num_steps:
            self._connection.send("go")
            self._process.join(PATIENCE_S)
        self._process.kill()
        self._process.join()


def race(tasks: Sequence[Task], *, turn: int) -> list[Line]:
    """Let everyone take `turn` steps, then the next round, starting elsewhere."""
    with ExitStack() as stack:
        children = []
        for task in tasks:
            children.append(Child(task))
            stack.callback(children[-1].close)
        for number, done in enumerate(range(0, tasks[0].num_steps, turn)):
            first = number % len(children)
            for child in (*children[first:], *children[:first]):
                for _ in range(min(turn, tasks[0].num_steps - done)):
                    child.step()
        return [Line(idle_mib=child.idle_mib, steps=child.steps) for child in children]
