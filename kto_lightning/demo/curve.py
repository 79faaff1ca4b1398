"""Reward curves of a run, read from `metrics.csv`, as sparklines and as a PNG."""

import csv
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from kto_lightning.reports.html.charts import running_mean

REWARDS = {
    "desirable": "train/reward/desirable",
    "undesirable": "train/reward/undesirable",
    "margin": "train/reward/margin",
}
BLOCKS = "▁▂▃▄▅▆▇█"
WINDOW = 9
"""Steps of the running mean that is drawn."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Curve:
    """One quantity over the optimizer steps in which it was measured; a batch that lacks a class
    has no reward of it."""

    steps: list[int]
    values: list[float]

    def means(self, count: int) -> list[float]:
        """Means over at most `count` consecutive stretches of about equal length."""
        count = min(count, len(self.values))
        edges = [len(self.values) * part // count for part in range(count + 1)] if count else []
        return [sum(self.values[low:high]) / (high - low) for low, high in pairwise(edges)]


def read_rewards(metrics_csv: Path) -> dict[str, Curve]:
    """The reward curves by their names in REWARDS."""
    with metrics_csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    curves: dict[str, Curve] = {}
    for name, column in REWARDS.items():
        measured = [row for row in rows if row[column]]
        curves[name] = Curve(
            steps=[int(row["step"]) for row in measured],
            values=[float(row[column]) for row in measured],
        )
    return curves


def sparkline(values: list[float], low: float, high: float) -> str:
    """One block per value, whose height is its position between `low` and `high`."""
    span = high - low or 1.0
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round(min(1.0, max(0.0, (v - low) / span)) * top)] for v in values)


def write_png(curves: dict[str, Curve], path: Path) -> bool:
    """Draw the rewards and their running means to `path`; False if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # slow to import
    except ImportError:
        return False
    figure = Figure(figsize=(7.5, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for (name, curve), colour in zip(curves.items(), ("tab:green", "tab:red", "0.35"), strict=True):
        axes.plot(curve.steps, curve.values, color=colour, alpha=0.25, linewidth=1)
        means = running_mean(np.array(curve.values), WINDOW)
        axes.plot(curve.steps, means, color=colour, linewidth=2, label=name)
    axes.axhline(0.0, color="0.7", linewidth=0.8, zorder=0)
    axes.set(
        title="Rewards on the training batches",
        xlabel="optimizer step",
        ylabel="β · log(policy / reference), in nats",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    return True
