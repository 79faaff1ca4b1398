"""The run report: what a run did, from what it left in OUTPUT. No model is loaded for it."""

from kto_lightning.run_report.build import report_of_run, run_page
from kto_lightning.run_report.run import Run, read_run
from kto_lightning.run_report.verdict import headline, verdict

__all__ = ["Run", "headline", "read_run", "report_of_run", "run_page", "verdict"]
