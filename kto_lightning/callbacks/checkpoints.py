"""What happens around the steps: checkpoints, progress, files that tell of them."""

import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_only

from kto_lightning.errors import ConfigError, StoppedRun
from kto_lightning.files import write_whole
from kto_lightning.reports.data import (
    as_json,
    length_finding,
    report_of_training_set,
    write_report,
)
from kto_lightning.training.checkpoints import settle_progress
from kto_lightning.training.metrics_csv import MetricsFile
from kto_lightning.training.output import checkpoints_of, list_checkpoints

_SHOWN = {"loss": "train/loss", "z0": "train/z0", "margin": "train/reward/margin"}


class Checkpoints(Checkpoint):
    """Saves `OUTPUT/checkpoints/step=N.ckpt` and keeps the last two.

    Args:
        every_n_steps: optimizer steps from one checkpoint to the next; null: at the end only.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(
                f"--checkpoint.every_n_steps must be at least 1 or null, got {every_n_steps}."
            )
        self.every_n_steps = every_n_steps
        self._saved_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set aside what lies behind the checkpoint that was gone on from: `last` is ours."""
        if not trainer.is_global_zero:
            return
        for step, path in list_checkpoints(trainer.default_root_dir):
            if step > trainer.global_step:
                os.replace(path, path.with_suffix(".ckpt.old"))
                print(f"warning: {path} is of a later step; renamed to .ckpt.old", file=sys.stderr)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if self._is_due(trainer) and not validates_now(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A step that is validated is saved afterwards: a resumed run would leave that out."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._is_due(trainer):
            self._save(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        return bool(self.every_n_steps) and trainer.global_step % self.every_n_steps == 0

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        loops, per_epoch = checkpoint["loops"]["fit_loop"], trainer.num_training_batches
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        place = data.place_in_stream()
        if place is not None:
            settle_progress(loops, num_epochs=place.epoch, num_in_epoch=place.step)
        else:
            num_steps = loops["epoch_loop.batch_progress"]["total"]["processed"]
            num_epochs, num_in_epoch = divmod(num_steps, int(per_epoch))
            settle_progress(loops, num_epochs=num_epochs, num_in_epoch=num_in_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save what a run has that stops between two steps, on all ranks alike."""
        if isinstance(exception, StoppedRun) and trainer.state.fn == "fit" and trainer.global_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step == self._saved_step:
            return
        directory = checkpoints_of(trainer.default_root_dir)
        trainer.save_checkpoint(directory / f"step={step}.ckpt")
        self._saved_step = step
        if trainer.is_global_zero:
            for _, old in list_checkpoints(trainer.default_root_dir)[:-2]:
                trainer.strategy.remove_checkpoint(old)


def validates_now(trainer: Trainer) -> bool:
    """Whether Lightning runs a validation between this optimizer step and the next."""
    loop = trainer.fit_loop.epoch_loop
    return loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # pyright: ignore[reportArgumentType]


class MetricsStart(Callback):
    """Opens `metrics.csv` once the run knows at which step it begins."""

    def __init__(self) -> None:
        self._begun = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = True
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.begin(after_step=trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that was stopped in its last validation has no step left to take."""
        if not self._begun:
            self.on_train_start(trainer, pl_module)


class StepSeed(Callback):
    """Draws every step's dropout from the run's seed and the step, so that a resumed run goes on
    with the numbers that the killed one would have drawn."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        entropy = [seed, trainer.global_step, trainer.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


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
    latest = module.latest_metrics
    return {name: f"{latest[key]:.{digits}f}" for name, key in _SHOWN.items() if key in latest}


class DataReportFile(Callback):
    """Writes `OUTPUT/data_report.json` before the first step; of a stream, which is not read by
    then, what was counted until the run ended."""

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if data.stream is not None:
            _write_stream_report(trainer)
            return
        report = report_of_training_set(
            data.train,
            data.train_set.records,
            data.train_set,
            batch_size=data.batch_size,
            max_length=data.max_length,
            tokenizer=data.tokenizer.name_or_path,
        )
        path = Path(trainer.default_root_dir) / "data_report.json"
        write_report(path, report)
        count = len(report.findings)
        found = f"{count} finding{'' if count == 1 else 's'}"
        data.report_line = f"{path}, {found} (report.html shows them)"
        sentence = length_finding(report)
        if sentence is not None:
            data.warnings.append(sentence[0].lower() + sentence[1:])

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.datamodule.stream is not None:  # pyright: ignore[reportAttributeAccessIssue]
            _write_stream_report(trainer)


def _write_stream_report(trainer: Any) -> None:
    stream = trainer.datamodule.stream
    sources = [stream.source] if isinstance(stream.source, str) else stream.source
    content = {"sources": sources, "streamed": True} | asdict(stream.counts)
    path = Path(trainer.default_root_dir) / "data_report.json"
    write_whole(path, as_json(content) + "\n", what="the data report")
