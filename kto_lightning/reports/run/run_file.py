"""`OUTPUT/run.json`: the planned steps of a run, its summary and warnings, how far it came."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from kto_lightning.errors import KTOError
from kto_lightning.files import write_whole
from kto_lightning.training.run_lock import Holder, holder_from, is_running, this_process

Status = Literal["running", "stopped", "finished"]


@dataclass(kw_only=True, slots=True)
class RunFile:
    """Written by `fit` before its first step, and again when it has finished or stopped."""

    planned_steps: int | None = None
    """Optimizer steps of the whole run; None if not recorded, or if a stream decides."""
    finished: bool = False
    status: Status | None = None
    """None if not recorded. A run that was killed has left `running`; its process tells."""
    reason: str | None = None
    """Why it stopped."""
    process: Holder | None = None
    """The process of rank 0, and its host."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Settings that changed when the
    run was resumed: `key`, `before`, `after`, and the `step` after which the new value holds."""
    summary: list[list[str]] = field(default_factory=list)
    """Names and values, as `fit` prints them before the first step."""
    warnings: list[str] = field(default_factory=list)


def write_run_file(output_dir: str | Path, content: RunFile) -> None:
    """Write the file atomically, replacing that of the run it resumed from.

    Raises:
        KTOError: if it cannot be written.
    """
    text = json.dumps(asdict(content), indent=2, default=str) + "\n"
    write_whole(Path(output_dir) / "run.json", text, what="the run's record")


def read_run_file(output_dir: str | Path) -> RunFile:
    """Read the file; an empty `RunFile` if it is missing or damaged."""
    path = Path(output_dir) / "run.json"
    try:
        if not path.is_file():
            return RunFile()
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        steps, reason = found["planned_steps"], found.get("reason")
        status = found.get("status")
        return RunFile(
            planned_steps=None if steps is None else int(steps),
            finished=bool(found["finished"]),
            status=status if status in get_args(Status) else None,
            reason=None if reason is None else str(reason),
            process=holder_from(found.get("process")),
            changes=[dict(change) for change in found.get("changes", [])],
            summary=[[str(name), str(value)] for name, value in found["summary"]],
            warnings=[str(warning) for warning in found["warnings"]],
        )
    except (
        OSError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        RecursionError,
    ):
        return RunFile()


def current_status(output_dir: str | Path, content: RunFile) -> Status | Literal["killed"] | None:
    """The status of a run, which is `killed` if its process ended without a word; None: unknown."""
    if content.finished:
        return "finished"
    if content.status != "running" or content.process is None:
        return content.status
    return "running" if is_running(output_dir, content.process) else "killed"


def mark_finished(output_dir: str | Path) -> None:
    """Record that the run finished and wrote its model.

    Raises:
        KTOError: if it cannot be written.
    """
    content = read_run_file(output_dir)
    content.finished, content.status, content.reason = True, "finished", None
    write_run_file(output_dir, content)


@contextmanager
def stops_recorded(output_dir: str | Path) -> Iterator[None]:
    """Record that the run stopped, and why, if the block raises after this process has begun it."""
    try:
        yield
    except BaseException as error:
        content = read_run_file(output_dir)
        if content.status == "running" and content.process == this_process():
            content.status = "stopped"
            content.reason = str(error).strip() or type(error).__name__
            with suppress(KTOError):  # a full disk may be why it stopped
                write_run_file(output_dir, content)
        raise
