"""Access to what Lightning leaves untyped or private: a run's module and data, a due validation,
the end of an epoch."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer

from kto_lightning.data.datamodule import KTODataModule
from kto_lightning.errors import KTOError
from kto_lightning.module import KTOModule
from kto_lightning.training.guards import is_out_of_memory


def kto_module(module: LightningModule) -> KTOModule:
    """The module that a hook is given, with its type."""
    assert isinstance(module, KTOModule)
    return module


def kto_data(trainer: Trainer) -> KTODataModule:
    """The run's data module."""
    # Lightning assigns the attribute in `fit` and declares it nowhere.
    data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(data, KTODataModule)
    return data


def validates_now(trainer: Trainer) -> bool:
    """Whether Lightning runs a validation between this optimizer step and the next."""
    loop = trainer.fit_loop.epoch_loop
    # Set up before the first step; its type says that it may be None.
    return loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # pyright: ignore[reportArgumentType]


def ends_epoch(trainer: Trainer) -> bool:
    """Whether the latest step is the last of its epoch."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def explain_restoring(trainer: Trainer, checkpoint: Path) -> None:
    """Let errors while a checkpoint's values are restored name it; whole files may hold any.

    Raises:
        KTOError: later, from the trainer, in place of Python's own errors.
    """
    connector = trainer._checkpoint_connector
    for name in ("_restore_modules_and_callbacks", "restore_training_state"):
        setattr(connector, name, partial(_restore, getattr(connector, name), checkpoint))


def _restore(restore: Callable[..., None], checkpoint: Path, *args: Any, **kwargs: Any) -> None:
    try:
        restore(*args, **kwargs)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        if is_out_of_memory(e):
            raise
        reason = " ".join(str(e).split())[:300]
        raise KTOError(
            f"{checkpoint} cannot be restored ({type(e).__name__}: {reason}). Give another "
            "checkpoint that `fit` wrote for this model."
        ) from e
