"""The data report: what is worth knowing of feedback before anything is trained on it."""

from kto_lightning.report.build import (
    as_json,
    report_of_source,
    report_of_training_set,
    write_report,
)
from kto_lightning.report.fields import DataReport
from kto_lightning.report.findings import length_finding

__all__ = [
    "DataReport",
    "as_json",
    "length_finding",
    "report_of_source",
    "report_of_training_set",
    "write_report",
]
