"""Findings on learning: class balance of the batches, margin, and held-out records."""

from collections.abc import Iterator

import numpy as np

from kto_lightning.reports.diagnosis import (
    MARGIN_WINDOW,
    MIN_FALL,
    WINDOW,
    margin_finding,
    margin_has_fallen,
)
from kto_lightning.reports.finding import Finding
from kto_lightning.reports.run.run import LABELS, Run
from kto_lightning.reports.run.windows import best_window, first_and_last, standard_error

MIN_ERRORS = 3.0
"""Least difference between two means, in standard errors, that is reported as a change."""
MAX_SINGLE_CLASS = 0.2
"""Share of single-class batches above which they are reported."""
GOOD_AUC, POOR_AUC = 0.7, 0.55
MAX_AUC_LOSS = 0.03
"""Loss of held-out AUC from its highest value above which it is reported."""


def class_findings(run: Run) -> Iterator[Finding]:
    """Batches without one of the classes."""
    rewards = {label: run.column(f"train/reward/{label}") for label in LABELS}
    absent = [label for label in LABELS if np.isnan(rewards[label]).all()]
    if len(absent) == 1 and f"train/reward/{absent[0]}" in run.columns:
        yield Finding(
            grade="problem",
            what=f"There was no {absent[0]} completion in any batch",
            meaning="KTO learns from the contrast of both classes; with one alone the policy "
            "only moves towards or away from these completions",
            action=f"add {absent[0]} records, and check the labels with `inspect`",
        )
        return
    lacking = float(np.isnan(run.column("train/reward/margin")).mean())
    if not absent and lacking > MAX_SINGLE_CLASS:
        yield Finding(
            grade="warning",
            what=f"{lacking:.0%} of the batches had completions of one class only",
            meaning="such a step does not contrast the two classes and has no margin",
            action="raise --data.batch_size, and keep --data.shuffle true",
        )


def margin_findings(run: Run) -> Iterator[Finding]:
    """Change of the training margin over the run."""
    margins = run.measured("train/reward/margin")
    if len(margins) < 2:
        return
    first, last = first_and_last(margins)
    before, after = first.mean(), last.mean()
    best = best_window(margins)
    if best is not None and margin_has_fallen(best.tolist(), margins[-MARGIN_WINDOW:].tolist()):
        yield margin_finding(float(best.mean()), float(margins[-MARGIN_WINDOW:].mean()))
        return
    of = f" (means of {len(first)} steps)" if len(first) > 1 else ""
    if after - before > MIN_ERRORS * standard_error(first, last) and after > 0:
        yield Finding(
            grade="good",
            what=f"The margin rose from {before:.2f} to {after:.2f}{of}",
            meaning="the policy separates desirable from undesirable completions better than at "
            "the start: a reward is β · log(policy / reference) of a completion, the margin the "
            "difference between the mean rewards of the two classes",
        )
        return
    clear = before - after > MIN_ERRORS * standard_error(first, last)
    yield Finding(
        grade="warning" if clear else "note",
        what=f"The margin {'went' if clear else 'did not clearly move: it went'} from "
        f"{before:.3g} to {after:.3g}{of}",
        meaning="the policy does not separate desirable from undesirable completions better than "
        "at the start",
        action="if the rewards are near 0, raise --model.learning_rate or train longer; if they "
        "are not, check the labels with `inspect`",
    )


def held_out_findings(run: Run) -> Iterator[Finding]:
    """AUC and margin on held-out records, and overfitting."""
    aucs, margins = run.measured("val/reward/auc"), run.measured("val/reward/margin")
    if not len(run.measured("val/loss")):
        yield Finding(
            grade="note",
            what="No records were held out",
            meaning="all numbers are from training records, and from the second epoch on they are "
            "better than on new records",
            action="give --data.validation a file or a fraction such as 0.1",
        )
        return
    if len(aucs):
        yield _auc_finding(float(aucs[-1]))
        best = int(np.nanargmax(run.column("val/reward/auc")))
        if aucs.max() - aucs[-1] > MAX_AUC_LOSS:
            yield Finding(
                grade="warning",
                what=f"The held-out AUC was highest at step {run.steps[best]:,} ({aucs.max():.2f}) "
                f"and is {aucs[-1]:.2f} at the end",
                meaning="after that step the policy overfitted its training records, unless the "
                "held-out records are so few that this is chance",
                action="train only that many steps (--trainer.max_steps), or lower "
                "--model.learning_rate",
            )
    train = run.measured("train/reward/margin")
    if len(margins) and len(train) >= WINDOW:
        seen = float(train[-WINDOW:].mean())
        if seen > MIN_FALL and margins[-1] < seen / 3:
            yield Finding(
                grade="warning",
                what=f"The margin is {margins[-1]:.2f} on held-out records and {seen:.2f} on "
                "training records",
                meaning="most of what was learnt does not generalize to new records",
                action="train for fewer epochs, add records, or raise --model.beta",
            )


def _auc_finding(auc: float) -> Finding:
    what = f"The held-out AUC is {auc:.2f}"
    meaning = (
        f"in {auc:.0%} of the pairs of a desirable and an undesirable held-out completion the "
        "desirable one has the higher reward; 50% would be chance"
    )
    if auc >= GOOD_AUC:
        return Finding(grade="good", what=what, meaning=meaning)
    if auc >= POOR_AUC:
        return Finding(
            grade="note",
            what=what,
            meaning=meaning,
            action="if it still rises, train longer; otherwise add records or clean their labels",
        )
    return Finding(
        grade="warning",
        what=what,
        meaning=meaning,
        action="train longer or with a higher --model.learning_rate; if the training margin is "
        "high nevertheless, check the labels: they are random, or those of both sets contradict "
        "each other",
    )
