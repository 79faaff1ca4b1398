"""Access to what Lightning leaves untyped or private: a run's module and data, a due validation,
the end of an epoch."""

from lightning import LightningModule, Trainer

from kto_lightning.data.datamodule import KTODataModule
from kto_lightning.module import KTOModule


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
