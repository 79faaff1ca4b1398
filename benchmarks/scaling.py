"""Cost of a step relative to SFT, by length, batch, vocabulary and the prompts' share.

    python benchmarks/scaling.py                            # small, for a CPU
    python benchmarks/scaling.py --shape qwen2.5-0.5b --length 512 1024 2048 4096 --batch 8 16
    python benchmarks/scaling.py --json benchmarks/results/scaling.json

One parameter changes at a time; the others keep their first value. All sequences of a step have the
same length. Contestants run the same model on the same packed batch, forward and backward, without
an optimizer, in turns:

- SFT: the negative log-likelihood of the completions (supervised fine-tuning);
- computed: our KTO step, with a frozen copy of the model as its reference;
- cached: the same with the reference's log-probs given.

Operations are counted by PyTorch's dispatcher (on a CPU only: it does not see what a GPU's kernels
compute). Memory is the peak beyond model and gradients.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    Contestant,
    Times,
    describe,
    peak_memory_mib,
    print_header,
    print_table,
    time_paired,
    write_result,
)
from inputs import SHAPES, make_model
from lightning.fabric.utilities import move_data_to_device
from operations import counter
from silence import quiet

from kto_lightning.batches.collate import pack
from kto_lightning.batches.types import Logps, PackedBatch, StepBatch
from kto_lightning.models.policy import Policy
from kto_lightning.models.reference import FrozenReference
from kto_lightning.training.metrics import BatchSums
from kto_lightning.training.scoring import BatchScorer

SFT, COMPUTED, CACHED = "SFT", "computed", "cached"


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A size to measure."""

    length: int
    """Tokens of a sequence, prompt and completion."""
    batch: int
    vocabulary: int
    prompt_share: float


@dataclass(frozen=True, slots=True)
class Example:
    """A record of random tokens."""

    index: int
    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    desirable: bool


class GivenReference:
    """A reference with given log-probs."""

    description = "given log-probs"

    def __init__(self, logps: Logps) -> None:
        self._logps = logps

    def logps(self, batch: PackedBatch, **_: bool) -> Logps:
        return self._logps

    def to(self, device: torch.device) -> None:
        """Nothing to move."""


def make_step(point: Point, device: torch.device) -> StepBatch:
    """A step of one micro-batch; each completion is the mismatched one of the next example."""
    random = np.random.default_rng(0)
    num_prompt = min(max(1, round(point.length * point.prompt_share)), point.length - 1)
    tokens = random.integers(0, point.vocabulary, (point.batch, point.length))
    examples = [
        Example(i, row[:num_prompt], row[num_prompt:], bool(i % 2)) for i, row in enumerate(tokens)
    ]
    packed = pack(
        examples,
        [examples[i - 1].completion_ids for i in range(len(examples))],
        max_length=None,
        shares_prompts=True,
        weights=np.ones(len(examples), dtype=np.float32),
    )
    num_desirable = int(packed.desirable.sum())
    return StepBatch(
        micro_batches=[move_data_to_device(packed, device)],
        num_examples=len(examples),
        num_tokens=tokens.size,
        num_desirable=num_desirable,
        num_undesirable=len(examples) - num_desirable,
    )


def sft_step(policy: Policy, step: StepBatch) -> None:
    """Forward and backward of the completions' negative log-likelihood."""
    logps = policy(step.micro_batches[0], mismatched=False).matched
    assert logps is not None
    (-logps.sum() / step.num_examples).backward()


def kto_step(scorer: BatchScorer, step: StepBatch) -> None:
    """Forward and backward of KTO, as in `KTOModule.training_step`."""
    (batch,) = step.micro_batches
    sums = BatchSums.zero(batch.weight.device)
    known = scorer.score(batch)
    _, z0 = scorer.reference_point(step, [known], sums)
    (scorer.compute_losses(batch, known, z0, sums).sum() / step.num_examples).backward()


def contestants(policy: Policy, step: StepBatch) -> dict[str, Callable[[], None]]:
    """The steps to run, by name."""

    def scorer(reference: Any) -> BatchScorer:
        return BatchScorer(
            policy, reference, beta=0.1, loss_name="kto", sum_over_ranks=lambda values: values
        )

    frozen = FrozenReference.copy_of(policy)
    computed = scorer(frozen)
    cached = scorer(GivenReference(frozen.logps(step.micro_batches[0])))
    return {
        SFT: lambda: sft_step(policy, step),
        COMPUTED: lambda: kto_step(computed, step),
        CACHED: lambda: kto_step(cached, step),
    }


def measure(point: Point, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per contestant at one size."""
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    model = make_model(replace(SHAPES[options.shape], vocabulary=point.vocabulary), options.device)
    policy = Policy(model)
    step = make_step(point, device)

    def clear_gradients() -> None:
        for parameter in policy.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()

    with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
        steps = contestants(policy, step)
        entries = [Contestant(name=n, run=run, prepare=clear_gradients) for n, run in steps.items()]
        operations = {} if on_gpu else {name: count(run) for name, run in steps.items()}
        times = time_paired(entries, device, rounds=options.rounds, warmup=1)
        peaks = {entry.name: peak_memory_mib(entry, device) for entry in entries}
    return [
        asdict(point)
        | {
            "contestant": name,
            "tera_operations": operations[name] / 1e12 if operations else None,
            "operations_over_sft": operations[name] / operations[SFT] if operations else None,
            "step_ms": times[name].median_ms,
            "samples_ms": list(times[name].samples_ms),
            "time_over_sft": 1 / times[name].speedup_over(times[SFT]),
            "tokens_per_second": 1e3 * step.num_tokens / times[name].median_ms,
            "peak_mib": peaks[name],
        }
        for name in steps
    ]


def count(run: Callable[[], None]) -> int:
    with counter() as counted:
        run()
    return counted.get_total_flops()


def points(options: argparse.Namespace) -> Iterator[tuple[str, Point]]:
    """The parameter that changes, and the size; the base case appears once per parameter."""
    given = {name: getattr(options, name) for name in Point.__dataclass_fields__}
    first = Point(**{name: values[0] for name, values in given.items()})
    for name, values in given.items():
        if len(values) > 1:
            for value in values:
                yield name, replace(first, **{name: value})


def as_text(changed: str, row: dict[str, Any]) -> dict[str, str]:
    """A row of the printed table."""

    def optional(value: float | None, pattern: str) -> str:
        return "–" if value is None else pattern.format(value)

    times = Times(samples_ms=tuple(row["samples_ms"]))
    return {
        "": f"{changed} {row[changed]:g}",
        "step": row["contestant"],
        "TFLOP": optional(row["tera_operations"], "{:.4f}"),
        "× SFT": optional(row["operations_over_sft"], "{:.3f}"),
        "ms": str(times),
        "time × SFT": f"{row['time_over_sft']:.2f}",
        "tokens/s": f"{row['tokens_per_second']:.0f}",
        "peak MiB": optional(row["peak_mib"], "{:.0f}"),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="small", help="all dimensions but the vocabulary")
    add("--length", type=int, nargs="+", default=[256, 512, 1024], help="tokens of a sequence")
    add("--batch", type=int, nargs="+", default=[4, 8], help="sequences")
    add("--vocabulary", type=int, nargs="+", default=[8192, 32768])
    add("--prompt-share", type=float, nargs="+", default=[0.5, 0.1, 0.9], help="of the tokens")
    add("--rounds", type=int, default=3)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--json", type=Path, help="result file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    header = describe(torch.device(options.device)) | {"shape": asdict(SHAPES[options.shape])}
    print_header(header)
    results, measured = [], {}
    with quiet():
        for changed, point in points(options):
            if point not in measured:
                measured[point] = measure(point, options)
            results += [{"changed": changed} | row for row in measured[point]]
    print()
    print_table([as_text(row["changed"], row) for row in results])
    if options.json:
        write_result(options.json, header, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
