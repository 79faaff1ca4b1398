"""Loggers that a test hands to the Trainer, or names on the command line by its import path."""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from kto_lightning.training.metrics import MEASURED


class _TestLogger(Logger):
    @property
    def name(self) -> str:
        return "test"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *arguments: Any, **more: Any) -> None:
        """Do nothing: settings are in `config.yaml`."""


class RowLogger(_TestLogger):
    """Keeps every row in `rows`, except time and memory, which differ from run to run."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        measured = {f"train/{name}" for name in MEASURED}
        kept = {name: value for name, value in metrics.items() if name not in measured}
        self.rows.append({"step": step, **kept})


class LineLogger(_TestLogger):
    """Appends `step name value` lines to a file.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = Path(path)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(f"{step} {name} {value!r}\n" for name, value in metrics.items())
