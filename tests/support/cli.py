"""Runs of the command line, in this process or another, and readers of their output."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from kto_lightning.__main__ import main
from kto_lightning.training.checkpoint_files import AtomicCheckpointIO
from kto_lightning.training.checkpoints import list_checkpoints
from kto_lightning.training.metrics import MEASURED
from tests.support.factories import make_tokenizer, plain_records, save_model, write_jsonl

ROOT = Path(__file__).resolve().parents[2]

EVERY_STEP = ("--checkpoint.every_n_steps", 1)
TWO_EPOCHS = ("--trainer.max_epochs", 2)
LAST = ("--ckpt_path", "last")


def run_cli(*arguments: Any) -> int:
    """`python -m kto_lightning` with these arguments; its exit status."""
    return main([str(argument) for argument in arguments])


def fit(policy: Path, train: Any, output: Path, *options: Any, status: int = 0) -> Path:
    """Train with batches of four and a large learning rate; returns the output directory."""
    assert run_cli("fit", *fit_arguments(policy, train, output, *options)) == status
    return output


def fit_arguments(policy: Path, train: Any, output: Path, *options: Any) -> list[Any]:
    """Arguments of the command `fit`."""
    settings = ["--model.policy", policy, "--data.train", train, "--output_dir", output]
    settings += ["--data.batch_size", 4, "--model.learning_rate", 1e-3]
    return [*settings, "--trainer.accelerator", "cpu", *options]


def run_process(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m kto_lightning` with these arguments in a process of its own."""
    command = [sys.executable, "-m", "kto_lightning", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, **options
    )


def small_model(directory: Path, architecture: str = "qwen2", **overrides: Any) -> Path:
    """A model directory with its tokenizer."""
    return save_model(directory, architecture, make_tokenizer(), **overrides)


def small_data(path: Path, num_records: int = 24, seed: int = 0) -> Path:
    """Records of plain text as jsonl."""
    return write_jsonl(path, plain_records(num_records, seed))


def rows(output: Path) -> list[dict[str, str]]:
    """Rows of `metrics.csv` as text, without the measured columns, which differ from run to run."""
    measured = {f"train/{name}" for name in MEASURED}
    with (output / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k not in measured} for row in csv.DictReader(file)]


def numbers(output: Path, stage: str = "train") -> list[dict[str, float]]:
    """Metrics of a stage, row by row; an empty cell is NaN."""
    return [
        {k: float(v) if v else math.nan for k, v in row.items() if k.startswith(f"{stage}/")}
        for row in rows(output)
    ]


def weights(output: Path) -> dict[str, Tensor]:
    """Weights of the exported model."""
    return load_file(output / "model" / "model.safetensors")


def checkpoint_tensors(output: Path) -> dict[int, dict[str, Tensor]]:
    """Weights and optimizer state of every checkpoint, by step."""
    found = {}
    for step, path in list_checkpoints(output):
        checkpoint = AtomicCheckpointIO().load_checkpoint(path)
        found[step] = checkpoint["state_dict"] | {
            f"{index}.{name}": torch.as_tensor(value)
            for index, state in checkpoint["optimizer_states"][0]["state"].items()
            for name, value in state.items()
        }
    return found
