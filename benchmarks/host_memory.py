"""Host memory of each of two processes while FSDP2 loads a model, saves and exports it.

    python benchmarks/host_memory.py --json benchmarks/results/host_memory.json

Two ranks of `fit` take one step on CPU (gloo) with a Qwen2 of generated weights, bfloat16 in its
file and float32 in memory, and the default reference, a frozen copy. Their private memory
(`Private_Dirty` of /proc/PID/smaps_rollup: what they have written and no other process shares) is
sampled from outside. It is shown above that of the same process right before the phase, as a share
of the bytes of the whole model. `with files` adds the pages of mapped weight files
(`Private_Clean`), which the system can reclaim. Phases:

- load: policy and reference. A rank that does not read may take its shards and one unit (a layer,
  or embeddings, norm and head); rank 0 the whole model and one unit; each may keep its shards.
- save: a sharded checkpoint. Nothing is held whole: one unit at most.
- export: the model at the end of the run, in files of an eighth of its size instead of 5 GB. Rank 0
  may take one file and three units (a gathered one, and the buffers in which gloo gathers), the
  other three units.

On top, 2% of the model are allowed, and on rank 0 192 MiB for what its probe of the route, or the
conversion of weights, takes in libraries and the allocator. The exit status is 1 if a rank takes
more.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from private_memory import private_bytes, trim

RANKS = 2
SLACK = 0.02
"""Of the whole model's bytes."""
PROBE_BYTES = 192 * 2**20
PHASES = ("load", "save", "export")
FILES = 8
"""Into which an exported model is divided."""
_INTERVAL = 0.01
"""Seconds between two samples."""


class Phases:
    """Writes when this process begins and ends a phase, and what its private memory is then.

    Args:
        path: of a file of JSON lines.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, event: str, **facts: Any) -> None:
        private, dirty = private_bytes("self")
        line = {"event": event, "time": time.monotonic(), "private": private, "dirty": dirty}
        with self._path.open("a") as file:
            file.write(json.dumps(line | facts) + "\n")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.write(f"{name} begins")
        yield
        self.write(f"{name} ends")


def run_rank(options: argparse.Namespace) -> None:
    """`fit` of one step, with its phases written down."""
    import torch.distributed as dist

    from kto_lightning.callbacks.checkpoints import Checkpoints
    from kto_lightning.cli.lightning_cli import KTOCLI
    from kto_lightning.cli.trainer import main
    from kto_lightning.models import safetensors_files
    from kto_lightning.module import KTOModule

    phases = Phases(options.events)

    def watch(owner: type, method: str, phase: str) -> None:
        original = getattr(owner, method)

        def watched(self: Any, *arguments: Any) -> Any:
            dist.barrier()
            trim()
            with phases.phase(phase):
                result = original(self, *arguments)
                trim()
            if phase == "load":
                known = facts(self)
                safetensors_files.MAX_FILE_SIZE = known["model"] // FILES
                phases.write("facts", **known)
            return result

        setattr(owner, method, watched)

    watch(KTOModule, "configure_model", "load")
    watch(Checkpoints, "on_train_end", "save")
    watch(KTOCLI, "_export", "export")
    arguments = ["--model.policy", options.model, "--data.train", options.train]
    arguments += ["--output_dir", options.output, "--trainer.accelerator", "cpu"]
    arguments += ["--trainer.strategy", options.strategy, "--trainer.devices", str(RANKS)]
    arguments += ["--trainer.max_steps", "1", "--data.batch_size", str(RANKS)]
    raise SystemExit(main(["fit", *arguments]))


def facts(module: Any) -> dict[str, int]:
    """Bytes of the whole model, of its largest unit, and of this rank's part of all models."""
    from torch.distributed.tensor import DTensor

    from kto_lightning.models.units import decoder_layers

    def whole(part: Any) -> int:
        return sum(p.numel() * p.itemsize for p in part.parameters())

    def held(part: Any) -> int:
        local = (p.to_local() if isinstance(p, DTensor) else p for p in part.parameters())
        return sum(p.numel() * p.itemsize for p in local)

    layers = [whole(layer) for layer in decoder_layers(module.policy)]
    model = whole(module.policy)
    return {
        "model": model,
        "unit": max(*layers, model - sum(layers)),
        "held": held(module.policy) + held(module.reference.policy),
    }


def start_rank(rank: int, port: int, strategy: str, directory: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(RANKS),
        "RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "host_memory",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, "--strategy", strategy]
    for name, part in (("model", "model"), ("train", "train.jsonl"), ("output", "output")):
        command += [f"--{name}", str(directory / part)]
    command += ["--events", str(directory / f"{rank}.events")]
    with (directory / f"{rank}.out").open("w") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def sample(processes: list[subprocess.Popen[bytes]]) -> list[list[tuple[float, int, int]]]:
    """Time, private and dirty memory of every process until all have ended."""
    samples: list[list[tuple[float, int, int]]] = [[] for _ in processes]
    while any(process.poll() is None for process in processes):
        for process, found in zip(processes, samples, strict=True):
            found.append((time.monotonic(), *private_bytes(process.pid)))
        time.sleep(_INTERVAL)
    return samples


def measure(strategy: str, directory: Path) -> list[dict[str, Any]]:
    """One row per rank and phase, in bytes above the beginning of the phase."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start_rank(rank, port, strategy, directory) for rank in range(RANKS)]
    samples = sample(processes)
    for rank, process in enumerate(processes):
        if process.returncode != 0:
            output = (directory / f"{rank}.out").read_text()
            raise SystemExit(f"host_memory: rank {rank} of {strategy} has failed:\n{output}")
    shutil.rmtree(directory / "output")
    return [
        row_of(rank, phase, strategy, directory / f"{rank}.events", samples[rank])
        for phase in (PHASES if strategy == "fsdp2" else PHASES[:1])
        for rank in range(RANKS)
    ]


def row_of(
    rank: int, phase: str, strategy: str, events: Path, samples: list[tuple[float, int, int]]
) -> dict[str, Any]:
    written = [json.loads(line) for line in events.read_text().splitlines()]
    found = {one["event"]: one for one in reversed(written)}  # a later call does nothing more
    begin, end, known = found[f"{phase} begins"], found[f"{phase} ends"], found["facts"]
    within = [one for one in samples if begin["time"] <= one[0] <= end["time"]]
    return {
        "strategy": strategy,
        "phase": phase,
        "rank": rank,
        "model": known["model"],
        "unit": known["unit"],
        "held": known["held"],
        "peak": max([end["dirty"], *(one[2] for one in within)]) - begin["dirty"],
        "peak_with_files": max([end["private"], *(one[1] for one in within)]) - begin["private"],
        "after": end["dirty"] - begin["dirty"],
        "samples": len(within),
        "seconds": end["time"] - begin["time"],
    }


def limits(row: dict[str, Any]) -> tuple[float, float] | None:
    """Most bytes that a rank may take during a phase, and keep after it; None: not promised."""
    if row["strategy"] != "fsdp2":
        return None
    slack = SLACK * row["model"] + (PROBE_BYTES if row["rank"] == 0 else 0)
    if row["phase"] == "save":
        return row["unit"] + slack, slack
    if row["phase"] == "export":
        file = row["model"] / FILES if row["rank"] == 0 else 0
        return file + 3 * row["unit"] + slack, row["unit"] + slack
    most = max(row["model"], row["held"]) if row["rank"] == 0 else row["held"]
    return most + row["unit"] + slack, row["held"] + slack


def broken(row: dict[str, Any]) -> bool:
    allowed = limits(row)
    return allowed is not None and (row["peak"] > allowed[0] or row["after"] > allowed[1])


def print_rows(rows: list[dict[str, Any]]) -> None:
    from common import print_table

    def share(row: dict[str, Any], value: float) -> str:
        return f"{value / row['model']:.2f}"

    def allowed(row: dict[str, Any], which: int) -> str:
        found = limits(row)
        return "" if found is None else share(row, found[which])

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "": lambda row: f"{row['strategy']}, {row['phase']}, rank {row['rank']}",
        "holds": lambda row: share(row, row["held"]),
        "one unit": lambda row: share(row, row["unit"]),
        "peak": lambda row: share(row, row["peak"]),
        "at most": lambda row: allowed(row, 0),
        "with files": lambda row: share(row, row["peak_with_files"]),
        "after": lambda row: share(row, row["after"]),
        "at most ": lambda row: allowed(row, 1),
        "promise": lambda row: "broken" if broken(row) else "kept" if limits(row) else "none",
    }
    print()
    print_table([{name: value(row) for name, value in columns.items()} for row in rows])


def make_inputs(directory: Path, options: argparse.Namespace) -> None:
    import torch
    from inputs import Shape, made_records, save_model, write_jsonl

    records = made_records(64, words=20, prompt_share=0.5)
    shape = Shape(
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_layers=options.layers,
        num_heads=8,
        num_kv_heads=8,
    )
    write_jsonl(directory / "train.jsonl", records)
    save_model(directory / "model", records, shape, dtype=torch.bfloat16)
    os.sync()  # pages of a file that is not on the disk yet would count as written by its readers


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layers", type=int, default=18)
    add("--width", type=int, default=1024)
    add("--ddp", action="store_true", help="also measure ddp, where every rank holds all")
    add("--json", type=Path, help="result file")
    for name in ("model", "train", "output", "strategy"):
        add(f"--{name}", help=argparse.SUPPRESS)  # for the processes that are started
    add("--events", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.events:
        run_rank(options)
    # Imported here: the ranks import only what `fit` does.
    import torch
    from common import describe, print_header, write_result

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_inputs(directory, options)
        rows = [
            row
            for strategy in ("fsdp2", *(("ddp",) if options.ddp else ()))
            for row in measure(strategy, directory)
        ]
    header = describe(torch.device("cpu")) | {
        "model_mib": round(rows[0]["model"] / 2**20),
        "layers": options.layers,
        "width": options.width,
    }
    print_header(header)
    print_rows(rows)
    if options.json:
        write_result(options.json, header, rows)
    return int(any(map(broken, rows)))


if __name__ == "__main__":
    sys.exit(main())
