"""The data report: what is worth knowing of feedback before anything is trained on it.

Names are imported when they are first used: to show a report that lies in a file takes neither
tokenizer nor torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kto_lightning.reports.data.build import (
        as_json,
        report_of_source,
        report_of_training_set,
        write_report,
    )
    from kto_lightning.reports.data.fields import DataReport
    from kto_lightning.reports.data.findings import length_finding

_HOMES = {
    "DataReport": "kto_lightning.reports.data.fields",
    "as_json": "kto_lightning.reports.data.build",
    "length_finding": "kto_lightning.reports.data.findings",
    "report_of_source": "kto_lightning.reports.data.build",
    "report_of_training_set": "kto_lightning.reports.data.build",
    "write_report": "kto_lightning.reports.data.build",
}

__all__ = [
    "DataReport",
    "as_json",
    "length_finding",
    "report_of_source",
    "report_of_training_set",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
