"""Preemption: a checkpoint before a run ends that a scheduler, Ctrl-C or a lost process stops."""

import os
import signal
import sys
import threading
from contextlib import suppress
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from kto_lightning.callbacks.lightning_state import kto_data, validates_now
from kto_lightning.errors import StoppedRun
from kto_lightning.training.checkpoints import list_checkpoints

_NAMES = ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
_LOST_WORKER = 1000
"""In place of a signal's number: a loader worker was killed."""
_HOW_TO_RESUME = "Resume with the same command and --ckpt_path last."
_ON_CTRL_C = b"\nStopping after this step. Press Ctrl-C again to stop at once.\n"


class Preempted(StoppedRun):
    """A run was stopped by a signal; `Checkpoints` saves it.

    Args:
        signum: the signal; the exit status is 128 + this, as in a shell.
        step: the last optimizer step.
    """

    def __init__(self, signum: int, step: int) -> None:
        self.status = 128 + signum
        name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        super().__init__(
            f"stopped by {name} after step {step}, which is saved as checkpoints/step={step}.ckpt."
            f" {_HOW_TO_RESUME}"
        )


class LostWorker(StoppedRun):
    """A run was stopped because a loader worker was killed; `Checkpoints` saves it.

    Args:
        step: the last optimizer step.
    """

    def __init__(self, step: int) -> None:
        super().__init__(
            f"a loader worker was killed: stopped after step {step}, which is saved as "
            f"checkpoints/step={step}.ckpt. If memory ran out, lower --data.num_workers. "
            f"{_HOW_TO_RESUME}"
        )


class Preemption(Callback):
    """Stops a run between two steps on SIGTERM, SIGUSR1, SIGHUP or the first Ctrl-C, and when a
    loader worker was killed. A signal that the process was started to ignore stays ignored, as
    SIGHUP under `nohup`.

    The handler only records the signal. At the end of each step the ranks agree on what they have
    received, and `Preempted` ends the run on all of them; `Checkpoints` saves it.

    Lightning's own handlers are replaced during training: with several ranks they communicate
    inside the handler, which hangs, and on SLURM they write checkpoints of their own. Outside
    training, where there is nothing to save, several ranks end at once.

    A validation that is due or incomplete is not waited for: the resumed run makes it before its
    first step.
    """

    def __init__(self) -> None:
        self._signum = 0
        self._handlers: dict[int, Any] = {}
        self._trains = False
        self._prints = True
        self._validation_due = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prints = trainer.is_global_zero
        self._signum = int(signal.SIGTERM) if trainer.received_sigterm else 0
        self._trains = True
        if threading.current_thread() is threading.main_thread():
            heeded = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
            self._handlers = {signum: signal.signal(signum, self._record) for signum in heeded}
        if self._validation_due:
            _run_due_validation(trainer)
            self._validation_due = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self._stop_if_signalled(trainer, validation_due=validates_now(trainer))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self._stop_if_signalled(trainer, validation_due=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _restore_default_sigterm(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _restore_default_sigterm(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_signalled(trainer, validation_due=False)
        self._restore_handlers()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore_handlers()
        if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit":
            self._print_last_checkpoint(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"validation_due": self._validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validation_due = state_dict["validation_due"]

    def _record(self, signum: int, frame: Any) -> None:
        if signum == signal.SIGINT:
            if self._signum == signal.SIGINT:
                raise KeyboardInterrupt
            if self._prints:
                with suppress(OSError):  # the terminal may be gone
                    os.write(2, _ON_CTRL_C)  # not `print`: a signal may arrive inside it
        self._signum = self._signum or signum

    def _stop_if_signalled(self, trainer: Trainer, *, validation_due: bool) -> None:
        """Raise Preempted or LostWorker on all ranks if one of them has reason to stop."""
        if not self._trains:
            return
        signum = _LOST_WORKER if kto_data(trainer).has_lost_worker() else self._signum
        if trainer.world_size > 1:
            own = torch.tensor(signum, device=trainer.strategy.root_device)
            signum = int(trainer.strategy.reduce(own, reduce_op="max"))
        if signum:
            self._validation_due = validation_due
            step = trainer.global_step
            raise LostWorker(step) if signum == _LOST_WORKER else Preempted(signum, step)

    def _restore_handlers(self) -> None:
        self._trains = False
        for signum, handler in self._handlers.items():
            if handler is not None:  # None: it was not set from Python and cannot be set from it
                signal.signal(signum, handler)
        self._handlers = {}

    def _print_last_checkpoint(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        found = list_checkpoints(trainer.default_root_dir)
        checkpoint = "it has no checkpoint yet; set --checkpoint.every_n_steps to save some."
        if found:
            checkpoint = f"the last checkpoint is {found[-1][1]}. {_HOW_TO_RESUME}"
        print(f"stopped by Ctrl-C after step {trainer.global_step}; {checkpoint}", file=sys.stderr)


def _restore_default_sigterm(trainer: Trainer) -> None:
    """Let SIGTERM end `validate` and `predict` on several ranks at once, as Lightning's own handler
    would not; Lightning restores the handler of before at their end."""
    outside_training = trainer.state.fn != "fit" and trainer.world_size > 1
    if outside_training and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run_due_validation(trainer: Trainer) -> None:
    """Run the validation that was due when the run was stopped."""
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    val_loop.restarting = False
    trainer.validating = True
    val_loop.run()
    trainer.training = True
