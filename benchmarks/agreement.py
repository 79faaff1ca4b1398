"""Runs that raced: whether they did the same work, and how much faster and smaller one was."""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from common import Contestant, Times, time_paired
from contestants import Step
from race import Measurements

# For rounding, which grows in training. Other partners or another order change log-probs by tens of
# percent.
TOLERANCES = {"cpu": {"loss": 1e-3, "logps": 1e-4}, "cuda": {"loss": 2e-2, "logps": 1e-2}}
OURS, TRL, SFT = "ours", "TRL", "TRL SFT"


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


def other_tokens(ours: Sequence[Step], sft: Sequence[Step]) -> str | None:
    """The first step for which SFT had other tokens, or None."""
    for number, (mine, other) in enumerate(zip(ours, sft, strict=True), start=1):
        if mine.num_tokens != other.num_tokens:
            return f"step {number}: {mine.num_tokens} tokens, SFT's {other.num_tokens}"
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
    """A row for each and, if the runs agree, the ratios."""
    peak = device_tflops(options.device) if options.device == "cuda" else None
    rows = {
        name: summarize(run, options.warmup, options.batch_size, peak) for name, run in runs.items()
    }
    timed = {name: run.timed(options.warmup) for name, run in runs.items()}
    ours, theirs = timed[OURS], timed[TRL]
    if peak is not None:
        # The lower bound is the same for both, whatever they compute in addition; SFT has another.
        for name, steps in ((OURS, ours), (TRL, theirs)):
            shares = [
                (mine.floor_operations or math.nan) / step.seconds / peak / 1e12
                for mine, step in zip(ours, steps, strict=True)
            ]
            rows[name]["mfu"] = statistics.median(shares)
    problem = disagreement(runs[OURS].steps, runs[TRL].steps, options.device)
    if SFT in runs:
        problem = problem or other_tokens(runs[OURS].steps, runs[SFT].steps)
    result: dict[str, Any] = {"rows": rows, "disagreement": problem}
    if problem is None:
        pairs = list(zip(theirs, ours, strict=True))
        result |= {
            "speedup": statistics.median(t.seconds / o.seconds for t, o in pairs),
            "cpu_speedup": statistics.median(t.cpu_seconds / o.cpu_seconds for t, o in pairs),
            "memory_share": rows[OURS]["peak_mib"] / rows[TRL]["peak_mib"],
        }
        if SFT in runs:
            for name, steps in (("time_over_sft", ours), ("trl_time_over_sft", theirs)):
                pairs = zip(steps, timed[SFT], strict=True)
                result[name] = statistics.median(k.seconds / sft.seconds for k, sft in pairs)
    return result


def device_tflops(device: str, size: int = 8192) -> float:
    """Operations per second of a large bfloat16 matrix product on the device, in 10¹²."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = Contestant(name="", run=lambda: torch.mm(left, right))
    best = min(time_paired([product], torch.device(device), rounds=10)[""].samples_ms)
    return 2 * size**3 / best / 1e9
