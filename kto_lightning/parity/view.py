"""Output of a comparison: an 80-column table with notes and a conclusion, or JSON."""

import math
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kto_lightning.errors import printable
from kto_lightning.parity.agreement import Comparison
from kto_lightning.parity.run import ParityResult

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
_COMMON_SETTINGS = (
    "Set on both sides: file order and TRL's pairing (--data.shuffle false, "
    "--data.pairing rotate), one batch per step without accumulation, one process on the CPU, "
    "float32, no dropout and no router noise."
)
_DIFFERENCES = (
    "By default `fit` differs from TRL on purpose: it shuffles; a mismatched completion answers "
    "another prompt and stays the same in every epoch; z0 is one number per optimizer step over "
    "all micro-batches and devices; auto weights balance the classes.",
    "By default KTOConfig uses bfloat16 and activation checkpointing and clips gradients at norm "
    "1.0; here it follows the options.",
    "z0 and rewards are small differences of large log-probs, with a rounding error of "
    "4·eps·|log-prob|.",
)
_ADAM = (
    "Weights are not compared after AdamW, which divides a gradient by its own size: the rounding "
    "error of one near 0 becomes a full step. Use --optimizer sgd."
)
_SMALL_UPDATE = (
    "Weights are not compared, because they changed by less than 0.001. Use more steps or a higher "
    "--learning_rate."
)


def show_result(console: Console, result: ParityResult) -> None:
    """Print the comparison."""
    settings = result.settings
    console.print(
        f"{settings.steps} steps of {settings.batch_size} on {result.num_records} records, weights "
        f"{settings.desirable_weight:g} : {settings.undesirable_weight:g}. "
        "Each row shows the step with the largest difference relative to its tolerance."
    )
    console.print()
    console.print(_table(result))
    console.print()
    notes = Table.grid(padding=(0, 1, 0, 0))
    for note in (*result.notes, _COMMON_SETTINGS, *_DIFFERENCES, *_weight_notes(result)):
        notes.add_row("-", Text(printable(note)))
    console.print(notes)
    console.print()
    differing = [_name(c) for c in result.comparisons if not c.agrees]
    differing += ["weights"] if result.compares_weights and not result.weights.agrees else []
    if result.agrees:
        console.print("They agree.", style="bold green")
    else:
        console.print(f"They differ in {', '.join(differing)}.", style="bold red")


def _table(result: ParityResult) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    for name in ("step", "TRL", "ours", "difference", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for comparison in result.comparisons:
        table.add_row(
            _name(comparison),
            str(comparison.step),
            _value(comparison.theirs),
            _value(comparison.ours),
            _size(comparison.difference),
            _size(comparison.allowed),
            _agreement(comparison.agrees),
        )
    weights = result.weights
    compared = result.compares_weights
    table.add_row(
        "weights",
        str(result.settings.steps),
        f"moved {_size(weights.largest)}",
        "",
        _size(weights.difference),
        _size(weights.tolerance * weights.largest) if compared else "",
        _agreement(weights.agrees) if compared else "not compared",
    )
    return table


def as_dict(result: ParityResult) -> dict[str, Any]:
    """The table as plain values; values that are not finite are null."""
    return {
        "agrees": result.agrees,
        "steps": result.settings.steps,
        "batch_size": result.settings.batch_size,
        "records": result.num_records,
        "desirable_weight": result.settings.desirable_weight,
        "undesirable_weight": result.settings.undesirable_weight,
        "columns": {
            comparison.name: {
                "step": comparison.step,
                "trl": _finite(comparison.theirs),
                "ours": _finite(comparison.ours),
                "difference": _finite(comparison.difference),
                "allowed": _finite(comparison.allowed),
                "agrees": comparison.agrees,
            }
            for comparison in result.comparisons
        },
        "weights": {
            "movement": _finite(result.weights.largest),
            "difference": _finite(result.weights.difference),
            "agrees": result.weights.agrees if result.compares_weights else None,
        },
        "notes": [*_weight_notes(result), *result.notes],
    }


def _weight_notes(result: ParityResult) -> list[str]:
    if result.compares_weights:
        return []
    return [_SMALL_UPDATE if result.settings.optimizer == "sgd" else _ADAM]


def _name(comparison: Comparison) -> str:
    return _SHOWN[comparison.name]


def _agreement(agrees: bool) -> str:
    return "agree" if agrees else "DIFFER"


def _value(value: float) -> str:
    return "absent" if math.isnan(value) else f"{value:.7g}"


def _size(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
