"""KTO fine-tuning of language models in PyTorch Lightning.

    from kto_lightning import KTODataModule, KTOModule, kto_loss, reference_point

Names are imported when they are first used, so that the command line answers `--help` at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kto_lightning.data.columns import Columns
    from kto_lightning.data.datamodule import KTODataModule
    from kto_lightning.data.labels import Labels
    from kto_lightning.loss import kto_loss, reference_point
    from kto_lightning.models.following import Follow
    from kto_lightning.models.lora import LoRA
    from kto_lightning.module import KTOModule

_HOMES = {
    "Columns": "kto_lightning.data.columns",
    "Follow": "kto_lightning.models.following",
    "KTODataModule": "kto_lightning.data.datamodule",
    "KTOModule": "kto_lightning.module",
    "Labels": "kto_lightning.data.labels",
    "LoRA": "kto_lightning.models.loading",
    "kto_loss": "kto_lightning.loss",
    "reference_point": "kto_lightning.loss",
}

__all__ = [
    "Columns",
    "Follow",
    "KTODataModule",
    "KTOModule",
    "Labels",
    "LoRA",
    "kto_loss",
    "reference_point",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
