"""The charts of a run, without those of which nothing was measured."""

from collections.abc import Iterator

import numpy as np

from kto_lightning.reports.html import Chart, Colour, Series
from kto_lightning.reports.run.run import Run

STEP = "optimizer step"


def run_charts(run: Run) -> Iterator[Chart]:
    """All charts with data, in reading order."""
    for chart in _all_charts(run):
        chart.series = [one for one in chart.series if np.isfinite(one.y).any()]
        if chart.series:
            yield chart


def _all_charts(run: Run) -> Iterator[Chart]:
    yield from _learning_charts(run)
    yield from _policy_charts(run)
    yield from _cost_charts(run)


def _learning_charts(run: Run) -> Iterator[Chart]:
    yield Chart(
        title="Margin",
        x_label=STEP,
        y_label="reward difference",
        series=[
            _line(run, "train/reward/margin", "training batches", "third"),
            *_held_out(run, "reward/margin"),
        ],
        zero=True,
        caption="Mean reward of desirable minus that of undesirable completions. It should rise.",
    )
    yield Chart(
        title="Rewards of both classes",
        x_label=STEP,
        y_label="β · log-ratio, in nats",
        zero=True,
        series=[
            _line(run, f"train/reward/{label}", label, label, f"train/reward/{label}_std")
            for label in ("desirable", "undesirable")
        ],
        caption="Means over each batch; the bands are one standard deviation over its examples.",
    )
    yield Chart(
        title="Loss",
        x_label=STEP,
        y_label="loss",
        series=[_line(run, "train/loss", "training batches", "desirable"), *_held_out(run, "loss")],
    )
    yield Chart(
        title="Held-out AUC",
        x_label=STEP,
        y_label="reward AUC",
        series=_held_out(run, "reward/auc"),
        level=("chance", 0.5),
        caption="Probability that a desirable held-out completion has a higher reward than an "
        "undesirable one.",
    )
    yield Chart(
        title="Held-out rewards",
        x_label=STEP,
        y_label="β · log-ratio, in nats",
        zero=True,
        series=[
            _points(run, f"val/reward/{label}", label, label, f"val/reward/{label}_std")
            for label in ("desirable", "undesirable")
        ],
        caption="Bars are one standard deviation over the held-out records.",
    )


def _policy_charts(run: Run) -> Iterator[Chart]:
    yield Chart(
        title="Reference point z0",
        x_label=STEP,
        y_label="nats",
        zero=True,
        series=[
            _line(run, "train/z0_raw", "raw, ± standard error", "muted", "train/z0_se"),
            _line(run, "train/z0", "as used (0 or more)", "third"),
        ],
        caption="Mean log-ratio of mismatched completions. Rewards are compared with β z0.",
    )
    yield Chart(
        title="Gradient left",
        x_label=STEP,
        y_label="share of the full gradient",
        percent=True,
        zero=True,
        series=[
            _line(run, f"train/gradient_left/{label}", label, label)
            for label in ("desirable", "undesirable")
        ],
        caption="Near 0% a class is saturated: it contributes almost nothing to the updates.",
    )
    yield Chart(
        title="Log-probs of completions",
        x_label=STEP,
        y_label="nats per completion",
        series=[
            _line(run, f"train/logps/{label}", label, label)
            for label in ("desirable", "undesirable")
        ],
    )
    norms = run.measured("train/grad_norm")
    yield Chart(
        title="Gradient norm",
        x_label=STEP,
        y_label="L2, before clipping",
        log_y=bool(len(norms)) and bool((norms > 0).all()),
        series=[_line(run, "train/grad_norm", "gradient norm", "desirable")],
    )
    yield Chart(
        title="Learning rate",
        x_label=STEP,
        y_label="learning rate",
        zero=True,
        series=[_line(run, "train/lr", "learning rate", "desirable")],
    )


def _cost_charts(run: Run) -> Iterator[Chart]:
    yield Chart(
        title="Speed",
        x_label=STEP,
        y_label="tokens per second",
        zero=True,
        series=[_line(run, "train/tokens_per_second", "tokens per second", "desirable")],
        caption="Prompt and completion tokens of the batch over the seconds of the step.",
    )
    yield Chart(
        title="Memory",
        x_label=STEP,
        y_label="MiB, highest so far",
        zero=True,
        series=[_line(run, "train/peak_memory_mib", "memory", "desirable")],
    )


def _line(run: Run, column: str, name: str, colour: Colour, spread: str | None = None) -> Series:
    return Series(
        name=name,
        x=run.steps.astype(float),
        y=run.column(column),
        colour=colour,
        spread=run.column(spread) if spread is not None and spread in run.columns else None,
    )


def _held_out(run: Run, name: str) -> list[Series]:
    return [_points(run, f"val/{name}", "held-out records", "undesirable")]


def _points(run: Run, column: str, name: str, colour: Colour, spread: str | None = None) -> Series:
    series = _line(run, column, name, colour, spread)
    series.kind = "points"
    return series
