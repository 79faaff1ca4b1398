"""One rank of `scaling_ranks.py`, started by torchrun: two training steps, of which the second is
counted. Writes OUTPUT/RANK.json."""

import argparse
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import silence
import torch
import torch.distributed as dist
from lightning import Trainer
from operations import counter
from private_memory import private_bytes, trim
from torch.utils._python_dispatch import TorchDispatchMode

from kto_lightning.batches.types import StepBatch
from kto_lightning.data.datamodule import KTODataModule
from kto_lightning.models.memory_plan import RunShape, plan_memory
from kto_lightning.models.model_shape import ModelShape
from kto_lightning.module import KTOModule
from kto_lightning.strategies.fsdp2 import FSDP2

STEPS = 2


class SentBytes(TorchDispatchMode):
    """Counts what this rank sends in collectives, as a ring sends it: of n ranks, (n − 1) / n of
    the gathered or scattered tensor, and twice that of a reduced one."""

    def __init__(self) -> None:
        super().__init__()
        self.by_kind: dict[str, float] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if func.namespace == "c10d":
            self._add(func.__name__.split(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _add(self, name: str, arguments: Any) -> None:
        share = 1 - 1 / _group_size(arguments)
        if name == "allreduce_":
            kind, sent = "all-reduce", 2 * share * sum(t.nbytes for t in arguments[0])
        elif name == "_allgather_base_":
            kind, sent = "all-gather", share * arguments[0].nbytes
        elif name == "_reduce_scatter_base_":
            kind, sent = "reduce-scatter", share * arguments[1].nbytes
        elif name == "broadcast_":
            kind, sent = "broadcast", share * sum(t.nbytes for t in arguments[0])
        elif name == "barrier":
            return
        else:
            raise SystemExit(f"scaling_ranks: {name} sends bytes that are not counted")
        self.by_kind[kind] = self.by_kind.get(kind, 0.0) + sent


def _group_size(arguments: Any) -> int:
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject):
            with suppress(RuntimeError):  # it is the reduction's operation
                return dist.ProcessGroup.unbox(argument).size()
    raise SystemExit("scaling_ranks: a collective without a process group")


class CountedModule(KTOModule):
    """`KTOModule` that counts its last step, and measures memory after it."""

    counted: dict[str, Any]
    private_before: int

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        if batch_idx < STEPS - 1:
            super().training_step(batch, batch_idx)
            return
        before = loopback_bytes(self.trainer)
        sent, operations = SentBytes(), counter()
        with sent, operations:
            super().training_step(batch, batch_idx)
        after = loopback_bytes(self.trainer)
        self.counted = {
            "operations": operations.get_total_flops(),
            "sent": sent.by_kind,
            "on_loopback": after - before,
            "micro_batches": len(batch.micro_batches),
        }

    def on_train_end(self) -> None:
        self.counted["private"] = written_bytes() - self.private_before


def loopback_bytes(trainer: Trainer) -> int:
    """Bytes that all processes of this network namespace have sent over `lo`."""
    trainer.strategy.barrier()
    (line,) = (one for one in Path("/proc/net/dev").read_text().splitlines() if "lo:" in one)
    transmitted = int(line.split(":")[1].split()[8])
    trainer.strategy.barrier()
    return transmitted


def written_bytes() -> int:
    """Memory that this process has written and shares with no other."""
    trim()
    return private_bytes("self")[1]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train two steps; what the second cost, and the shapes that its ideal follows from."""
    module = CountedModule(str(options.model), learning_rate=1e-4)
    data = KTODataModule(
        train=str(options.train),
        batch_size=options.batch_size,
        max_tokens=10**6,
        shuffle=False,
        preprocessing_workers=1,
    )
    sharded = FSDP2(replicas=options.replicas)
    trainer = Trainer(
        accelerator="cpu",
        devices=options.ranks,
        strategy=sharded if options.sharded else "ddp",
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module.private_before = written_bytes()
    trainer.fit(module, datamodule=data)
    assert module.policy is not None
    model = ModelShape.of(module.policy)
    shape = RunShape(
        num_ranks=options.ranks, num_replicas=options.replicas, is_sharded=options.sharded
    )
    *layers, rest = [sum(4 * p.numel() for p in unit) for unit in model.units]
    return module.counted | {
        "planned": asdict(plan_memory(model, shape, model).device),
        "layers": sum(layers),
        "rest": rest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True)
    add("--train", type=Path, required=True)
    add("--output", type=Path, required=True)
    add("--ranks", type=int, required=True)
    add("--replicas", type=int, default=1)
    add("--sharded", action="store_true")
    add("--batch-size", type=int, required=True)
    options = parser.parse_args()
    with silence.quiet():
        result = run(options)
    rank = dist.get_rank() if dist.is_initialized() else 0
    (options.output / f"{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
