"""Time from the command to the first training step: ours with empty caches, ours again, and TRL.

    python benchmarks/startup.py --data gsm8k_solutions.jsonl --json benchmarks/results/startup.json

Each run is a new process with a tiny model, so that everything else is timed: imports, reading,
tokenizing, pairing, reports. Ours is `fit` with default settings, TRL's a script that reads the
same file with `load_dataset` and trains. The runs alternate. The best round of each is shown, as
other load can only make a run slower. CPU time is that of all processes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

OURS, AGAIN, TRL = "ours", "ours, again", "TRL"


class Clock:
    """Elapsed and CPU time of a run since its process was started."""

    def __init__(self, result: Path, started: float) -> None:
        self._result, self._started = result, started
        self._readings: dict[str, float] = {}

    def read(self, name: str) -> None:
        used = os.times()
        self._readings |= {
            f"{name}_s": time.time() - self._started,
            f"{name}_cpu_s": used.user + used.system + used.children_user + used.children_system,
        }

    def first_step(self, *_: Any, **__: Any) -> NoReturn:
        """Replaces a trainer's step: writes the readings and ends the process."""
        self.read("step")
        self._result.write_text(json.dumps(self._readings))
        os._exit(0)


def start_ours(options: argparse.Namespace, clock: Clock) -> None:
    from kto_lightning.cli.trainer import main
    from kto_lightning.module import KTOModule

    clock.read("imports")
    arguments = ["--model.policy", options.model, "--data.train", options.train]
    arguments += ["--output_dir", options.output, "--trainer.accelerator", "cpu"]
    with patch.object(KTOModule, "training_step", clock.first_step):
        raise SystemExit(main(["fit", *arguments]))


def start_trl(options: argparse.Namespace, clock: Clock) -> None:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    clock.read("imports")
    with patch.object(KTOTrainer, "training_step", clock.first_step):
        KTOTrainer(
            model=AutoModelForCausalLM.from_pretrained(options.model),
            args=KTOConfig(options.output, use_cpu=True, bf16=False, report_to="none"),
            train_dataset=load_dataset("json", data_files=options.train, split="train"),
            processing_class=AutoTokenizer.from_pretrained(options.model),
        ).train()


def run_once(name: str, inputs: Any, directory: Path) -> dict[str, float]:
    """Start a process and return its readings at the first step."""
    caches = directory / ("caches_trl" if name == TRL else "caches_ours")
    if name != AGAIN:
        shutil.rmtree(caches, ignore_errors=True)
    result = directory / "clock.json"
    result.unlink(missing_ok=True)
    arguments = ["--model", inputs.model, "--train", inputs.train, "--result", result]
    arguments += ["--output", directory / "output", "--started", time.time()]
    command = [sys.executable, __file__, "--start", name, *map(str, arguments)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(caches)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if not result.exists():
        raise SystemExit(
            f"startup: {name} did not reach its first step:\n{done.stdout}{done.stderr}"
        )
    return json.loads(result.read_text())


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per contestant: the readings of its best round, and of all rounds."""
    from inputs import Shape, made_records, read_jsonl, save_model, write_jsonl
    from step_runs import Inputs

    records = (
        read_jsonl(options.data)
        if options.data
        else made_records(options.records, words=options.words, prompt_share=0.5)
    )
    shape = Shape(hidden_size=64, intermediate_size=128, num_layers=2)
    samples: dict[str, list[dict[str, float]]] = {OURS: [], AGAIN: [], TRL: []}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        train = write_jsonl(directory / "train.jsonl", records)
        inputs = Inputs(model=save_model(directory / "model", records, shape), train=train)
        for _ in range(options.rounds):
            for contestant, found in samples.items():
                found.append(run_once(contestant, inputs, directory))
    rows = []
    for contestant, found in samples.items():
        best = min(found, key=lambda reading: reading["step_s"])
        rows.append({"contestant": contestant, "records": len(records), **best, "rounds": found})
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    from common import print_table

    print()
    print_table(
        [
            {
                "": row["contestant"],
                "imports s": f"{row['imports_s']:.1f}",
                "to the first step s": f"{row['step_s']:.1f}",
                "after imports s": f"{row['step_s'] - row['imports_s']:.1f}",
                "CPU s": f"{row['step_cpu_s']:.1f}",
                "CPU s after imports": f"{row['step_cpu_s'] - row['imports_cpu_s']:.1f}",
            }
            for row in rows
        ]
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="a file of records, jsonl; none: generated ones")
    add("--records", type=int, default=5000, help="number of generated records")
    add("--words", type=int, default=120, help="of a generated record, on average")
    add("--rounds", type=int, default=1)
    add("--json", type=Path, help="result file")
    for name in ("start", "model", "train", "result", "output"):
        add(f"--{name}", help=argparse.SUPPRESS)  # for the processes that are started
    add("--started", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.start:
        start = start_trl if options.start == TRL else start_ours
        start(options, Clock(Path(options.result), options.started))
    # Imported here, so that the timed processes import only what they need.
    import torch
    from common import describe, print_header, write_result

    header = describe(torch.device("cpu")) | {"data": options.data.name if options.data else "made"}
    print_header(header)
    rows = measure(options)
    print_rows(rows)
    if options.json:
        write_result(options.json, header, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
