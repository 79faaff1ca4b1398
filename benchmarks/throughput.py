"""Time, CPU time and memory of whole training steps, ours and TRL's in turn.

    python benchmarks/throughput.py --data feedback.jsonl --json benchmarks/results/throughput.json
    python benchmarks/throughput.py --shape qwen2.5-0.5b                # made records, this device
    python benchmarks/throughput.py --shape qwen2.5-7b --lora
    python benchmarks/throughput.py --shape small --vocabulary 32768 --layers 2

Both train the same randomly initialised model on the same records in the same order, with the same
partners (`pairing: rotate`), batch, length and optimizer: float32 on a CPU, bfloat16 on a GPU (a
frozen base's weights too). Each runs in a process of its own that takes a few steps while the other
waits. A step is measured from the end of the previous one: data, forward, backward, update, and for
ours the row in `metrics.csv`. Steps before the first timed one (`--warmup`) count only for the peak
memory and for the comparison of losses.

- computed: the reference runs in every step;
- cached: ours reads log-probs from its cache, TRL's are precomputed. Neither cost is included.

Memory is the peak above that of the loaded, idle process: resident memory on a CPU, allocated
memory on CUDA. MFU, on a GPU, is the lower bound of a step's operations (`step_floor.py`, the same
for both) over its time, relative to what this device reaches in a large matrix product.

If losses, log-probs or tokens of the two differ, no ratio is given and the exit status is 1.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch
from common import (
    Contestant,
    Times,
    describe,
    print_header,
    print_table,
    time_paired,
    write_result,
)
from contestants import Reference, Step, Task
from inputs import SHAPES, Shape, made_records, read_jsonl, save_model, write_jsonl
from load import busy_processes
from race import ContestantFailed, Measurements, race
from silence import quiet
from step_runs import Inputs

# For rounding, which grows in training. Other partners or another order change log-probs by tens of
# percent.
TOLERANCES = {"cpu": {"loss": 1e-3, "logps": 1e-4}, "cuda": {"loss": 2e-2, "logps": 1e-2}}
OURS, TRL = "ours", "TRL"


def disagreement(ours: Sequence[Step], theirs: Sequence[Step], device: str) -> str | None:
    """The first difference between the two runs, or None."""
    allowed = TOLERANCES[device]
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        if mine.num_tokens != other.num_tokens:
            return f"step {number}: {mine.num_tokens} tokens, TRL's {other.num_tokens}"
        if mine.logps.keys() != other.logps.keys():
            return f"step {number}: classes {sorted(mine.logps)}, TRL's {sorted(other.logps)}"
        pairs = [("loss", mine.loss, other.loss)]
        pairs += [("logps", value, other.logps[name]) for name, value in mine.logps.items()]
        for name, value, expected in pairs:
            if not relative_difference(value, expected) <= allowed[name]:
                return f"step {number}: {name} {value:.6g}, TRL's {expected:.6g}"
    return None


def relative_difference(value: float, other: float) -> float:
    return abs(value - other) / abs(other) if other else abs(value)


def summarize(run: Measurements, warmup: int, batch_size: int, peak_tflops: float | None) -> dict:
    """A row of the result: medians over the timed steps, and all steps."""
    steps = run.timed(warmup)
    times = Times(samples_ms=tuple(step.seconds * 1e3 for step in steps))
    return {
        "examples_per_second": statistics.median(batch_size / step.seconds for step in steps),
        "tokens_per_second": statistics.median(step.num_tokens / step.seconds for step in steps),
        "step_ms": times.median_ms,
        "step_ms_10": times.quantile_ms(0.1),
        "step_ms_90": times.quantile_ms(0.9),
        "cpu_ms": statistics.median(step.cpu_seconds * 1e3 for step in steps),
        "peak_mib": run.steps[-1].peak_mib,
        "idle_mib": run.idle_mib,
        "peak_tflops": peak_tflops,
        "steps": [asdict(step) for step in run.steps],
    }


def compare(runs: dict[str, Measurements], options: argparse.Namespace) -> dict[str, Any]:
    """Both rows and, if the two runs agree, the ratios."""
    peak = device_tflops(options.device) if options.device == "cuda" else None
    rows = {
        name: summarize(run, options.warmup, options.batch_size, peak) for name, run in runs.items()
    }
    ours, theirs = (runs[name].timed(options.warmup) for name in (OURS, TRL))
    if peak is not None:
        # The lower bound is the same for both, whatever they compute in addition.
        for name, steps in ((OURS, ours), (TRL, theirs)):
            shares = [
                (mine.floor_operations or math.nan) / step.seconds / peak / 1e12
                for mine, step in zip(ours, steps, strict=True)
            ]
            rows[name]["mfu"] = statistics.median(shares)
    problem = disagreement(runs[OURS].steps, runs[TRL].steps, options.device)
    result: dict[str, Any] = {"rows": rows, "disagreement": problem}
    if problem is None:
        pairs = list(zip(theirs, ours, strict=True))
        result |= {
            "speedup": statistics.median(t.seconds / o.seconds for t, o in pairs),
            "cpu_speedup": statistics.median(t.cpu_seconds / o.cpu_seconds for t, o in pairs),
            "memory_share": rows[OURS]["peak_mib"] / rows[TRL]["peak_mib"],
        }
    return result


def device_tflops(device: str, size: int = 8192) -> float:
    """Operations per second of a large bfloat16 matrix product on the device, in 10¹²."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = Contestant(name="", run=lambda: torch.mm(left, right))
    best = min(time_paired([product], torch.device(device), rounds=10)[""].samples_ms)
    return 2 * size**3 / best / 1e9


def measure(
    records: list[dict[str, Any]], options: argparse.Namespace, directory: Path
) -> Iterator[dict[str, Any]]:
    """One result for each of `--reference`."""
    inputs = Inputs(model=directory / "model", train=directory / "train.jsonl")
    adapter = directory / "adapter" if options.lora else None
    frozen_half = options.lora and options.device == "cuda"
    save_model(
        inputs.model,
        records,
        shape_of(options),
        dtype=torch.bfloat16 if frozen_half else torch.float32,
        device=options.device,
        adapter=adapter,
    )
    num_steps = options.warmup + options.steps
    write_jsonl(inputs.train, records[: num_steps * options.batch_size])
    ours = Task(
        contestant=OURS,
        reference="computed",
        inputs=inputs,
        adapter=adapter,
        cache=directory / "cache",
        output=directory / "output",
        num_steps=num_steps,
        batch_size=options.batch_size,
        max_length=options.max_length,
        max_tokens=options.max_tokens,
        learning_rate=options.learning_rate,
        device=options.device,
        threads=options.threads,
        checkpointing=options.checkpointing,
    )
    for reference in options.reference:
        ours = replace(ours, reference=reference)
        if reference == "cached":
            race([ours], turn=num_steps)  # fills the cache
        pair = [ours, replace(ours, contestant=TRL)]
        mine, theirs = race(pair, turn=options.turn)
        runs = {OURS: mine, TRL: theirs}
        yield {"reference": reference} | compare(runs, options)


def print_results(results: Sequence[dict[str, Any]]) -> None:
    """The table, then a sentence for each of `--reference`."""
    print()
    print_table(
        [as_text(r["reference"], name, row) for r in results for name, row in r["rows"].items()]
    )
    print()
    for result in results:
        if result["disagreement"] is not None:
            print(f"{result['reference']}: no ratio, they differ: {result['disagreement']}")
            continue
        print(
            f"{result['reference']}: ours takes {result['speedup']:.2f} times as many examples per "
            f"second ({result['cpu_speedup']:.2f} by CPU time), with {result['memory_share']:.2f} "
            "of TRL's memory; losses and log-probs agree"
        )


def as_text(reference: str, name: str, row: dict[str, Any]) -> dict[str, str]:
    """A row of the printed table."""
    text = {
        "reference": reference,
        "": name,
        "examples/s": f"{row['examples_per_second']:.2f}",
        "tokens/s": f"{row['tokens_per_second']:.0f}",
        "step ms": f"{row['step_ms']:.0f} [{row['step_ms_10']:.0f}, {row['step_ms_90']:.0f}]",
        "CPU ms": f"{row['cpu_ms']:.0f}",
        "peak MiB": f"{row['peak_mib']:.0f}",
        "idle MiB": f"{row['idle_mib']:.0f}",
    }
    return text | ({"MFU": f"{row['mfu']:.1%}"} if "mfu" in row else {})


def shape_of(options: argparse.Namespace) -> Shape:
    """The named shape, with the dimensions given on the command line."""
    given = {
        "hidden_size": options.hidden,
        "intermediate_size": options.intermediate,
        "num_layers": options.layers,
        "num_heads": options.heads,
        "num_kv_heads": options.kv_heads,
        "vocabulary": options.vocabulary,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    return replace(SHAPES[options.shape], **changes)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    add(
        "--data",
        nargs="+",
        type=Path,
        default=[],
        help="files of records, jsonl; none: generated ones",
    )
    add("--prompt-share", type=float, default=0.5, help="of a generated record's words")
    add("--words", type=int, default=300, help="of a generated record, on average")
    add("--shape", choices=SHAPES, default="small")
    for name in ("hidden", "intermediate", "layers", "heads", "kv-heads", "vocabulary"):
        add(f"--{name}", type=int, help="overrides the shape's")
    add("--lora", action="store_true", help="train an adapter of rank 16 on a frozen base")
    add("--reference", nargs="+", choices=get_args(Reference), default=get_args(Reference))
    add("--batch-size", type=int, default=8)
    add("--max-length", type=int, default=1024)
    add("--max-tokens", type=int, default=16384, help="per forward, ours only")
    add("--learning-rate", type=float, default=1e-6)
    add("--checkpointing", action="store_true", help="activation checkpointing, in both")
    add("--steps", type=int, default=8, help="timed steps")
    add("--warmup", type=int, default=2, help="steps before the timed ones")
    add("--turn", type=int, default=2, help="steps per turn")
    add("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    add("--threads", type=int, default=torch.get_num_threads(), help="per contestant")
    add("--load", type=int, default=0, help="busy processes of one thread beside them")
    add("--json", type=Path, help="result file")
    return parser.parse_args(arguments)


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder for everything, including the cache of `datasets`."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(directory / "datasets")
        yield directory


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    shape = shape_of(options)
    files = [record for path in options.data for record in read_jsonl(path)]
    num_records = (options.warmup + options.steps) * options.batch_size
    records = files or made_records(
        num_records, words=options.words, prompt_share=options.prompt_share
    )
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    settings |= {"shape": asdict(shape), "data": [path.name for path in options.data] or "made"}
    header = describe(torch.device(options.device)) | {"settings": json.dumps(settings)}
    print_header(header)
    with scratch() as directory, quiet(), busy_processes(options.load):
        try:
            results = list(measure(records, options, directory))
        except ContestantFailed as error:
            print(f"throughput: {error}", file=sys.stderr)
            return 1
    print_results(results)
    if options.json:
        write_result(options.json, header, results)
    return int(any(result["disagreement"] is not None for result in results))


if __name__ == "__main__":
    sys.exit(main())
