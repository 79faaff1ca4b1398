"""What `diagnosis` finds in a run, said on stderr while it goes on."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

from kto_lightning.distributed import warn
from kto_lightning.reports.diagnosis import RunningDiagnosis


class Diagnostics(Callback):
    """Warns on stderr of what `RunningDiagnosis` finds. A resumed run starts it afresh."""

    def __init__(self) -> None:
        self._diagnosis: RunningDiagnosis | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._diagnosis = RunningDiagnosis(pl_module.beta)  # pyright: ignore[reportArgumentType]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if not trainer.is_global_zero:
            return
        assert self._diagnosis is not None
        row: Any = pl_module.last_row
        for sentence in self._diagnosis.read(row):
            warn(trainer, sentence)
