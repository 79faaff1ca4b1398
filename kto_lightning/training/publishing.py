"""Publishing of metrics to loggers and callbacks."""

from collections.abc import Mapping

from lightning import Trainer

from kto_lightning.training.metrics import MEASURED
from kto_lightning.training.metrics_csv import MetricsFile


class PublishedMetrics:
    """Sends rows of metrics to every logger, and keeps what was sent.

    Attributes:
        latest: the latest value of every metric that the batch decides, by `stage/name`.
        last_row: the row that was sent last.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self.last_row: dict[str, float] = {}

    def publish(self, trainer: Trainer, stage: str, metrics: Mapping[str, float | None]) -> None:
        """Send a row, without the metrics that its batch could not give (None).

        `metrics.csv` gets every row, other loggers every `log_every_n_steps`-th training step.
        """
        row = {f"{stage}/{name}": value for name, value in metrics.items() if value is not None}
        measured = {f"{stage}/{name}" for name in MEASURED}
        self.latest |= {name: value for name, value in row.items() if name not in measured}
        self.last_row = row
        step = trainer.global_step
        # Lightning sets this attribute without declaring it.
        every: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        due = stage != "train" or (every > 0 and step % every == 0)
        for logger in trainer.loggers:
            if due or isinstance(logger, MetricsFile):
                logger.log_metrics(row, step=step)
