"""What `python -m kto_lightning fit` computes, step by step: our side of the parity tests.

Run through the command line and read from what it writes (`metrics.csv`, `model/`, `adapter/`), as
a user would; in this process, because importing everything takes longer than twenty steps.
"""

import csv
import math
from pathlib import Path

import torch
from peft.utils import load_peft_weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from kto_lightning.cli import main
from tests.parity.cases import Case, Inputs
from tests.parity.trl_trace import Trace


def our_trace(case: Case, inputs: Inputs, output_dir: Path, *options: str) -> Trace:
    """Train with the command line and return every step's numbers.

    Args:
        options: further arguments, e.g. `--data.max_tokens 160`, each its own string.
    """
    schedule, warmup_ratio = case.schedule
    settings = {
        "--model.policy": inputs.adapter_dir or inputs.model_dir,
        "--model.loss": case.loss,
        "--model.beta": case.beta,
        "--model.desirable_weight": case.weights[0],
        "--model.undesirable_weight": case.weights[1],
        "--model.learning_rate": case.learning_rate,
        "--model.optimizer": case.optimizer,
        "--model.lr_schedule": schedule,
        "--model.warmup_ratio": warmup_ratio,
        "--model.weight_decay": case.weight_decay,
        "--data.train": inputs.train,
        "--data.batch_size": case.batch_size,
        "--data.max_length": case.max_length,
        "--data.shuffle": "false",
        "--data.pairing": "rotate",
        "--trainer.max_steps": case.steps,
        "--trainer.accelerator": "cpu",
        "--output_dir": output_dir,
    }
    if case.gradient_clip_norm is not None:
        settings["--model.gradient_clip_norm"] = case.gradient_clip_norm
    arguments = [str(part) for setting in settings.items() for part in setting]
    status = main(["fit", *arguments, *options])
    assert status == 0, f"fit ended with exit status {status}"
    return Trace(
        columns=_columns(output_dir / "metrics.csv", case.steps),
        weights=_weights(output_dir, has_adapter=inputs.adapter_dir is not None),
    )


def _columns(metrics_csv: Path, num_steps: int) -> dict[str, list[float]]:
    """The `train/` columns; an empty cell is NaN."""
    with metrics_csv.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    assert steps == list(range(1, num_steps + 1)), f"metrics.csv has rows for the steps {steps}"
    names = [name for name in rows[0] if name.startswith("train/")]
    return {name: [float(row[name]) if row[name] else math.nan for row in rows] for name in names}


def _weights(output_dir: Path, *, has_adapter: bool) -> dict[str, Tensor]:
    if has_adapter:
        return load_peft_weights(str(output_dir / "adapter"), device="cpu")
    model = AutoModelForCausalLM.from_pretrained(output_dir / "model", dtype=torch.float32)
    return model.state_dict()
