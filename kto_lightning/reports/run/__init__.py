"""The run report: what a run did, from what it left in OUTPUT. No model is loaded for it."""

from kto_lightning.reports.run.build import report_of_run, run_page
from kto_lightning.reports.run.run import Run, read_run
from kto_lightning.reports.run.verdict import headline, verdict

__all__ = ["Run", "headline", "read_run", "report_of_run", "run_page", "verdict"]
