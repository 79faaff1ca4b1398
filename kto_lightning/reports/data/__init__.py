"""The data report: statistics and findings on feedback data, before training.

Names are imported on first use: reading a report from a file needs neither tokenizer nor torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kto_lightning.reports.data.build import (
        as_json,
        report_of_source,
        report_of_training_set,
        write_data_report,
    )
    from kto_lightning.reports.data.fields import DataReport
    from kto_lightning.reports.data.findings import summary_sentences

_MODULES = {
    "DataReport": "kto_lightning.reports.data.fields",
    "as_json": "kto_lightning.reports.data.build",
    "report_of_source": "kto_lightning.reports.data.build",
    "report_of_training_set": "kto_lightning.reports.data.build",
    "summary_sentences": "kto_lightning.reports.data.findings",
    "write_data_report": "kto_lightning.reports.data.build",
}

__all__ = [
    "DataReport",
    "as_json",
    "report_of_source",
    "report_of_training_set",
    "summary_sentences",
    "write_data_report",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
