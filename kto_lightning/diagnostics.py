"""What `diagnosis` finds in a run, said on stderr while it goes on."""

import sys
from functools import partial
from typing import Any

from lightning import Callback, LightningModule, Trainer

from kto_lightning.diagnosis import RunningDiagnosis


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
        bar = trainer.progress_bar_callback
        say = print if bar is None else bar.print  # a bar makes way for a line
        say = partial(say, file=sys.stderr)
        row: Any = pl_module.last_row
        for sentence in self._diagnosis.read(row):
            say(f"warning: {sentence}")
