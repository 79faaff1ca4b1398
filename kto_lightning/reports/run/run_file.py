"""`OUTPUT/run.json`: the planned steps of a run, its summary and warnings, whether it finished."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kto_lightning.files import write_whole


@dataclass(kw_only=True, slots=True)
class RunFile:
    """Written by `fit` before its first step, and again when it has finished."""

    planned_steps: int | None = None
    """Optimizer steps of the whole run; None if not recorded, or if a stream decides."""
    finished: bool = False
    summary: list[list[str]] = field(default_factory=list)
    """Names and values, as `fit` prints them before the first step."""
    warnings: list[str] = field(default_factory=list)


def write_run_file(output_dir: str | Path, content: RunFile) -> None:
    """Write the file atomically, replacing that of the run it resumed from.

    Raises:
        KTOError: if it cannot be written.
    """
    text = json.dumps(asdict(content), indent=2) + "\n"
    write_whole(Path(output_dir) / "run.json", text, what="the run's record")


def read_run_file(output_dir: str | Path) -> RunFile:
    """Read the file; an empty `RunFile` if it is missing or damaged."""
    try:
        found: Any = json.loads((Path(output_dir) / "run.json").read_text(encoding="utf-8"))
        steps = found["planned_steps"]
        return RunFile(
            planned_steps=None if steps is None else int(steps),
            finished=bool(found["finished"]),
            summary=[[str(name), str(value)] for name, value in found["summary"]],
            warnings=[str(warning) for warning in found["warnings"]],
        )
    except (OSError, ValueError, TypeError, KeyError):
        return RunFile()


def mark_finished(output_dir: str | Path) -> None:
    """Record that the run finished and wrote its model.

    Raises:
        KTOError: if it cannot be written.
    """
    content = read_run_file(output_dir)
    content.finished = True
    write_run_file(output_dir, content)
