"""`OUTPUT/run.json`: what a run is and how far it was to go, for whoever looks at it later."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kto_lightning.files import write_whole


@dataclass(kw_only=True, slots=True)
class RunFile:
    """What `fit` says of itself before its first step, and at its end that it is done."""

    planned_steps: int | None = None
    """Optimizer steps of the whole run; None where nobody wrote it down."""
    finished: bool = False
    summary: list[list[str]] = field(default_factory=list)
    """Names and values, as `fit` prints them before the first step."""
    warnings: list[str] = field(default_factory=list)


def write_run_file(output_dir: str | Path, content: RunFile) -> None:
    """Write it whole, replacing that of an earlier part of the run.

    Raises:
        KTOError: if it cannot be written.
    """
    text = json.dumps(asdict(content), indent=2) + "\n"
    write_whole(Path(output_dir) / "run.json", text, what="the run's record")


def read_run_file(output_dir: str | Path) -> RunFile:
    """What is known; of a run that left none, or a damaged one, nothing is."""
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
    """Say that the run came to its end and wrote its model.

    Raises:
        KTOError: if it cannot be written.
    """
    content = read_run_file(output_dir)
    content.finished = True
    write_run_file(output_dir, content)
