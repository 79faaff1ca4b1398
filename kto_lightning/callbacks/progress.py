"""The progress bar, or lines of progress where the output is a file or a pipe."""

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

_SHOWN = {"loss": "train/loss", "z0": "train/z0", "margin": "train/reward/margin"}


class ProgressBar(TQDMProgressBar):
    """A bar with loss, z0 and margin, all of which fit into 80 columns."""

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        bar.bar_format = "{desc}{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
        return bar

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return shown_metrics(pl_module, digits=3)


class ProgressLines(Callback):
    """The same as some twenty lines, where the output is a file or a pipe."""

    def __init__(self, num_lines: int = 20) -> None:
        self._num_lines = num_lines
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        num_steps: Any = pl_module.num_training_steps()  # pyright: ignore[reportCallIssue]
        step = trainer.global_step
        if num_steps is None:  # a stream's: 1, 2, … 9, 10, 20, … 90, 100, 200, …
            every, of_all = 10 ** (len(str(step)) - 1), ""
        else:
            every, of_all = max(1, num_steps // self._num_lines), f"/{num_steps}"
        if trainer.is_global_zero and (step % every == 0 or step == num_steps):
            shown = "  ".join(f"{k} {v}" for k, v in shown_metrics(pl_module).items())
            elapsed = time.monotonic() - self._started
            print(f"step {step}{of_all}  {shown}  {elapsed:.0f} s", flush=True)


def shown_metrics(module: Any, *, digits: int = 4) -> dict[str, str]:
    """Loss, z0 and margin of the latest step that had them."""
    latest = module.published.latest
    return {name: f"{latest[key]:.{digits}f}" for name, key in _SHOWN.items() if key in latest}
