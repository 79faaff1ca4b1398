"""Does KTO make a real language model better? Ours, TRL's and supervised fine-tuning, side by side.

    python benchmarks/real_model.py --output real --small          # a size for two CPU cores
    python benchmarks/real_model.py --output real                  # full size, on a GPU
    python benchmarks/real_model.py --output real --small --vary beta=0.05,0.5 balance=no

SmolLM2-135M-Instruct (`make real`; or `--model DIR`) answers instructions that a program can check;
the verdicts on its own sampled answers are the thumbs, in the proportion in which they fall. Each
seed has instructions and samples of its own, and each method trains on the same records in a
process of its own (`real_runs.py`). Then every model answers held-out instructions, about topics
that no record has, and some of kinds that no record has, with its most probable answer.

- *trained kinds*, *held-out kinds*: share of instructions followed. Differences are paired by seed
  and instruction; their 95% intervals are a bootstrap over both (10,000 resamplings of seeds and of
  instructions).
- *text*: mean log-probability per token of a text that no run trains on, in nats, relative to the
  model before training: what was forgotten.
- *seconds*, *MiB*: of the whole training run, with loading, tokenizing and saving; medians over
  seeds. Peak resident memory of the process, or peak allocated memory of the GPU.

`--vary` trains by ours alone, each time with one setting other than the defaults, next to the
defaults. Finished runs are kept in `--output` and not repeated; `--minutes` stops before a run that
would begin too late (exit status 3), and the same command goes on from there.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import describe, print_header, print_table, write_result
from real_runs import OURS, SFT, START, TRL, Run, Training
from silence import quiet
from smollm2 import ModelMissing, save_smollm2

from kto_lightning.cli.waiting import wait_passively
from kto_lightning.demo.evaluate import Sampling, answer
from kto_lightning.demo.instructions import HELD_OUT_KINDS, TRAINED_KINDS, draw_instructions
from kto_lightning.demo.own_model import HeldOut, open_model
from kto_lightning.errors import KTOError
from kto_lightning.files import write_whole

HERE = Path(__file__).parent
NUM_RESAMPLINGS = 10_000
UNFINISHED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much is trained and measured."""

    num_records: int
    num_held_out: int
    num_held_out_kinds: int
    max_new_tokens: int
    text_windows: int
    training: Training


SMALL = Size(
    num_records=128,
    num_held_out=80,
    num_held_out_kinds=39,
    max_new_tokens=32,
    text_windows=2,
    training=Training(batch_size=8),
)
FULL = Size(
    num_records=2048,
    num_held_out=400,
    num_held_out_kinds=150,
    max_new_tokens=64,
    text_windows=16,
    training=Training(batch_size=32, epochs=2),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One row of the table."""

    name: str
    method: str
    training: Training


class Experiment:
    """All runs of one folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.size: Size = SMALL if options.small else FULL
        self.seeds: list[int] = list(range(options.seeds))
        self.output: Path = options.output
        self.model: Path = options.model or self.output / "start"
        self.threads: int = options.threads
        self.on_gpu = torch.cuda.is_available()
        self.stop_at = (
            time.monotonic() + 60 * options.minutes if options.minutes is not None else None
        )

    def prepare(self) -> None:
        """The model, and the records of every seed.

        Raises:
            ModelMissing: if no `--model` is given and SmolLM2 is not installed.
            KTOError: if a model cannot be opened, or a file not be written.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        if self.model == self.output / "start":
            save_smollm2(self.model)
        missing = [seed for seed in self.seeds if not self.records(seed).exists()]
        if not missing:
            return
        device = torch.device("cuda" if self.on_gpu else "cpu")
        model, tokenizer = open_model(str(self.model), device)
        sampling = Sampling(
            max_new_tokens=self.size.max_new_tokens, temperature=0.7, top_p=0.95, batch_size=64
        )
        held_out = HeldOut.draw(0, self.size.num_held_out, self.size.num_held_out_kinds).prompts
        for seed in missing:
            rng = random.Random(seed + 1)
            instructions = draw_instructions(rng, self.size.num_records, exclude=held_out)
            answers = answer(model, tokenizer, instructions, sampling, seed)
            # Kinds come in turn; a batch should not hold the same ones in every seed.
            random.Random(seed).shuffle(answers)
            lines = [json.dumps(each.as_record(is_chat=True)) + "\n" for each in answers]
            write_whole(self.records(seed), "".join(lines), what="the records")

    def records(self, seed: int) -> Path:
        return self.output / f"feedback_{seed}.jsonl"

    def num_good(self, seed: int) -> int:
        return sum(json.loads(line)["label"] for line in self.records(seed).open())

    def run(self, variant: Variant, seed: int) -> dict[str, Any] | None:
        """The result of one process, from its file if it has run; None if time is up.

        Raises:
            SystemExit: if the process fails, or the folder has a result of other settings.
        """
        directory = self.output / "runs" / f"{variant.name.replace(' ', '_')}_{seed}"
        result, size = directory / "result.json", self.size
        wanted = Run(
            method=variant.method,
            seed=seed,
            training=variant.training,
            start=str(self.model),
            records=str(self.records(seed)),
            output=str(directory / "trained"),
            threads=self.threads,
            num_held_out=size.num_held_out,
            num_held_out_kinds=size.num_held_out_kinds,
            max_new_tokens=size.max_new_tokens,
            text_windows=size.text_windows,
            on_gpu=self.on_gpu,
        )
        if result.exists():
            found = Run.read(directory / "run.json")
            if found != wanted:
                raise SystemExit(
                    f"{directory} has other settings; choose another --output: {found}"
                )
            return json.loads(result.read_text())
        if self.stop_at is not None and time.monotonic() > self.stop_at:
            return None
        (directory / "trained").mkdir(parents=True, exist_ok=True)
        wanted.write(directory / "run.json")
        log = directory / "log.txt"
        command = [sys.executable, str(HERE / "real_runs.py"), str(directory / "run.json")]
        with log.open("w") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        if code != 0:
            raise SystemExit(f"{variant.name}, seed {seed}: exit status {code}, see {log}")
        shutil.rmtree(directory / "trained")  # half a gigabyte each
        return json.loads(result.read_text())


def bootstrap(differences: np.ndarray) -> tuple[float, float, float]:
    """The mean of differences, `[seed, instruction]`, and its 95% interval, from resampled seeds
    and, independently, resampled instructions."""
    rng = np.random.default_rng(0)
    num_seeds, num_instructions = differences.shape
    means = np.empty(NUM_RESAMPLINGS)
    for index in range(NUM_RESAMPLINGS):
        rows = rng.integers(num_seeds, size=num_seeds)
        columns = rng.integers(num_instructions, size=num_instructions)
        means[index] = differences[rows][:, columns].mean()
    low, high = np.quantile(means, (0.025, 0.975))
    return float(differences.mean()), float(low), float(high)


def points(differences: np.ndarray) -> str:
    """Percentage points with their interval."""
    mean, low, high = (100 * value for value in bootstrap(differences))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def compare(start: dict[str, Any], runs: dict[str, list[dict[str, Any]]], size: Size) -> list[dict]:
    """A row for the model before training, and one for each variant."""
    parts = {
        "trained kinds": slice(0, size.num_held_out),
        "held-out kinds": slice(size.num_held_out, None),
    }
    before = np.array(start["good"], dtype=float)
    rows = [
        {"": "before"}
        | {name: f"{before[part].mean():.1%}" for name, part in parts.items()}
        | {f"change, {name}": "" for name in parts}
        | {"text": "", "seconds": "", "MiB": ""}
    ]
    for name, results in runs.items():
        good = np.array([result["good"] for result in results], dtype=float)
        text = [result["text_logp"] - start["text_logp"] for result in results]
        rows.append(
            {"": name}
            | {part_name: f"{good[:, part].mean():.1%}" for part_name, part in parts.items()}
            | {f"change, {n}": points(good[:, p] - before[p]) for n, p in parts.items()}
            | {
                "text": f"{statistics.mean(text):+.3f} [{min(text):+.3f}, {max(text):+.3f}]",
                "seconds": f"{statistics.median(r['seconds'] for r in results):.0f}",
                "MiB": f"{statistics.median(r['peak_mib'] for r in results):.0f}",
            }
        )
    return rows


def print_differences(runs: dict[str, list[dict[str, Any]]], size: Size) -> None:
    """The first variant against each of the others, paired by seed and instruction."""
    (first, results), *others = runs.items()
    good = np.array([result["good"] for result in results], dtype=float)
    for name, other in others:
        differences = good - np.array([result["good"] for result in other], dtype=float)
        same = np.mean([a["answers"] == b["answers"] for a, b in zip(results, other, strict=True)])
        faster = [b["seconds"] / a["seconds"] for a, b in zip(results, other, strict=True)]
        print(
            f"{first} minus {name}, in points: trained kinds "
            f"{points(differences[:, : size.num_held_out])}, held-out kinds "
            f"{points(differences[:, size.num_held_out :])}; {name} takes "
            f"{statistics.median(faster):.2f} times as long; answers of all instructions equal in "
            f"{same:.0%} of seeds"
        )


def print_kinds(start: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> None:
    """Share followed, by kind."""
    kinds = [each["kind"] for each in start["answers"]]
    rows = []
    for kind in (*TRAINED_KINDS, *HELD_OUT_KINDS):
        of_kind = np.array([each == kind for each in kinds])
        row = {"kind": kind, "before": f"{np.array(start['good'])[of_kind].mean():.0%}"}
        for name, results in runs.items():
            good = np.array([result["good"] for result in results])
            row[name] = f"{good[:, of_kind].mean():.0%}"
        rows.append(row)
    print_table(rows)


def parse_value(name: str, text: str) -> Any:
    """A value of a field of `Training`."""
    kind = type(getattr(Training(), name))
    if kind is bool:
        return {"yes": True, "no": False}[text]
    return kind(text)


def variants_of(options: argparse.Namespace, size: Size) -> list[Variant]:
    """The rows: methods, or ours with one setting changed.

    Raises:
        SystemExit: for an unknown setting or value.
    """
    training = size.training
    if not options.vary:
        return [Variant(name=name, method=name, training=training) for name in options.methods]
    variants = [Variant(name=OURS, method=OURS, training=training)]
    names = [field.name for field in fields(Training)]
    for each in options.vary:
        name, _, values = each.partition("=")
        if name not in names or not values:
            raise SystemExit(f"--vary {each}: expected NAME=VALUE,… with NAME one of {names}")
        for text in values.split(","):
            try:
                value = parse_value(name, text)
            except (KeyError, ValueError):
                raise SystemExit(f"--vary {each}: {text!r} is no value of {name}") from None
            variants.append(
                Variant(
                    name=f"{name} {text}", method=OURS, training=replace(training, **{name: value})
                )
            )
    return variants


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for models, records and results")
    add("--model", type=Path, help="an instruction-tuned model; default: SmolLM2-135M-Instruct")
    add("--small", action="store_true", help="a size for two CPU cores")
    add("--seeds", type=int, default=5)
    add("--methods", nargs="+", choices=(OURS, TRL, SFT), default=(OURS, TRL, SFT))
    add("--vary", nargs="+", metavar="NAME=VALUE,…", help="ours alone, one setting at a time")
    add("--minutes", type=float, help="begin no run after so many minutes")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--json", type=Path, help="result file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.seeds < 1:
        raise SystemExit(f"--seeds {options.seeds}: expected 1 or more")
    experiment = Experiment(options)
    variants = variants_of(options, experiment.size)
    wait_passively()  # in all runs, which inherit it
    torch.set_num_threads(options.threads)
    with quiet():
        try:
            experiment.prepare()
        except (ModelMissing, KTOError) as error:
            print(f"real_model: {error}", file=sys.stderr)
            return 1
    device = torch.device("cuda" if experiment.on_gpu else "cpu")
    header = describe(device) | {"size": json.dumps(asdict(experiment.size))}
    print_header(header)
    counts = [experiment.num_good(seed) for seed in experiment.seeds]
    print(f"good of {experiment.size.num_records} answers, by seed: {counts}")
    start = experiment.run(Variant(name=START, method=START, training=Training()), 0)
    runs: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
    for seed in experiment.seeds:  # methods in turn: other load affects all of them
        for variant in variants:
            result = experiment.run(variant, seed)
            if result is None or start is None:
                print(f"time is up before {variant.name}, seed {seed}; run the same command again")
                return UNFINISHED
            runs[variant.name].append(result)
            shown = f"{sum(result['good'])} of {len(result['good'])} followed"
            print(f"{variant.name}, seed {seed}: {shown}, {result['seconds']:.0f} s", flush=True)
    assert start is not None
    report(start, runs, experiment.size)
    if options.json:
        write_result(options.json, header, [{"start": start, "runs": runs}])
    return 0


def report(start: dict[str, Any], runs: dict[str, list[dict[str, Any]]], size: Size) -> None:
    """Print all tables."""
    print()
    print_table(compare(start, runs, size))
    print()
    print_kinds(start, runs)
    print()
    print_differences(runs, size)


if __name__ == "__main__":
    sys.exit(main())
