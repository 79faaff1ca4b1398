"""The verdict on a run: findings from its metrics, with their meaning and what to do."""

from collections.abc import Iterator

import numpy as np

from kto_lightning.batches.objective import has_reference_point
from kto_lightning.reports.diagnosis import (
    MIN_FALL,
    STUCK_STEPS,
    WINDOW,
    is_saturated,
    saturation_finding,
    z0_finding,
)
from kto_lightning.reports.finding import Finding, capitalize_first
from kto_lightning.reports.run.learning import (
    MIN_ERRORS,
    class_findings,
    held_out_findings,
    margin_findings,
)
from kto_lightning.reports.run.run import LABELS, Run
from kto_lightning.reports.run.windows import first_and_last, standard_error, window_length

FEW_STEPS = 50
"""Steps below which the noise of means exceeds their change."""
MOST_STEPS = 0.9
"""Share of clipped steps above which clipping is reported."""
_STATUS = {
    "running": "the run is still preparing",
    "killed": "its process has ended without a word, as after kill -9, lack of memory or power",
    "stopped": "it was stopped",
}
"""How a run without a model came to be, in words."""


def verdict(run: Run) -> list[Finding]:
    """All findings, in reading order."""
    if not len(run.steps):
        return [
            Finding(
                grade="problem",
                what="No optimizer step has been completed",
                meaning=_STATUS.get(run.status or "", "it was stopped or is still preparing"),
                action="read what `fit` printed, fix the cause and start it again",
            )
        ]
    parts = (
        _non_finite,
        _progress,
        class_findings,
        margin_findings,
        held_out_findings,
        _reference_point,
        _rewards,
        _saturation,
        _optimization,
    )
    return [finding for part in parts for finding in part(run)]


def headline(findings: list[Finding]) -> str:
    """The verdict in up to four sentences, problems first."""
    problems = [one for one in findings if one.grade == "problem"]
    chosen = [*problems, *(one for one in findings if one not in problems)][:4]
    return " ".join(f"{capitalize_first(one.what)}." for one in chosen)


def _non_finite(run: Run) -> Iterator[Finding]:
    names = [name for name in run.non_finite if name.startswith("train/")]
    if not names:
        return
    first = min(names, key=lambda name: run.non_finite[name])
    yield Finding(
        grade="problem",
        what=f"{first} is not a finite number at step {run.non_finite[first]:,}",
        meaning="the weights are unusable from that step on",
        action="resume from an earlier checkpoint, and lower --model.learning_rate or set "
        "--model.gradient_clip_norm 1.0. If it happens in the first steps, try "
        "--trainer.precision 32-true and look at the records of that batch",
    )


def _progress(run: Run) -> Iterator[Finding]:
    done, planned = int(run.steps[-1]), run.file.planned_steps
    ends_early = planned is not None and done < planned and not run.file.finished
    if ends_early or run.status in ("running", "killed", "stopped"):
        yield _unfinished(run, f"step {done:,}" + (f" of {planned:,}" if planned else ""))
    if done < FEW_STEPS:
        yield Finding(
            grade="note",
            what=f"{done:,} {'step is' if done == 1 else 'steps are'} too few to judge a run by",
            meaning="over so few batches noise exceeds the change of the policy",
            action="train for some hundred steps: --trainer.max_epochs, --trainer.max_steps, or a "
            "smaller --data.batch_size",
        )


def _unfinished(run: Run, place: str) -> Finding:
    status, reason = run.status or "", run.file.reason
    if status == "running":
        return Finding(
            grade="note",
            what=f"The run is at {place}",
            meaning=f"it is still running, as {run.file.process}; this report covers the steps so "
            "far",
        )
    verb = "was killed at" if status == "killed" else "is at"
    why = f" ({reason.splitlines()[0].rstrip('.')})" if status == "stopped" and reason else ""
    return Finding(
        grade="warning",
        what=f"The run {verb} {place}",
        meaning=_STATUS.get(status, "it was stopped or is still running")
        + f"{why}; this report covers the steps so far",
        action=("if it was stopped, " if status not in _STATUS else "")
        + "the same command with --ckpt_path last resumes from its last checkpoint",
    )


def _reference_point(run: Run) -> Iterator[Finding]:
    raw, clamped = run.measured("train/z0_raw"), run.measured("train/z0")
    loss = str(run.setting("model", "loss"))
    if not has_reference_point(loss) or not len(raw) or not len(clamped):
        return
    above = np.flatnonzero(raw >= 0)
    trailing = len(raw) if not len(above) else len(raw) - 1 - int(above[-1])
    if trailing >= STUCK_STEPS:
        yield z0_finding(trailing, float(raw[-1]))
        return
    window = window_length(len(raw))
    still = np.count_nonzero(clamped == 0) / len(clamped)
    stayed = still == 1
    often = f"0 in {still:.0%} of the steps" if still else "never 0"
    mean = raw[-window:].mean()
    yield Finding(
        grade="note" if stayed else "good",
        what="z0 stayed 0"
        if stayed
        else f"z0 was {clamped[-window:].mean():.3g} at the end, and {often}",
        meaning=f"before the clamp at 0 its mean over the last {window} steps is {mean:.3g} nats: "
        f"mismatched completions became {'more' if mean > 0 else 'less'} likely by that much than "
        "under the reference",
    )


def _rewards(run: Run) -> Iterator[Finding]:
    rewards = {label: run.measured(f"train/reward/{label}") for label in LABELS}
    if any(len(values) < WINDOW for values in rewards.values()):
        return
    ends = {label: first_and_last(values)[1] for label, values in rewards.items()}
    means = {label: float(values.mean()) for label, values in ends.items()}
    if all(abs(mean) < MIN_FALL for mean in means.values()):
        yield Finding(
            grade="warning",
            what="The policy has hardly moved: mean rewards are "
            f"{means['desirable']:.2g} (desirable) and {means['undesirable']:.2g} (undesirable) at "
            "the end",
            meaning=f"rewards below {MIN_FALL} change the loss by less than {MIN_FALL / 4}",
            action=f"raise --model.learning_rate{_given(run, 'learning_rate')} three- to tenfold "
            "(LoRA needs about ten times that of full fine-tuning), or train longer",
        )
    desirable = ends["desirable"]
    if means["desirable"] < -max(MIN_FALL, MIN_ERRORS * standard_error(desirable)):
        yield Finding(
            grade="warning",
            what="Desirable completions became less likely than under the reference: their mean "
            f"reward is {means['desirable']:.2f}",
            meaning="the policy learns by making all completions less likely, desirable ones "
            "included, which can degrade its text",
            action="lower --model.learning_rate, or raise --model.desirable_weight or --model.beta",
        )


def _saturation(run: Run) -> Iterator[Finding]:
    beta = run.number("model", "beta")
    for label in LABELS:
        left = run.measured(f"train/gradient_left/{label}")
        rewards, z0 = run.measured(f"train/reward/{label}"), run.measured("train/z0")
        if is_saturated(left.tolist()[-WINDOW:]) and beta is not None and len(rewards) and len(z0):
            yield saturation_finding(
                label,
                left=float(left[-WINDOW:].mean()),
                reward=float(rewards[-WINDOW:].mean()),
                point=beta * float(z0[-WINDOW:].mean()),
            )


def _optimization(run: Run) -> Iterator[Finding]:
    loss, norms, rates = (run.measured(f"train/{name}") for name in ("loss", "grad_norm", "lr"))
    if len(loss) >= FEW_STEPS:
        first, last = first_and_last(loss)
        rise = float(last.mean() - first.mean())
        if rise > MIN_ERRORS * standard_error(first, last):
            yield Finding(
                grade="warning",
                what=f"The loss rose from {first.mean():.3f} to {last.mean():.3f}",
                meaning="the optimizer steps are too large",
                action=f"lower --model.learning_rate{_given(run, 'learning_rate')}, or set "
                "--model.warmup_ratio 0.1 or --model.gradient_clip_norm 1.0",
            )
    if len(norms) and not norms.any():
        yield Finding(
            grade="problem",
            what="The gradient was 0 in every step",
            meaning="nothing was trained",
            action="check the number of trainable parameters in the summary of the run below",
        )
    clip = run.number("model", "gradient_clip_norm")
    if clip is not None and len(norms) >= WINDOW and (norms > clip).mean() > MOST_STEPS:
        yield Finding(
            grade="note",
            what=f"{(norms > clip).mean():.0%} of the steps were clipped to a gradient norm of "
            f"{clip:g} (median {np.median(norms):.3g})",
            meaning="under AdamW that changes little; under SGD the clip norm alone sets the size "
            "of a step",
            action="raise --model.gradient_clip_norm if it should clip outliers only",
        )
    if len(rates) and not rates.any():
        yield Finding(
            grade="problem",
            what="The learning rate was 0 in every step",
            meaning="nothing was trained",
            action="raise --model.learning_rate, or lower --model.warmup_ratio",
        )


def _given(run: Run, key: str) -> str:
    """Such as ` (was 1e-06)`."""
    value = run.number("model", key)
    return "" if value is None else f" (was {value:g})"
