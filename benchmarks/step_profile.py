"""Profile one training step of ours: the twenty largest operations, and the idle device.

    python benchmarks/step_profile.py --shape qwen2.5-0.5b --json profile.json
    python benchmarks/step_profile.py --shape qwen2.5-7b --lora --reference cached

A step as `fit` takes it, from the end of the one before, after `--warmup` steps: data, forward,
backward, update, metrics. On a GPU, time is that of its kernels, and *idle* the share of the step
in which none ran, as the host had not yet started one; on a CPU, time is that of operations without
those that they call.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import torch
from common import describe, print_header, print_table, write_result
from contestants import Reference, Task, train_ours
from inputs import SHAPES, made_records, write_jsonl
from silence import quiet
from step_runs import save_inputs
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

LARGEST = 20


class ProfiledStep:
    """A `contestants.StepEnds` that profiles the step after `warmup` others."""

    def __init__(self, device: torch.device, warmup: int) -> None:
        self._device, self._warmup = device, warmup
        self._num_steps = 0
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profile = profile(activities=activities)
        self.seconds = self._started = 0.0

    def ready(self) -> None:
        """Nothing is to be measured before the first step."""

    def end_step(self, step_values: Callable[[], dict[str, Any]]) -> None:
        """Begin or end the profile where it is due."""
        self._num_steps += 1
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._num_steps == self._warmup:
            self.profile.start()
            self._started = time.perf_counter()
        elif self._num_steps == self._warmup + 1:
            self.seconds = time.perf_counter() - self._started
            self.profile.stop()


def busy_seconds(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals given in microseconds."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total / 1e6


def summarize(step: ProfiledStep, *, on_gpu: bool) -> dict[str, Any]:
    """The step's time, idle share and largest operations."""
    found: dict[str, Any] = {"step_ms": step.seconds * 1e3}
    if on_gpu:
        kernels = [
            event
            for event in step.profile.events() or []
            if event.device_type == DeviceType.CUDA
            and not getattr(event, "is_user_annotation", False)
        ]
        busy = busy_seconds((e.time_range.start, e.time_range.end) for e in kernels)
        found["idle_share"] = max(0.0, 1 - busy / step.seconds)
        found["num_kernels"] = len(kernels)
    spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = [
        {"operation": entry.key, "calls": entry.count, "ms": getattr(entry, spent) / 1e3}
        for entry in step.profile.key_averages()
        if (entry.device_type == DeviceType.CUDA) is on_gpu
    ]
    rows.sort(key=lambda row: -row["ms"])
    total = sum(row["ms"] for row in rows)
    found["total_ms"] = total
    found["largest"] = [row | {"share": row["ms"] / total} for row in rows[:LARGEST]]
    return found


def print_profile(found: dict[str, Any]) -> None:
    """The table, and the step's time above it."""
    idle = f", device idle {found['idle_share']:.1%}" if "idle_share" in found else ""
    print(f"\nstep {found['step_ms']:.1f} ms, operations {found['total_ms']:.1f} ms{idle}\n")
    print_table(
        [
            {
                "operation": row["operation"][:80],
                "calls": str(row["calls"]),
                "ms": f"{row['ms']:.2f}",
                "share": f"{row['share']:.1%}",
            }
            for row in found["largest"]
        ]
    )


def run_profiled(options: argparse.Namespace, directory: Path) -> ProfiledStep:
    """Train for as many steps as are needed, all on the same batch."""
    device = torch.device(options.device)
    records = made_records(options.batch_size, words=options.words, prompt_share=0.5)
    inputs, adapter = save_inputs(
        directory, records, SHAPES[options.shape], lora=options.lora, device=options.device
    )
    num_steps = options.warmup + 1
    write_jsonl(inputs.train, records * num_steps)
    step = ProfiledStep(device, options.warmup)
    task = Task(
        contestant="ours",
        reference=options.reference,
        inputs=inputs,
        adapter=adapter,
        cache=directory / "cache",
        output=directory / "output",
        num_steps=num_steps,
        batch_size=options.batch_size,
        max_length=1024,
        max_tokens=16384,
        learning_rate=1e-6,
        device=options.device,
        threads=torch.get_num_threads(),
        checkpointing=options.checkpointing,
    )
    train_ours(task, step)
    return step


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="small")
    add("--lora", action="store_true", help="train an adapter of rank 16 on a frozen base")
    add("--reference", choices=get_args(Reference), default="computed")
    add("--batch-size", type=int, default=8)
    add("--words", type=int, default=300, help="of a record, on average")
    add("--checkpointing", action="store_true", help="activation checkpointing")
    add("--warmup", type=int, default=3, help="steps before the profiled one")
    cuda = torch.cuda.is_available()
    add("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    add("--json", type=Path, help="result file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    header = describe(torch.device(options.device)) | {"settings": json.dumps(settings)}
    print_header(header)
    with tempfile.TemporaryDirectory() as directory, quiet():
        step = run_profiled(options, Path(directory))
    found = summarize(step, on_gpu=options.device == "cuda")
    print_profile(found)
    if options.json:
        write_result(options.json, header, [found])
    return 0


if __name__ == "__main__":
    sys.exit(main())
