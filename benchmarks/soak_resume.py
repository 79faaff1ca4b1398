"""Kill a run again and again at random moments, and compare it with an uninterrupted one.

    python benchmarks/soak_resume.py --kills 20 --signal KILL --steps 200

Most parts are killed shortly after their first new checkpoint, some before it. The last part must
leave the weights and metrics.csv of the uninterrupted run, bit for bit.
"""

import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import describe, print_header
from inputs import Shape, made_records, save_model, write_jsonl
from safetensors.torch import load_file

from kto_lightning.training.checkpoints import list_checkpoints, results_of
from kto_lightning.training.metrics import MEASURED

ROOT = Path(__file__).resolve().parents[1]
SHAPE = Shape(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, vocabulary=512)
BATCH_SIZE = 4
POLL_SECONDS = 0.02
EARLY_KILL_PROBABILITY = 0.0003
"""Per poll before the first new checkpoint; about one part in seven is killed so early."""


@dataclass(slots=True)
class Soak:
    """A run in many parts, and how each of them ended."""

    command: list[str]
    output: Path
    statuses: list[int] = field(default_factory=list)
    steps_saved: list[int] = field(default_factory=list)
    num_fallbacks: int = 0
    num_started_over: int = 0

    def start(self) -> subprocess.Popen[str]:
        """Resume from the last checkpoint; without one, start over."""
        resume = ["--ckpt_path", "last"] if list_checkpoints(self.output) else []
        if not resume and results_of(self.output):
            self.num_started_over += 1
            shutil.rmtree(self.output)
        command = [*self.command, "--output_dir", str(self.output), *resume]
        return start(command)

    def end(self, process: subprocess.Popen[str]) -> None:
        """Wait for a process and record how it ended."""
        _, errors = process.communicate()
        self.num_fallbacks += errors.count("is damaged; looking for the one before it")
        self.statuses.append(process.returncode)
        self.steps_saved.append(_last_step(self.output))
        if process.returncode == 1 or "Traceback" in errors:
            raise SystemExit(f"a part of the run failed:\n{errors}")


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def soak(run: Soak, *, kills: int, signum: int, longest_wait: float, seed: int) -> None:
    """Kill `kills` parts of the run at random moments, and let the last part finish."""
    moments = random.Random(seed)
    for _ in range(kills):
        before = _last_step(run.output)
        process = run.start()
        while process.poll() is None and _last_step(run.output) == before:
            if moments.random() < EARLY_KILL_PROBABILITY:
                break
            time.sleep(POLL_SECONDS)
        time.sleep(moments.uniform(0.0, longest_wait))
        process.send_signal(signum)
        run.end(process)
        if process.returncode == 0:
            print(f"the run finished after {len(run.statuses)} parts. Raise --steps.")
            return
    process = run.start()
    run.end(process)


def _last_step(output: Path) -> int:
    return max((step for step, _ in list_checkpoints(output)), default=0)


def differences(one: Path, other: Path) -> list[str]:
    """The differences between two outputs: names of weights, numbers of rows."""
    left, right = (load_file(path / "model" / "model.safetensors") for path in (one, other))
    wrong = [name for name in left if not torch.equal(left[name], right[name])]
    tables = [_rows(path / "metrics.csv") for path in (one, other)]
    if [row["step"] for row in tables[0]] != [row["step"] for row in tables[1]]:
        wrong.append("the steps of metrics.csv")
    pairs = zip(*tables, strict=False)
    return wrong + [f"row {a['step']} of metrics.csv" for a, b in pairs if a != b]


def _rows(path: Path) -> list[dict[str, str]]:
    measured = {f"train/{name}" for name in MEASURED}
    with path.open(newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k not in measured} for row in csv.DictReader(file)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200, help="steps of the whole run")
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument(
        "--longest_wait", type=float, default=2.0, help="seconds from a new checkpoint to the kill"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", help="further options of fit, after --")
    given = parser.parse_args()
    print_header(describe(torch.device("cpu")))
    with tempfile.TemporaryDirectory(prefix="soak_resume_") as name:
        directory = Path(name)
        records = made_records(48, words=12, prompt_share=0.5)
        model = save_model(directory / "model", records, SHAPE)
        data = write_jsonl(directory / "train.jsonl", records)
        command = [sys.executable, "-m", "kto_lightning", "fit", "--model.policy", str(model)]
        command += ["--data.train", str(data), "--data.batch_size", str(BATCH_SIZE)]
        command += ["--model.learning_rate", "1e-3", "--model.lr_schedule", "cosine"]
        command += ["--trainer.accelerator", "cpu", "--trainer.max_steps", str(given.steps)]
        command += ["--checkpoint.every_n_steps", "1", *given.options]
        whole = Soak(command, directory / "whole")
        whole.end(whole.start())
        run = Soak(command, directory / "killed")
        began = time.monotonic()
        signum = getattr(signal, f"SIG{given.signal}")
        wait = given.longest_wait
        soak(run, kills=given.kills, signum=signum, longest_wait=wait, seed=given.seed)
        wrong = differences(run.output, whole.output)
        print(f"{len(run.statuses) - 1} parts ended by SIG{given.signal}, statuses {run.statuses}")
        print(f"steps saved after each part: {run.steps_saved}")
        print(f"{run.num_started_over} started over, {run.num_fallbacks} damaged checkpoints")
        print(f"{time.monotonic() - began:.0f} s; differences: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
