"""Progress of a run: a bar on a terminal, lines in a file or a pipe."""

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from kto_lightning.callbacks.lightning_state import kto_module
from kto_lightning.module import KTOModule

_SHOWN = {"loss": "train/loss", "z0": "train/z0", "margin": "train/reward/margin"}


class ProgressBar(TQDMProgressBar):
    """A bar with loss, z0 and margin that fits into 80 columns."""

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        bar.bar_format = "{desc}{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
        return bar

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return _shown_metrics(kto_module(pl_module), digits=3)


class ProgressLines(Callback):
    """About `num_lines` lines with the same numbers; of a stream, whose length is unknown, lines at
    steps 1, 2, … 9, 10, 20, … 90, 100, 200, …"""

    def __init__(self, num_lines: int = 20) -> None:
        self._num_lines = num_lines
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        num_steps = kto_module(pl_module).num_training_steps()
        step = trainer.global_step
        if num_steps is None:
            every, total = 10 ** (len(str(step)) - 1), ""
        else:
            every, total = max(1, num_steps // self._num_lines), f"/{num_steps}"
        if trainer.is_global_zero and (step % every == 0 or step == num_steps):
            shown = "  ".join(f"{k} {v}" for k, v in _shown_metrics(kto_module(pl_module)).items())
            elapsed = time.monotonic() - self._started
            print(f"step {step}{total}  {shown}  {elapsed:.0f} s", flush=True)


def _shown_metrics(module: KTOModule, *, digits: int = 4) -> dict[str, str]:
    """Loss, z0 and margin of the latest step that had them."""
    latest = module.published.latest
    return {name: f"{latest[key]:.{digits}f}" for name, key in _SHOWN.items() if key in latest}
