"""Growth of a step's costs per rank with the number of ranks, against the ideal.

    python benchmarks/scaling_ranks.py            # 1, 2 and 4 processes on this CPU, minutes
    python benchmarks/scaling_ranks.py --table    # bytes per GPU of 7B and 70B models, from shapes

Every case is one step of the same batch, after a first one, by torchrun over gloo. Per rank:

- operations: matrix products, counted by PyTorch's dispatcher; ideal: those of one rank over n;
- sent: bytes of collectives, as rings send them; beside it what crossed the loopback device of a
  network namespace of their own (Linux, root), headers included, over n;
- memory: written pages that no other process shares, after the step, beyond those before the model
  was loaded; ideal: weights, optimizer state and reference over the ranks that share them, and
  DDP's buckets.

The ideal of bytes sent, with G the bytes of all gradients and n the ranks of a group: DDP sends
2 G (n - 1) / n. FSDP2 gathers a layer of the policy in the matched run, the mismatched run and
backward, one of the reference in both its runs, embeddings and head of each once, and scatters G,
all times (n - 1) / n; r replicas of it send 2 (r - 1) / r of a shard of G more.
These are counts, not times.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import MIB, describe, print_header, print_table, write_result
from inputs import Shape, made_records, save_model, write_jsonl
from memory_table import memory_table
from silence import quiet

WORKER = Path(__file__).with_name("rank_costs.py")
IN_NAMESPACE = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
"""Runs a command with a loopback device of its own."""
SHAPE = Shape(hidden_size=512, intermediate_size=1536, num_layers=8, num_heads=8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A strategy and its ranks."""

    strategy: str
    ranks: int
    replicas: int = 1

    @property
    def shards(self) -> int:
        return self.ranks // self.replicas if self.strategy != "ddp" else 1


CASES = (
    *(Case(strategy="ddp", ranks=n) for n in (1, 2, 4)),
    *(Case(strategy="fsdp2", ranks=n) for n in (1, 2, 4)),
    Case(strategy="hybrid", ranks=4, replicas=2),
)


def measure(case: Case, inputs: dict[str, Path], batch_size: int) -> dict[str, Any]:
    """Means over the ranks of a case; memory is the fullest rank's."""
    with TemporaryDirectory() as name:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", case.ranks, WORKER, "--output", name]
        command += ["--ranks", case.ranks, "--replicas", case.replicas]
        command += ["--batch-size", batch_size, "--model", inputs["model"]]
        command += ["--train", inputs["train"]]
        command += ["--sharded"] if case.strategy != "ddp" else []
        isolated = _can_isolate()
        whole = [*(IN_NAMESPACE if isolated else ()), *map(str, command)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(whole, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"scaling_ranks: {case} failed:\n{done.stderr[-3000:]}")
        ranks = [json.loads((Path(name) / f"{i}.json").read_text()) for i in range(case.ranks)]
    if {rank["micro_batches"] for rank in ranks} != {1}:
        raise SystemExit("scaling_ranks: the ideal is that of one micro-batch per rank")
    on_loopback = ranks[0]["on_loopback"] / case.ranks if isolated else None
    return ranks[0] | {
        "operations": statistics.mean(rank["operations"] for rank in ranks),
        "sent": statistics.mean(sum(rank["sent"].values()) for rank in ranks),
        "on_loopback": on_loopback,
        "private": max(rank["private"] for rank in ranks),
    }


def _can_isolate() -> bool:
    tools = all(shutil.which(tool) for tool in ("unshare", "ip"))
    return tools and not subprocess.run([*IN_NAMESPACE, "true"], capture_output=True).returncode


def ideal_bytes(case: Case, *, layers: int, rest: int) -> float:
    """Bytes that a rank must send in a step, see the module's docstring."""
    gradients = layers + rest
    if case.strategy == "ddp":
        return 2 * gradients * (1 - 1 / case.ranks)
    gathered = 3 * layers + rest + 2 * layers + rest
    within = (gathered + gradients) * (1 - 1 / case.shards)
    return within + 2 * gradients / case.shards * (1 - 1 / case.replicas)


def as_text(case: Case, found: dict[str, Any], alone: dict[str, Any]) -> dict[str, str]:
    """A row of the printed table."""
    ideal = ideal_bytes(case, layers=found["layers"], rest=found["rest"])
    kept = ["weights", "optimizer", "reference"]
    kept += ["gradients"] if case.strategy == "ddp" else []  # its buckets; gradients are freed
    planned = sum(found["planned"][name] for name in kept)
    loopback = found["on_loopback"]

    def ratio(value: float, other: float) -> str:
        return f"{value / other:.3f}" if other else "–"

    return {
        "strategy": case.strategy + (f" {case.replicas} x {case.shards}" * (case.replicas > 1)),
        "ranks": str(case.ranks),
        "GFLOP": f"{found['operations'] / 1e9:.1f}",
        "× ideal": ratio(found["operations"] * case.ranks, alone["operations"]),
        "sent MiB": f"{found['sent'] / MIB:.1f}",
        "sent × ideal": ratio(found["sent"], ideal),
        "over lo MiB": "–" if loopback is None else f"{loopback / MIB:.1f}",
        "memory MiB": f"{found['private'] / MIB:.0f}",
        "memory × ideal": ratio(found["private"], planned),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--table", action="store_true", help="print the memory of large models instead")
    add("--batch-size", type=int, default=16)
    add("--words", type=int, default=60, help="of a generated record, on average")
    add("--json", type=Path, help="result file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.table:
        print_table(memory_table())
        return 0
    header = describe(torch.device("cpu")) | {"shape": asdict(SHAPE)}
    print_header(header)
    records = made_records(2 * options.batch_size, words=options.words, prompt_share=0.5)
    with TemporaryDirectory() as name, quiet():
        folder = Path(name)
        inputs = {
            "model": save_model(folder / "model", records, SHAPE),
            "train": write_jsonl(folder / "train.jsonl", records),
        }
        found = {case: measure(case, inputs, options.batch_size) for case in CASES}
    alone = found[CASES[0]]
    print()
    print_table([as_text(case, one, alone) for case, one in found.items()])
    if options.json:
        write_result(options.json, header, [asdict(c) | one for c, one in found.items()])
    return 0


if __name__ == "__main__":
    sys.exit(main())
