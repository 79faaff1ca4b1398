"""When checkpoints are written in the background, and when older ones are removed."""

import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from lightning import LightningModule, Trainer

from kto_lightning.callbacks import checkpoints
from kto_lightning.callbacks.checkpoints import Checkpoints
from kto_lightning.errors import KTOError, StoppedRun
from kto_lightning.strategies.fsdp2 import FSDP2

MODULE = MagicMock(spec=LightningModule)


class Run:
    """Steps and checkpoints of a trainer whose strategy can save in the background."""

    def __init__(self, output: Path, monkeypatch: pytest.MonkeyPatch, save_seconds: float) -> None:
        self.save_seconds, self.pending, self.background = save_seconds, Path(), []
        self.directory = output / "checkpoints"
        self.directory.mkdir()
        self.callback = Checkpoints(every_n_steps=1)
        self.trainer = MagicMock(spec=Trainer, default_root_dir=str(output), is_global_zero=True)
        self.trainer.save_checkpoint = self.save
        self.trainer.state = SimpleNamespace(fn="fit")
        strategy = self.trainer.strategy = FSDP2()
        self.finished = False
        monkeypatch.setattr(strategy, "broadcast", lambda value: value)
        monkeypatch.setattr(strategy, "finish_saving", self.finish)
        monkeypatch.setattr(strategy, "remove_checkpoint", Path.rmdir)
        for name in ("validates_now", "ends_epoch"):
            monkeypatch.setattr(checkpoints, name, lambda _: False)

    def save(self, path: Path, storage_options: dict[str, bool] | None) -> None:
        self.pending = path
        self.background.append(storage_options is not None)
        if storage_options is None:
            time.sleep(self.save_seconds)
            path.mkdir()

    def finish(self, *, wait: bool) -> bool:
        if self.background[-1] and (wait or self.finished):
            self.pending.mkdir(exist_ok=True)
        return wait or self.finished

    def step(self, step: int) -> None:
        self.trainer.global_step = step
        self.callback.on_train_batch_start(self.trainer, MODULE)
        time.sleep(0.02)
        self.callback.on_train_batch_end(self.trainer, MODULE)

    @property
    def steps(self) -> list[str]:
        return sorted(path.stem for path in self.directory.iterdir())


def test_a_save_that_is_shorter_than_a_step_is_not_in_the_background(tmp_path: Path, monkeypatch):
    run = Run(tmp_path, monkeypatch, save_seconds=0.0)
    for step in (1, 2, 3):
        run.step(step)
    assert run.background == [False] * 3
    assert run.steps == ["step=2", "step=3"]


def test_after_a_long_save_the_next_are_in_the_background(tmp_path: Path, monkeypatch):
    run = Run(tmp_path, monkeypatch, save_seconds=0.1)
    for step in (1, 2):
        run.step(step)
    assert run.steps == ["step=1"]
    run.step(3)  # waits for the second
    assert run.steps == ["step=1", "step=2"]
    run.callback.every_n_steps, run.finished = 10, True
    run.step(4)
    assert run.steps == ["step=2", "step=3"]  # the oldest goes once the third is whole
    run.callback.on_train_end(run.trainer, MODULE)
    assert run.background == [False, True, True, False]
    assert run.steps == ["step=3", "step=4"]


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_that_stops_waits_for_its_checkpoint(saved: bool, tmp_path: Path, monkeypatch):
    run = Run(tmp_path, monkeypatch, save_seconds=0.1)
    for step in (1, 2):
        run.step(step)
    run.trainer.global_step = 2 if saved else 3
    run.callback.on_exception(run.trainer, MODULE, StoppedRun("stopped"))
    assert run.steps == (["step=1", "step=2"] if saved else ["step=2", "step=3"])


def test_an_error_in_the_background_ends_the_next_step(tmp_path: Path, monkeypatch):
    run = Run(tmp_path, monkeypatch, save_seconds=0.1)
    for step in (1, 2):
        run.step(step)

    def fail(*, wait: bool) -> bool:
        raise KTOError("the checkpoint cannot be written")

    monkeypatch.setattr(run.trainer.strategy, "finish_saving", fail)
    with pytest.raises(KTOError, match="cannot be written"):
        run.step(3)
    assert run.steps == ["step=1"]
