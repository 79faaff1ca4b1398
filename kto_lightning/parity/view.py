"""How a comparison is shown: a table of 80 columns, what was set and why, the verdict; or JSON."""

import math
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kto_lightning.parity.agreement import WEIGHTS, Comparison
from kto_lightning.parity.run import Report

_SHOWN = {
    "train/tokens": "tokens",
    "train/loss": "loss",
    "train/z0": "z0, TRL's kl",
    "train/z0_raw": "z0 before clamp",
    "train/logps/desirable": "log-probs, good",
    "train/logps/undesirable": "log-probs, bad",
    "train/reward/desirable": "rewards, good",
    "train/reward/undesirable": "rewards, bad",
    "train/reward/margin": "margin",
    "train/grad_norm": "gradient norm",
    "train/lr": "learning rate",
}
_SET_ALIKE = (
    "Set on both sides: the file's order, TRL's pairs of completions (--data.shuffle false, "
    "--data.pairing rotate), one batch a step without accumulation, one process on the CPU, "
    "float32, no dropout."
)
_EXPECTED = (
    "`fit` as it comes differs from TRL on purpose: it shuffles; a mismatched completion answers "
    "another prompt and stays the same from epoch to epoch; z0 is one number per optimizer step "
    "over all micro-batches and devices; auto weights balance the classes.",
    "KTOConfig as it comes computes in bfloat16 with activation checkpointing and clips gradients "
    "at norm 1.0; here it does what the options say.",
    "z0 and rewards are small differences of large log-probs: rounding leaves 4·eps·|log-prob|.",
)
_ADAM = (
    "AdamW divides a gradient by its own size, so that the rounding of one that is almost 0 "
    "becomes a whole step: compare weights with --optimizer sgd."
)
_STILL = (
    "The weights moved too little to compare them: less than 0.001. Give more steps or a higher "
    "--learning_rate."
)


def show_report(console: Console, report: Report) -> None:
    """Print the comparison."""
    settings = report.settings
    console.print(
        f"{settings.steps} steps of {settings.batch_size} on {report.num_records} records, weights "
        f"{settings.desirable_weight:g} : {settings.undesirable_weight:g}. "
        "Each row is of the step where both are furthest apart for what is allowed there."
    )
    console.print()
    console.print(_table(report))
    console.print()
    notes = Table.grid(padding=(0, 1, 0, 0))
    for note in (*report.notes, _SET_ALIKE, *_EXPECTED, *_weight_notes(report)):
        notes.add_row("-", escape(note))
    console.print(notes)
    console.print()
    odd = [_name(c) for c in report.comparisons if not c.agrees]
    odd += ["weights"] if report.weights_count and not report.weights.agrees else []
    if report.agrees:
        console.print("They agree.", style="bold green")
    else:
        console.print(f"They differ in {', '.join(odd)}.", style="bold red")


def _table(report: Report) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    for name in ("step", "TRL", "ours", "apart", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for comparison in report.comparisons:
        table.add_row(
            _name(comparison),
            str(comparison.step),
            _value(comparison.theirs),
            _value(comparison.ours),
            _size(comparison.difference),
            _size(comparison.allowed),
            _verdict(comparison.agrees),
        )
    weights = report.weights
    counted = report.weights_count
    table.add_row(
        "weights",
        str(report.settings.steps),
        f"moved {_size(weights.largest)}",
        "",
        _size(weights.difference),
        _size(WEIGHTS * weights.largest) if counted else "",
        _verdict(weights.agrees) if counted else "not judged",
    )
    return table


def as_dict(report: Report) -> dict[str, Any]:
    """Everything of the table, in plain values; what is not finite is null."""
    return {
        "agrees": report.agrees,
        "steps": report.settings.steps,
        "batch_size": report.settings.batch_size,
        "records": report.num_records,
        "desirable_weight": report.settings.desirable_weight,
        "undesirable_weight": report.settings.undesirable_weight,
        "columns": {
            comparison.name: {
                "step": comparison.step,
                "trl": _finite(comparison.theirs),
                "ours": _finite(comparison.ours),
                "difference": _finite(comparison.difference),
                "allowed": _finite(comparison.allowed),
                "agrees": comparison.agrees,
            }
            for comparison in report.comparisons
        },
        "weights": {
            "movement": _finite(report.weights.largest),
            "difference": _finite(report.weights.difference),
            "agrees": report.weights.agrees if report.weights_count else None,
        },
        "notes": [*_weight_notes(report), *report.notes],
    }


def _weight_notes(report: Report) -> list[str]:
    if report.weights_count:
        return []
    return [_STILL if report.settings.optimizer == "sgd" else _ADAM]


def _name(comparison: Comparison) -> str:
    return _SHOWN[comparison.name]


def _verdict(agrees: bool) -> str:
    return "agree" if agrees else "DIFFER"


def _value(value: float) -> str:
    return "absent" if math.isnan(value) else f"{value:.7g}"


def _size(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
