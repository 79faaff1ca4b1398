"""What a run's numbers say, in plain words: what is the case, what it means, what to do."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from kto_lightning.reports.diagnosis import (
    LEAST_FALL,
    MARGIN_WINDOW,
    STUCK_STEPS,
    WINDOW,
    fallen,
    is_saturated,
    margin_has_fallen,
    saturated,
    stuck,
)
from kto_lightning.reports.finding import Finding, begun
from kto_lightning.reports.run.run import Run

FEW_STEPS = 50
"""Below this many steps means scatter as much as they move."""
CLEAR = 3.0
"""How many standard errors a difference of means must be to be called one."""
MANY_WITHOUT_A_CLASS = 0.2
GOOD_AUC, POOR_AUC = 0.7, 0.55
LOST_AUC = 0.03
MOSTLY = 0.9
LABELS = ("desirable", "undesirable")


def verdict(run: Run) -> list[Finding]:
    """Everything worth a word, in the order in which it should be read."""
    if not len(run.steps):
        return [
            Finding(
                grade="problem",
                what="No optimizer step has been completed",
                meaning="the run was stopped before its first step ended, or is still preparing",
                action="look at what `fit` printed, mend it and start it again",
            )
        ]
    parts = (
        _broken,
        _progress,
        _classes,
        _margin,
        _held_out,
        _reference_point,
        _rewards,
        _saturation,
        _optimization,
    )
    return [finding for part in parts for finding in part(run)]


def headline(findings: list[Finding]) -> str:
    """The verdict in a few sentences: the first things of each kind that matter."""
    grave = [one for one in findings if one.grade == "problem"]
    chosen = [*grave, *(one for one in findings if one not in grave)][:4]
    return " ".join(f"{begun(one.what)}." for one in chosen)


def _broken(run: Run) -> Iterator[Finding]:
    names = [name for name in run.broken if name.startswith("train/")]
    if not names:
        return
    first = min(names, key=lambda name: run.broken[name])
    yield Finding(
        grade="problem",
        what=f"{first} is not a finite number at step {run.broken[first]:,}",
        meaning="from there on the weights are worthless",
        action="go back to a checkpoint from before, and lower --model.learning_rate or set "
        "--model.gradient_clip_norm 1.0. If it happens at the first steps, try "
        "--trainer.precision 32-true and look at the records of that batch",
    )


def _progress(run: Run) -> Iterator[Finding]:
    done, planned = int(run.steps[-1]), run.file.planned_steps
    if planned is not None and done < planned and not run.file.finished:
        yield Finding(
            grade="warning",
            what=f"The run stands at step {done:,} of {planned:,}",
            meaning="it was stopped, or is still running; everything here is of the steps so far",
            action="if it was stopped, the same command with --ckpt_path last goes on from its "
            "last checkpoint",
        )
    if done < FEW_STEPS:
        yield Finding(
            grade="note",
            what=f"{done:,} {'step is' if done == 1 else 'steps are'} too few to judge a run by",
            meaning="means of so few batches scatter more than a policy moves",
            action="train for some hundred steps: --trainer.max_epochs, --trainer.max_steps, or a "
            "smaller --data.batch_size",
        )


def _classes(run: Run) -> Iterator[Finding]:
    rewards = {label: run.column(f"train/reward/{label}") for label in LABELS}
    absent = [label for label in LABELS if np.isnan(rewards[label]).all()]
    if len(absent) == 1 and f"train/reward/{absent[0]}" in run.columns:
        yield Finding(
            grade="problem",
            what=f"There was no {absent[0]} completion in any batch",
            meaning="KTO learns from the contrast of both classes; with one alone the policy "
            "merely drifts towards or away from these texts",
            action=f"add {absent[0]} records, and look at the labels with `inspect`",
        )
        return
    lacking = float(np.isnan(run.column("train/reward/margin")).mean())
    if not absent and lacking > MANY_WITHOUT_A_CLASS:
        yield Finding(
            grade="warning",
            what=f"{lacking:.0%} of the batches had completions of one class only",
            meaning="such a step cannot weigh good against bad, and its margin is unknown",
            action="raise --data.batch_size, and keep --data.shuffle true",
        )


def _margin(run: Run) -> Iterator[Finding]:
    margins = run.known("train/reward/margin")
    if len(margins) < 2:
        return
    first, last = _ends(margins)
    before, after = first.mean(), last.mean()
    best = _best_window(margins)
    if best is not None and margin_has_fallen(best.tolist(), margins[-MARGIN_WINDOW:].tolist()):
        yield fallen(float(best.mean()), float(margins[-MARGIN_WINDOW:].mean()))
        return
    of = f" (means of {len(first)} steps)" if len(first) > 1 else ""
    if after - before > CLEAR * _error(first, last) and after > 0:
        yield Finding(
            grade="good",
            what=f"The margin rose from {before:.2f} to {after:.2f}{of}",
            meaning="the policy tells desirable from undesirable completions ever better: rewards "
            "are β times how much likelier a completion became than under the reference, and the "
            "margin is the difference of the two classes",
        )
        return
    clear = before - after > CLEAR * _error(first, last)
    yield Finding(
        grade="warning" if clear else "note",
        what=f"The margin {'went' if clear else 'did not clearly move: it went'} from "
        f"{before:.3g} to {after:.3g}{of}",
        meaning="the policy does not tell desirable from undesirable completions better than at "
        "the start",
        action="if the rewards are near 0, raise --model.learning_rate or train longer; if they "
        "are not, check the labels with `inspect`",
    )


def _held_out(run: Run) -> Iterator[Finding]:
    aucs, margins = run.known("val/reward/auc"), run.known("val/reward/margin")
    if not len(run.known("val/loss")):
        yield Finding(
            grade="note",
            what="No records were held out",
            meaning="the numbers here are of records that the policy is trained on, and from the "
            "second epoch on they are flattered by that",
            action="give --data.validation a file or a fraction such as 0.1",
        )
        return
    if len(aucs):
        yield _of_auc(float(aucs[-1]))
        best = int(np.nanargmax(run.column("val/reward/auc")))
        if aucs.max() - aucs[-1] > LOST_AUC:
            yield Finding(
                grade="warning",
                what=f"The held-out AUC was highest at step {run.steps[best]:,} ({aucs.max():.2f}) "
                f"and is {aucs[-1]:.2f} at the end",
                meaning="from there on the policy learnt its training records by heart, unless the "
                "held-out records are so few that this is chance",
                action="train that many steps only (--trainer.max_steps), or lower "
                "--model.learning_rate",
            )
    train = run.known("train/reward/margin")
    if len(margins) and len(train) >= WINDOW:
        seen = float(train[-WINDOW:].mean())
        if seen > LEAST_FALL and margins[-1] < seen / 3:
            yield Finding(
                grade="warning",
                what=f"The margin is {margins[-1]:.2f} on held-out records and {seen:.2f} on those "
                "trained on",
                meaning="most of what was learnt does not carry over to new records",
                action="train for fewer epochs, add records, or raise --model.beta",
            )


def _of_auc(auc: float) -> Finding:
    what = f"The held-out AUC is {auc:.2f}"
    meaning = (
        f"of a desirable and an undesirable held-out completion the desirable one has the higher "
        f"reward {auc:.0%} of the time; by chance it would 50%"
    )
    if auc >= GOOD_AUC:
        return Finding(grade="good", what=what, meaning=meaning)
    if auc >= POOR_AUC:
        return Finding(
            grade="note",
            what=what,
            meaning=meaning,
            action="if it still rises, train longer; else more or cleaner records help most",
        )
    return Finding(
        grade="warning",
        what=what,
        meaning=meaning,
        action="train longer or with a higher --model.learning_rate; if the training margin is "
        "high all the same, the labels of the two sets contradict each other or follow no rule",
    )


def _reference_point(run: Run) -> Iterator[Finding]:
    raw, clamped = run.known("train/z0_raw"), run.known("train/z0")
    if run.setting("model", "loss") == "apo_zero_unpaired" or not len(raw) or not len(clamped):
        return
    above = np.flatnonzero(raw >= 0)
    trailing = len(raw) if not len(above) else len(raw) - 1 - int(above[-1])
    if trailing >= STUCK_STEPS:
        yield stuck(trailing, float(raw[-1]))
        return
    window = _window(len(raw))
    still = np.count_nonzero(clamped == 0) / len(clamped)
    stayed = still == 1
    often = f"in {still:.0%} of the steps" if still else "never"
    yield Finding(
        grade="note" if stayed else "good",
        what="z0 stayed 0"
        if stayed
        else f"z0 was {clamped[-window:].mean():.3g} at the end, and {often} 0",
        meaning=f"raw, before it is cut off at 0, its mean over the last {window} steps is "
        f"{raw[-window:].mean():.3g} nats: by so much mismatched answers became "
        f"{'likelier' if raw[-window:].mean() > 0 else 'less likely'} than under the reference",
    )


def _rewards(run: Run) -> Iterator[Finding]:
    rewards = {label: run.known(f"train/reward/{label}") for label in LABELS}
    if any(len(values) < WINDOW for values in rewards.values()):
        return
    ends = {label: _ends(values)[1] for label, values in rewards.items()}
    means = {label: float(values.mean()) for label, values in ends.items()}
    if all(abs(mean) < LEAST_FALL for mean in means.values()):
        yield Finding(
            grade="warning",
            what="The policy has hardly moved: mean rewards are "
            f"{means['desirable']:.2g} (desirable) and {means['undesirable']:.2g} (undesirable) at "
            "the end",
            meaning=f"rewards below {LEAST_FALL} change the loss by less than {LEAST_FALL / 4}",
            action=f"raise --model.learning_rate{_given(run, 'learning_rate')} three- to tenfold "
            "(LoRA takes ten times that of full fine-tuning), or train longer",
        )
    desirable = ends["desirable"]
    if means["desirable"] < -max(LEAST_FALL, CLEAR * _error(desirable)):
        yield Finding(
            grade="warning",
            what="Desirable completions became less likely than under the reference: their mean "
            f"reward is {means['desirable']:.2f}",
            meaning="the policy learns by making everything less likely, good answers included, "
            "and may begin to ramble",
            action="lower --model.learning_rate, or raise --model.desirable_weight or --model.beta",
        )


def _saturation(run: Run) -> Iterator[Finding]:
    beta = run.number("model", "beta")
    for label in LABELS:
        left = run.known(f"train/gradient_left/{label}")
        rewards, z0 = run.known(f"train/reward/{label}"), run.known("train/z0")
        if is_saturated(left.tolist()[-WINDOW:]) and beta is not None and len(rewards) and len(z0):
            yield saturated(
                label,
                left=float(left[-WINDOW:].mean()),
                reward=float(rewards[-WINDOW:].mean()),
                point=beta * float(z0[-WINDOW:].mean()),
            )


def _optimization(run: Run) -> Iterator[Finding]:
    loss, norms, rates = (run.known(f"train/{name}") for name in ("loss", "grad_norm", "lr"))
    if len(loss) >= FEW_STEPS:
        first, last = _ends(loss)
        rise = float(last.mean() - first.mean())
        if rise > CLEAR * _error(first, last):
            yield Finding(
                grade="warning",
                what=f"The loss rose from {first.mean():.3f} to {last.mean():.3f}",
                meaning="steps overshoot what they aim at",
                action=f"lower --model.learning_rate{_given(run, 'learning_rate')}, or set "
                "--model.warmup_ratio 0.1 or --model.gradient_clip_norm 1.0",
            )
    if len(norms) and not norms.any():
        yield Finding(
            grade="problem",
            what="The gradient was 0 in every step",
            meaning="nothing was trained",
            action="look at which parameters are trained, in the run's summary below",
        )
    clip = run.number("model", "gradient_clip_norm")
    if clip is not None and len(norms) >= WINDOW and (norms > clip).mean() > MOSTLY:
        yield Finding(
            grade="note",
            what=f"{(norms > clip).mean():.0%} of the steps were clipped to a gradient norm of "
            f"{clip:g} (median {np.median(norms):.3g})",
            meaning="under AdamW that changes little, under SGD it sets the step's length alone",
            action="raise --model.gradient_clip_norm if it should only cut off outliers",
        )
    if len(rates) and not rates.any():
        yield Finding(
            grade="problem",
            what="The learning rate was 0 in every step",
            meaning="nothing was trained",
            action="raise --model.learning_rate, or lower --model.warmup_ratio",
        )


def _given(run: Run, key: str) -> str:
    value = run.number("model", key)
    return "" if value is None else f" (was {value:g})"


def _window(count: int) -> int:
    return max(1, min(MARGIN_WINDOW, count // 8))


Values = Float[np.ndarray, " _"]


def _ends(values: Values) -> tuple[Values, Values]:
    """The first and the last values whose means are compared."""
    window = _window(len(values))
    return values[:window], values[-window:]


def _error(*groups: Values) -> float:
    """The standard error of a mean, or of the difference of two; infinite of single values."""
    if any(len(group) < 2 for group in groups):
        return float("inf")
    return float(np.sqrt(sum(group.var(ddof=1) / len(group) for group in groups)))


def _best_window(margins: Values) -> Values | None:
    """The `MARGIN_WINDOW` margins in a row with the highest mean; None if there are too few."""
    if len(margins) < MARGIN_WINDOW:
        return None
    sums = np.concatenate([[0.0], np.cumsum(margins)])
    start = int(np.argmax(sums[MARGIN_WINDOW:] - sums[:-MARGIN_WINDOW]))
    return margins[start : start + MARGIN_WINDOW]
