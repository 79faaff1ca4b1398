"""Reading a run from OUTPUT; missing and damaged files are tolerated, except metrics.csv."""

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from kto_lightning.errors import KTOError
from kto_lightning.reports.run.run_file import RunFile, current_status, read_run_file

_MOST_DIGITS = 15
_LONGEST_CELL = 1000
"""Of a step: an int64 has room for them."""
LABELS = ("desirable", "undesirable")


@dataclass(kw_only=True, slots=True)
class Run:
    """A run, finished or not."""

    directory: Path
    steps: Int64[np.ndarray, " steps"]
    """Completed optimizer steps, ascending."""
    columns: dict[str, Float[np.ndarray, " steps"]]
    """By their names in `metrics.csv`; NaN where a cell is empty or holds no finite number."""
    non_finite: dict[str, int]
    """The first step with NaN or infinity, of each column that has one."""
    settings: dict[str, Any] = field(default_factory=dict)
    """`config.yaml`; empty if it is missing or cannot be read."""
    file: RunFile = field(default_factory=RunFile)
    status: str | None = None
    """`running`, `killed`, `stopped` or `finished`; None if unknown."""
    data: dict[str, Any] | None = None
    """`data_report.json`."""
    generations: dict[str, Any] | None = None
    """`generations.json`."""

    def column(self, name: str) -> Float[np.ndarray, " steps"]:
        """The values of a column; all NaN if there is no such column."""
        return self.columns.get(name, np.full(len(self.steps), np.nan))

    def measured(self, name: str) -> Float[np.ndarray, " measured"]:
        """The finite values of a column, in order."""
        values = self.column(name)
        return values[np.isfinite(values)]

    def setting(self, group: str, key: str) -> Any:
        """A setting such as `model`, `beta`; None if unknown."""
        found = self.settings.get(group)
        return found.get(key) if isinstance(found, dict) else None

    def number(self, group: str, key: str) -> float | None:
        """A setting as a number; None if it is none."""
        value = self.setting(group, key)
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return None
        try:
            return float(value)
        except ValueError:
            return None


def read_run(output_dir: str | Path) -> Run:
    """Read a run, finished or not.

    Raises:
        KTOError: if `output_dir` is missing or has no readable metrics.csv.
    """
    directory = Path(output_dir)
    if not directory.is_dir():
        raise KTOError(f"there is no directory {directory}. Give the --output_dir of a run.")
    path = directory / "metrics.csv"
    if not path.is_file():
        raise KTOError(
            f"{directory} holds no metrics.csv, which `fit` writes from its first step on. Give "
            "the --output_dir of a run."
        )
    steps, columns, non_finite = read_metrics(path)
    file = read_run_file(directory)
    return Run(
        directory=directory,
        steps=steps,
        columns=columns,
        non_finite=non_finite,
        settings=_read_settings(directory / "config.yaml"),
        file=file,
        status=current_status(directory, file),
        data=_read_json(directory / "data_report.json"),
        generations=_read_json(directory / "generations.json"),
    )


def read_metrics(
    path: Path,
) -> tuple[Int64[np.ndarray, " steps"], dict[str, Float[np.ndarray, " steps"]], dict[str, int]]:
    """The complete rows of a `metrics.csv`; the last one is incomplete if the run was killed.

    Returns:
        Steps, columns by name, and the first non-finite step of columns that have one, as in `Run`.

    Raises:
        KTOError: if it cannot be read, has no column `step`, or holds what is no number.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise KTOError(f"{path} cannot be read: {error.strerror}. Check the file.") from error
    header, by_step = _rows(path, text[: text.rfind("\n") + 1])
    steps = np.array(sorted(by_step), dtype=np.int64)
    columns: dict[str, np.ndarray] = {}
    non_finite: dict[str, int] = {}
    for place, name in enumerate(header):
        if name == "step":
            continue
        cells = [by_step[step][place] for step in steps.tolist()]
        values = np.array([float(cell or "nan") for cell in cells], dtype=np.float64)
        wrong = [
            step
            for step, cell, value in zip(steps.tolist(), cells, values, strict=True)
            if cell and not math.isfinite(value)
        ]
        if wrong:
            non_finite[name] = wrong[0]
        columns[name] = np.where(np.isfinite(values), values, np.nan)
    return steps, columns, non_finite


def _rows(path: Path, text: str) -> tuple[list[str], dict[int, list[str]]]:
    """The header, and the rows by step; the last row of a step counts.

    Raises:
        KTOError: with the line, if a cell is not what `fit` writes there.
    """
    reader = csv.reader(text.split("\n")[:-1], strict=True)
    by_step: dict[int, list[str]] = {}
    header: list[str] = []
    try:
        header = next(reader, [])
        if "step" not in header:
            raise KTOError(f"{path} has no column 'step'. Give the --output_dir of a run of `fit`.")
        if len(set(header)) < len(header):
            raise _odd_line(path, 1, "a column is there twice")
        for row in reader:
            step = _check_row(path, reader.line_num, dict(zip(header, row, strict=False)))
            if len(row) != len(header):
                raise _odd_line(path, reader.line_num, f"{len(row)} cells, not {len(header)}")
            by_step[step] = row
    except csv.Error as error:
        raise _odd_line(path, reader.line_num, str(error)) from error
    return header, by_step


def _check_row(path: Path, line: int, cells: dict[str, str]) -> int:
    """The step of a row, all of whose cells are numbers or empty."""
    for name, cell in cells.items():
        try:
            float(cell[:_LONGEST_CELL] or "nan")
            if len(cell) > _LONGEST_CELL:
                raise ValueError
        except ValueError as error:
            problem = f"the column '{name[:60]}' must be a number, got {cell[:60]!r}"
            raise _odd_line(path, line, problem) from error
    step = cells.get("step", "")
    if not (step.isascii() and step.isdigit() and len(step) <= _MOST_DIGITS):
        raise _odd_line(path, line, f"'step' must be a number of steps, got {step[:60]!r}")
    return int(step)


def _odd_line(path: Path, line: int, problem: str) -> KTOError:
    return KTOError(f"{path}:{line}: {problem}. Remove the line.")


def _read_settings(path: Path) -> dict[str, Any]:
    import yaml

    from kto_lightning.strict_yaml import check_yaml

    try:
        # The C reader is fast, but not in every build of PyYAML.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        text = _read_text(path)
        check_yaml(text)
        found = yaml.load(text, Loader=loader)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_text(path: Path) -> str:
    """The text of a regular file: a pipe would be waited for."""
    if not path.is_file():
        raise FileNotFoundError(path)
    return path.read_text(encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(_read_text(path))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
