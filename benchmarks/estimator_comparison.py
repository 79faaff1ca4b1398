"""Two contestants' runs, seed by seed: where z0 went, where margins and losses ended."""

from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
from estimator_runs import CONTESTANTS, Row, Run
from estimator_statistics import paired_difference, standard_error

STRETCHES = 4
"""Parts of a run that z0 is averaged over."""
OURS, THEIRS = CONTESTANTS


def run_metrics(run: Run) -> dict[str, float]:
    """What is compared. Training metrics are means over the last stretch of the steps."""
    half, end = run.held_out[0], run.held_out[-1]
    last = run.train[-max(1, len(run.train) // STRETCHES) :]

    def mean(name: str, rows: list[Row]) -> float:
        values = [value for row in rows if (value := row[name]) is not None]
        if not values:
            raise SystemExit(
                f"reference_point: there is no {name}: a class is absent from the held-out "
                "records or from every late batch. Give more records, or a larger --held-out."
            )
        return fmean(values)

    return {
        "held-out margin, half way": mean("reward/margin", [half]),
        "held-out margin": mean("reward/margin", [end]),
        "held-out loss": mean("loss", [end]),
        "held-out reward AUC": mean("reward/auc", [end]),
        "training margin, last quarter": mean("reward/margin", last),
        "training loss, last quarter": mean("loss", last),
    }


def z0_path(runs: dict[str, list[Run]]) -> list[dict[str, float]]:
    """z0 that examples were trained against, by stretch of the steps; means over the seeds."""
    ours, theirs = runs[OURS], runs[THEIRS]
    edges = [len(ours[0].train) * part // STRETCHES for part in range(STRETCHES + 1)]
    rows = []
    for low, high in pairwise(edges):
        whole = [fmean(float(row["z0"] or 0.0) for row in run.train[low:high]) for run in ours]
        micro = [fmean(map(fmean, run.micro_z0s[low:high])) for run in theirs]
        spread = [fmean(float(np.std(z0s)) for z0s in run.micro_z0s[low:high]) for run in theirs]
        rows.append(
            {
                "from": low + 1,
                "to": high,
                "whole": fmean(whole),
                "whole_se": standard_error(whole),
                "micro": fmean(micro),
                "micro_se": standard_error(micro),
                "micro_spread": fmean(spread),
            }
        )
    return rows


def compare(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """The second part on one data set and batch size: metrics, their differences, z0's path."""
    metrics = {name: [run_metrics(run) for run in runs[name]] for name in runs}
    names = list(metrics[OURS][0])
    rows = []
    for name in names:
        ours, theirs = ([one[name] for one in metrics[who]] for who in (OURS, THEIRS))
        rows.append(
            {
                "metric": name,
                "ours": ours,
                "theirs": theirs,
                "difference": paired_difference(ours, theirs),
            }
        )
    return {"rows": rows, "z0": z0_path(runs)}
