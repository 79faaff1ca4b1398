"""The trace of `python -m kto_lightning fit`, our side of the comparison.

Runs the command line and reads its files (`metrics.csv`, `model/`, `adapter/`), as a user would; in
this process, because imports take longer than twenty steps.
"""

import csv
import math
from pathlib import Path

from peft.utils import load_peft_weights
from torch import Tensor

from kto_lightning.cli.trainer import main
from kto_lightning.errors import ConfigError, KTOError
from kto_lightning.parity.trace import Inputs, Settings, Trace, load_model


def our_trace(inputs: Inputs, settings: Settings, output_dir: Path, *options: str) -> Trace:
    """Train with the command line on the CPU in float32 and return every step's numbers.

    Args:
        options: further arguments of `fit`, e.g. `--data.max_tokens 160`, each its own string.

    Raises:
        KTOError: if `fit` fails, which has printed its error on stderr.
        ConfigError: if `fit` rejects a setting.
    """
    status = main(["fit", *_arguments(inputs, settings, output_dir), *options])
    if status != 0:
        kind = ConfigError if status == 2 else KTOError
        raise kind(f"fit ended with exit status {status}; its error is printed above.")
    return Trace(
        columns=_columns(output_dir / "metrics.csv", settings.steps),
        weights=_weights(output_dir, has_adapter=inputs.adapter is not None),
    )


def _arguments(inputs: Inputs, settings: Settings, output_dir: Path) -> list[str]:
    given = {
        "--model.policy": inputs.adapter or inputs.model,
        "--model.reference": inputs.reference,
        "--model.loss": settings.loss,
        "--model.beta": settings.beta,
        "--model.desirable_weight": settings.desirable_weight,
        "--model.undesirable_weight": settings.undesirable_weight,
        "--model.learning_rate": settings.learning_rate,
        "--model.optimizer": settings.optimizer,
        "--model.lr_schedule": settings.lr_schedule,
        "--model.warmup_ratio": settings.warmup_ratio,
        "--model.weight_decay": settings.weight_decay,
        "--model.gradient_clip_norm": settings.gradient_clip_norm,
        "--data.train": inputs.train,
        "--data.batch_size": settings.batch_size,
        "--data.max_length": settings.max_length,
        "--data.chat_template": inputs.chat_template,
        "--data.shuffle": "false",
        "--data.pairing": "rotate",
        "--trainer.max_steps": settings.steps,
        "--trainer.accelerator": "cpu",
        "--trainer.precision": "32-true",
        "--output_dir": output_dir,
    }
    words = {key: "null" if value is None else str(value) for key, value in given.items()}
    return [part for setting in words.items() for part in setting]


def _columns(metrics_csv: Path, num_steps: int) -> dict[str, list[float]]:
    """The `train/` columns; an empty cell is NaN."""
    with metrics_csv.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    if steps != list(range(1, num_steps + 1)):
        raise KTOError(f"{metrics_csv} has rows for the steps {steps}, not for 1 to {num_steps}.")
    names = [name for name in rows[0] if name.startswith("train/")]
    return {name: [float(row[name]) if row[name] else math.nan for row in rows] for name in names}


def _weights(output_dir: Path, *, has_adapter: bool) -> dict[str, Tensor]:
    if has_adapter:
        return load_peft_weights(str(output_dir / "adapter"), device="cpu")
    return load_model(str(output_dir / "model")).state_dict()
