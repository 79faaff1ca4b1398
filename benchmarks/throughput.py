"""Time, CPU time and memory of whole training steps, ours and TRL's in turn.

    python benchmarks/throughput.py --data feedback.jsonl --json benchmarks/results/throughput.json
    python benchmarks/throughput.py --shape qwen2.5-0.5b                # made records, this device
    python benchmarks/throughput.py --shape qwen2.5-7b --lora --sft
    python benchmarks/throughput.py --shape small --vocabulary 32768 --layers 2

Both train the same randomly initialised model on the same records in the same order, with the same
partners (`pairing: rotate`), batch, length and optimizer: float32 on a CPU, bfloat16 on a GPU (a
frozen base's weights too). Each runs in a process of its own that takes a few steps while the other
waits. A step is measured from the end of the previous one: data, forward, backward, update, and for
ours the row in `metrics.csv`. Steps before the first timed one (`--warmup`) count only for the peak
memory and for the comparison of losses.

With `--sft` TRL's `SFTTrainer` takes its turns too, on the same sequences: what a pass of plain
fine-tuning over them costs. It has no reference and no mismatched completions.

- computed: the reference runs in every step;
- cached: ours reads log-probs from its cache, TRL's are precomputed. Neither cost is included.

Memory is the peak above that of the loaded, idle process: resident memory on a CPU, allocated
memory on CUDA. MFU, on a GPU, is the lower bound of a step's operations (`step_floor.py`, the same
for both) over its time, relative to what this device reaches in a large matrix product.

If losses, log-probs or tokens of the two differ, or the tokens of SFT, no ratio is given and the
exit status is 1.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch
from agreement import OURS, SFT, TRL, compare
from common import (
    describe,
    print_header,
    print_table,
    write_result,
)
from contestants import ContestantName, Reference, Task
from inputs import SHAPES, Shape, made_records, read_jsonl, write_jsonl
from load import busy_processes
from race import ContestantFailed, Measurements, race
from silence import quiet
from step_runs import save_inputs


def measure(
    records: list[dict[str, Any]], options: argparse.Namespace, directory: Path
) -> Iterator[dict[str, Any]]:
    """One result for each of `--reference`."""
    inputs, adapter = save_inputs(
        directory, records, shape_of(options), lora=options.lora, device=options.device
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
        names: list[ContestantName] = [OURS, TRL, *([SFT] if options.sft else [])]
        tasks = [replace(ours, contestant=name) for name in names]
        raced = race(tasks, turn=options.turn)
        runs: dict[str, Measurements] = dict(zip(names, raced, strict=True))
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
        if "time_over_sft" in result:
            print(
                f"{result['reference']}: a step takes {result['time_over_sft']:.2f} times the time "
                f"of TRL's SFT over the same tokens (TRL's KTO {result['trl_time_over_sft']:.2f})"
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
    add("--sft", action="store_true", help="also TRL's SFTTrainer on the same sequences")
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
