"""A logger of one's own, as the command line takes it by its import path."""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger


class Lines(Logger):
    """Writes `step name value` lines.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = Path(path)

    @property
    def name(self) -> str:
        return "lines"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *arguments: Any, **more: Any) -> None:
        """Settings are in `config.yaml`."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(f"{step} {name} {value!r}\n" for name, value in metrics.items())
