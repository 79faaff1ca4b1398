"""`metrics.csv`: one row per optimizer step, a fixed header, full precision, flushed every step."""

import csv
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from kto_lightning.errors import KTOError
from kto_lightning.training.metrics import MEASURED

TRAIN_METRICS = (
    "loss",
    "z0",
    "z0_raw",
    "reward/desirable",
    "reward/undesirable",
    "reward/margin",
    "logps/desirable",
    "logps/undesirable",
    "grad_norm",
    "lr",
    "tokens",
)
VALIDATION_METRICS = (
    "loss",
    "z0",
    "z0_raw",
    "reward/desirable",
    "reward/undesirable",
    "reward/margin",
    "logps/desirable",
    "logps/undesirable",
    "reward/auc",
    "tokens",
)
DETAIL_METRICS = (
    "z0_se",
    "gradient_left/desirable",
    "gradient_left/undesirable",
    "reward/desirable_std",
    "reward/undesirable_std",
)
COLUMNS = (
    "step",
    *(f"train/{name}" for name in TRAIN_METRICS),
    *(f"val/{name}" for name in VALIDATION_METRICS),
    *(f"train/{name}" for name in (*DETAIL_METRICS, *MEASURED)),
    *(f"val/{name}" for name in DETAIL_METRICS),
)
MONITORABLE_METRICS = tuple(name for name in COLUMNS if name.startswith("val/"))
"""Metrics that a callback such as EarlyStopping can monitor."""


class MetricsFile(Logger):
    """Writes `OUTPUT/metrics.csv`, one row per optimizer step.

    A validation adds to the row of its step. A metric without a value is an empty cell.

    Raises:
        KTOError: from `begin` and `log_metrics`, if the file cannot be written.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self._directory = Path(directory)
        self._row: dict[str, Any] = {}
        self._row_start = 0
        self._file: io.TextIOWrapper | None = None

    @property
    def path(self) -> Path:
        return self._directory / "metrics.csv"

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self._directory)

    @rank_zero_only
    def begin(self, after_step: int) -> None:
        """Open the file for the steps after `after_step`, and drop the rows of these from it."""
        with self._explain_write_errors():
            kept = list(_read_rows(self.path, after_step)) if after_step else []
            self._directory.mkdir(parents=True, exist_ok=True)
            self._overwrite(kept)
            self._open()

    def _overwrite(self, kept: list[dict[str, str]]) -> None:
        part = self.path.with_suffix(".csv.part")
        try:
            with part.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
                writer.writeheader()
                writer.writerows(kept[:-1])
                self._row, self._row_start = {}, file.tell()
                if kept:  # the last step is validated again if its validation was interrupted
                    writer.writerow(kept[-1])
                    self._row = kept[-1] | {"step": int(kept[-1]["step"])}
            os.replace(part, self.path)
        except OSError:
            with suppress(OSError):
                part.unlink()
            raise

    @contextmanager
    def _explain_write_errors(self) -> Iterator[None]:
        """Turn an error of the disk into one that names the file and what to do."""
        try:
            yield
        except OSError as error:
            file, self._file = self._file, None
            if file is not None:
                with suppress(OSError):  # closing writes again what could not be written
                    file.close()
            raise KTOError(
                f"{self.path} cannot be written: {error}. Make room, then resume with "
                "--ckpt_path last."
            ) from error

    def _open(self) -> None:
        self.close()
        self._file = self.path.open("r+", newline="", encoding="utf-8")

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        metrics = {name: value for name, value in metrics.items() if name in COLUMNS}
        if not metrics:
            return  # from a callback that counts steps in its own way, such as LearningRateMonitor
        if self._file is None:
            if not self._row:
                return  # not opened by `begin`: `validate` and `predict` have no steps
            self._open()
        assert self._file is not None
        with self._explain_write_errors():
            if self._row.get("step") == step:
                self._row.update(metrics)
            else:
                self._row = {"step": step or 0, **metrics}
                self._row_start = self._file.seek(0, os.SEEK_END)
            self._file.seek(self._row_start)
            writer = csv.DictWriter(self._file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            writer.writerow(self._row)
            self._file.truncate()
            self._file.flush()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: settings are in `config.yaml`."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _read_rows(path: Path, after_step: int) -> Iterator[dict[str, str]]:
    """The rows to keep; none after a damaged one, which a power loss can leave."""
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8", errors="replace") as file, suppress(csv.Error):
        yield from (row for row in csv.DictReader(file) if _is_kept(row, after_step))


def _is_kept(row: dict[str, str], after_step: int) -> bool:
    """Whether a row is complete, as the last of a killed run may not be, and of no later step."""
    step = row.get("step") or ""
    is_number = step.isascii() and step.isdigit() and len(step) < 16
    return is_number and int(step) <= after_step and None not in row.values()
