"""A run that is asked to stop, by a scheduler or by Ctrl-C, saves what it has before it ends."""

import os
import signal
import sys
import threading
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from kto_lightning.callbacks.checkpoints import validates_now
from kto_lightning.errors import StoppedRun
from kto_lightning.training.checkpoints import list_checkpoints

_NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
GO_ON = "Go on with the same command and --ckpt_path last."
_ON_CTRL_C = b"\nStopping after this step. Press Ctrl-C again to stop at once.\n"


class Preempted(StoppedRun):
    """A run that was asked to stop, and is saved.

    Args:
        signum: the signal that asked; the exit status is 128 + this, as shells have it.
        step: the last one taken.
    """

    def __init__(self, signum: int, step: int) -> None:
        self.status = 128 + signum
        asked = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        super().__init__(
            f"stopped by {asked} after step {step}, which is saved as checkpoints/step={step}.ckpt."
            f" {GO_ON}"
        )


class Preemption(Callback):
    """Answers SIGTERM, SIGUSR1 and the first Ctrl-C between two steps: the signal's handler leaves
    a note, the ranks agree on it at each step's end, and `Checkpoints` saves what `Preempted` ends.

    Lightning's own handlers are covered for as long as the training lasts: with several ranks they
    communicate inside the handler, which hangs, and on SLURM they write checkpoints of their own.
    Outside training, where nothing is to be saved, several ranks end at once.

    A validation that was due or not complete is not waited for: the run that goes on makes it
    before its first step.
    """

    def __init__(self) -> None:
        self._asked_by = 0
        self._handlers: dict[int, Any] = {}
        self._speaks = True
        self._validation_due = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._speaks = trainer.is_global_zero
        self._asked_by = int(signal.SIGTERM) if trainer.received_sigterm else 0
        if threading.current_thread() is threading.main_thread():
            self._handlers = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        if self._validation_due:
            _validate(trainer)
            self._validation_due = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self._stop_if_asked(trainer, validation_due=validates_now(trainer))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self._stop_if_asked(trainer, validation_due=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _end_at_once_by_sigterm(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _end_at_once_by_sigterm(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_asked(trainer, validation_due=False)
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore()
        if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit":
            self._say_where_to_go_on(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"validation_due": self._validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validation_due = state_dict["validation_due"]

    def _note(self, signum: int, frame: Any) -> None:
        if signum == signal.SIGINT:
            if self._asked_by == signal.SIGINT:
                raise KeyboardInterrupt
            if self._speaks:
                os.write(2, _ON_CTRL_C)  # `print` may not be called again from within itself
        self._asked_by = self._asked_by or signum

    def _stop_if_asked(self, trainer: Trainer, *, validation_due: bool) -> None:
        """Raises Preempted on all ranks if any of them was asked to stop."""
        if not self._handlers:
            return
        asked_by = self._asked_by
        if trainer.world_size > 1:
            note = torch.tensor(asked_by, device=trainer.strategy.root_device)
            asked_by = int(trainer.strategy.reduce(note, reduce_op="max"))
        if asked_by:
            self._validation_due = validation_due
            raise Preempted(asked_by, trainer.global_step)

    def _restore(self) -> None:
        for signum, handler in self._handlers.items():
            if handler is not None:  # None: not set from Python, and cannot be from there
                signal.signal(signum, handler)
        self._handlers = {}

    def _say_where_to_go_on(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        found = list_checkpoints(trainer.default_root_dir)
        where = "it has no checkpoint yet; --checkpoint.every_n_steps makes some."
        if found:
            where = f"the last checkpoint is {found[-1][1]}. {GO_ON}"
        print(f"stopped by Ctrl-C after step {trainer.global_step}; {where}", file=sys.stderr)


def _end_at_once_by_sigterm(trainer: Trainer) -> None:
    """Until Lightning puts back what its own handler covers, at the end of `validate` or so."""
    outside_training = trainer.state.fn != "fit" and trainer.world_size > 1
    if outside_training and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _validate(trainer: Trainer) -> None:
    """Make the validation that the run was to make when it was stopped."""
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    val_loop.restarting = False
    trainer.validating = True
    val_loop.run()
    trainer.training = True
