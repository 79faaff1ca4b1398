"""The run report, made from the files in OUTPUT without loading a model."""

from kto_lightning.reports.run.build import run_page, write_run_report
from kto_lightning.reports.run.run import Run, read_run
from kto_lightning.reports.run.verdict import headline, verdict

__all__ = ["Run", "headline", "read_run", "run_page", "verdict", "write_run_report"]
