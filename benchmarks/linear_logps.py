"""Time `kto_kernels.linear_logps` against eager, torch.compile, TRL, Liger and Cut Cross-Entropy.

    python benchmarks/linear_logps.py                        # this device's default shapes
    python benchmarks/linear_logps.py --shape 256x896x65536 --dtype float32 --rounds 15
    python benchmarks/linear_logps.py --output benchmarks/results/h200_linear_logps.json

A shape is tokens x width x vocabulary. Three tasks: `gradient-free` (a reference, a mismatched
pass, an evaluation), `frozen` (LoRA: only the hidden states need a gradient) and `trained`.

Columns: forward, and forward with backward, median [10%, 90%] in ms; speedup over eager; GEMMs,
matrix products of 2·N·D·V operations, counted by PyTorch's dispatcher in a small run on the CPU;
ceiling, the operations of those GEMMs over the time, as a share of what this device reaches in
such a product alone; peak memory beyond the inputs in MiB; error relative to eager's, against
float64. A contestant with more than five times eager's error is not timed. `ours` runs in tiles; on
a GPU the fused kernel is a contestant of its own.
"""

import argparse
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

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
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kto_kernels.linear_logps import eager
from kto_kernels.linear_logps.function import _score
from kto_kernels.linear_logps.head import Head
from kto_kernels.linear_logps.plan import Mode, Needs, make_plan

TASKS = ("gradient-free", "frozen", "trained")
WRONG = 5.0
CPU_SHAPES = ["256x896x65536"]
CUDA_SHAPES = ["8192x896x151936", "8192x2048x128256", "8192x4096x151936"]

Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Hidden states, weight, targets to log-probs, `[N]` or their sum."""


@dataclass(kw_only=True)
class Problem:
    """The tensors of one shape; the leaves get the gradients of the summed log-probs."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor

    @classmethod
    def make(cls, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype):
        tokens, width, vocabulary = shape
        generator = torch.Generator(device).manual_seed(0)
        options = {"device": device, "generator": generator}
        weight = torch.randn(vocabulary, width, **options).mul_(2 / width**0.5).to(dtype)
        targets = torch.randint(vocabulary, (tokens,), **options)
        hidden = torch.randn(tokens, width, **options)
        confident = tokens // 4
        hidden[:confident] += 4 * weight[targets[:confident]].float()
        return cls(hidden=hidden.to(dtype), weight=weight, targets=targets)

    def require_gradients(self, task: str) -> None:
        self.hidden = self.hidden.detach().requires_grad_(task != "gradient-free")
        self.weight = self.weight.detach().requires_grad_(task == "trained")

    def clear_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def run(self, score: Score) -> Tensor:
        logps = score(self.hidden, self.weight, self.targets)
        if logps.requires_grad:
            logps.sum().backward()
        return logps.detach()

    def forward(self, score: Score) -> Tensor:
        with torch.set_grad_enabled(self.hidden.requires_grad):
            return score(self.hidden, self.weight, self.targets)


def ours(mode: Mode | None = None, *, tile_mib: int | None = None, **changes) -> Score:
    """Our log-probs, as planned or with parts of the plan overridden."""

    def score(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        plan = make_plan(hidden, weight, Needs.of(hidden, weight, None))
        if tile_mib is not None:
            changes["columns"] = max(64, tile_mib * 2**20 // 4 // plan.rows)
        plan = replace(plan, mode=mode or plan.mode, **changes)
        return _score(hidden, weight, targets, None, Head(), plan=plan)[0]

    return score


def trl() -> Score:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def score(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        arguments = (hidden, weight, None, targets, 1.0, 32_768, None, 1.0, ())
        return ChunkedLogProbFunction.apply(*arguments)[0]

    return score


def liger() -> Score:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def score(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        # Liger computes gradients of a sum in the forward; one gradient per token takes 4 GEMMs.
        loss = liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")
        assert isinstance(loss, Tensor)
        return -loss

    return score


def cut_cross_entropy() -> Score:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    def score(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, targets, reduction="none")

    return score


def contestants(task: str, device: torch.device, arguments: argparse.Namespace) -> dict[str, Score]:
    """The contestants that can run a task on a device."""
    found: dict[str, Score] = {"eager": eager.linear_logps}
    if arguments.compile:
        found["torch.compile"] = torch.compile(eager.linear_logps)
    if importlib.util.find_spec("trl"):
        found["TRL"] = trl()
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        found["Liger, summed"] = liger()
    if device.type == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        found["Cut Cross-Entropy"] = cut_cross_entropy()
    if task == "gradient-free" and device.type == "cuda":
        found["ours, fused"] = ours(fused=True)
    modes = {"ours": None}
    if task == "trained":
        modes = {"ours, kept": Mode.KEPT, "ours, recomputed": Mode.RECOMPUTED}
    for name, mode in modes.items():
        found[name] = ours(mode, fused=False)
        for size in arguments.tile_mib or ():
            found[f"{name}, {size} MiB tiles"] = ours(mode, fused=False, tile_mib=size)
    return found


def truth(problem: Problem, rows: int = 256) -> dict[str, Tensor]:
    """Float64 results, computed `rows` rows at a time."""
    exact = {"logps": [], "hidden": []}
    weight = problem.weight.detach().double().requires_grad_(problem.weight.requires_grad)
    for hidden, targets in zip(
        problem.hidden.detach().split(rows), problem.targets.split(rows), strict=True
    ):
        leaf = hidden.double().requires_grad_(problem.hidden.requires_grad)
        logps = eager.linear_logps(leaf, weight, targets)
        if logps.requires_grad:
            logps.sum().backward()
        exact["logps"].append(logps.detach())
        exact["hidden"].append(leaf.grad)
    found = {"logps": torch.cat(exact["logps"])}
    if problem.hidden.requires_grad:
        found["hidden"] = torch.cat(exact["hidden"])
    if weight.grad is not None:
        found["weight"] = weight.grad
    return found


def errors(problem: Problem, score: Score, exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each result, in the Euclidean norm."""
    problem.clear_gradients()
    results = {"logps": problem.run(score)}
    for name in ("hidden", "weight"):
        if (gradient := getattr(problem, name).grad) is not None:
            results[name] = gradient
    if results["logps"].ndim == 0:
        results["logps"] = results["logps"][None]
        exact = exact | {"logps": exact["logps"].sum()[None]}
    return {
        name: float((value.double() - exact[name]).norm() / exact[name].norm())
        for name, value in results.items()
    }


def errors_over_eager(problem: Problem, scores: dict[str, Score]) -> dict[str, float]:
    """Each contestant's largest error of log-probs and gradients, relative to eager's.

    Infinite for a peer that fails, which is said: it is no reason to measure none of the others.
    """
    exact = truth(problem)
    eagers = errors(problem, eager.linear_logps, exact)
    found = {}
    for name, score in scores.items():
        try:
            mine = errors(problem, score, exact)
        except Exception as error:
            if name.startswith("ours"):
                raise
            print(f"{name} fails: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            found[name] = math.inf
            continue
        if "summed" in name and len(mine) > 1:
            del mine["logps"]  # one sum, in which errors cancel; its gradients are compared
        found[name] = max(mine[part] / max(eagers[part], 1e-9) for part in mine)
    return found


def count_gemms(task: str, name: str, score: Score) -> float | None:
    """Matrix products of 2·N·D·V operations, in a small run on the CPU; None if it cannot run."""
    if any(part in name for part in ("compile", "Liger", "Cut")):
        return None
    if "fused" in name:
        score = ours(
            fused=False
        )  # the dispatcher does not see the fused kernel; the GEMM is the same
    shape = (64, 32, 512)
    small = Problem.make(shape, torch.device("cpu"), torch.float32)
    small.require_gradients(task)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm}) as counter:
        small.run(score)
    return counter.get_total_flops() / (2 * shape[0] * shape[1] * shape[2])


def addmm(total, left, right, *_, **__) -> int:
    """Operations of `addmm_` from shapes: FlopCounterMode does not count in-place operations."""
    return 2 * left[0] * left[1] * right[1]


def gemm_tflops(problem: Problem, device: torch.device, rounds: int) -> float:
    """Operations per second of the forward's matrix product alone, in 10¹²."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    vocabulary = min(weight.shape[0], 2**27 // hidden.shape[0])  # bounds the result, not the rate
    out = torch.empty(hidden.shape[0], vocabulary, dtype=hidden.dtype, device=device)
    product = Contestant(name="", run=lambda: torch.mm(hidden, weight[:vocabulary].t(), out=out))
    best = min(time_paired([product], device, rounds=rounds)[""].samples_ms)
    return 2 * hidden.numel() * vocabulary / best / 1e9


def measure(
    problem: Problem, task: str, device: torch.device, arguments: argparse.Namespace
) -> Iterator[dict]:
    """One row per contestant."""
    problem.require_gradients(task)
    scores = contestants(task, device, arguments)
    wrong = errors_over_eager(problem, scores)
    right = {name: score for name, score in scores.items() if wrong[name] <= WRONG}

    def entries(run: Callable[[Score], Tensor]) -> list[Contestant]:
        return [
            Contestant(
                name=name, run=lambda score=score: run(score), prepare=problem.clear_gradients
            )
            for name, score in right.items()
        ]

    forward = time_paired(entries(problem.forward), device, rounds=arguments.rounds)
    whole = forward
    if task != "gradient-free":
        whole = time_paired(entries(problem.run), device, rounds=arguments.rounds)
    peaks = {entry.name: peak_memory_mib(entry, device) for entry in entries(problem.run)}
    ceiling = gemm_tflops(problem, device, arguments.rounds)
    operations = 2 * problem.hidden.numel() * problem.weight.shape[0]
    for name, score in scores.items():
        row = {"task": task, "contestant": name, "error_over_eager": wrong[name]}
        if name in right:
            gemms = count_gemms(task, name, score)
            rate = (gemms or 0) * operations / whole[name].median_ms / 1e9
            row |= {
                "forward_ms": forward[name],
                "total_ms": whole[name],
                "speedup": whole[name].speedup_over(whole["eager"]),
                "gemms": gemms,
                "ceiling_share": rate / ceiling if gemms else None,
                "peak_mib": peaks[name],
            }
        yield row


def as_text(row: dict) -> dict[str, str]:
    """A row of the printed table."""
    if "total_ms" not in row:
        refused = f"wrong: {row['error_over_eager']:.1f}"
        blank = dict.fromkeys(("forward ms", "total ms", "× eager", "GEMMs", "ceiling", "MiB"), "–")
        return {"task": row["task"], "": row["contestant"], **blank, "error": refused}

    def optional(value: float | None, pattern: str) -> str:
        return "–" if value is None else pattern.format(value)

    return {
        "task": row["task"],
        "": row["contestant"],
        "forward ms": str(row["forward_ms"]),
        "total ms": str(row["total_ms"]),
        "× eager": f"{row['speedup']:.2f}",
        "GEMMs": optional(row["gemms"], "{:.1f}"),
        "ceiling": optional(row["ceiling_share"], "{:.0%}"),
        "MiB": optional(row["peak_mib"], "{:.0f}"),
        "error": f"{row['error_over_eager']:.2f}",
    }


def as_json(row: dict) -> dict:
    """A row of the result file."""
    return {
        name: list(value.samples_ms) if isinstance(value, Times) else value
        for name, value in row.items()
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--shape", action="append", help="tokens x width x vocabulary")
    parser.add_argument("--task", action="append", choices=TASKS)
    parser.add_argument("--rounds", type=int, default=20 if cuda else 7)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--tile-mib", action="append", type=int, help="also with tiles of this size in float32"
    )
    parser.add_argument("--output", type=Path, help="result file, JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    header = describe(device) | {"dtype": arguments.dtype, "rounds": arguments.rounds}
    print_header(header)
    results = []
    for text in arguments.shape or (CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES):
        tokens, width, vocabulary = (int(part) for part in text.split("x"))
        problem = Problem.make((tokens, width, vocabulary), device, dtype)
        print(f"\n{text} {arguments.dtype}\n")
        rows = []
        for task in arguments.task or TASKS:
            rows += measure(problem, task, device, arguments)
        print_table([as_text(row) for row in rows])
        results += [{"shape": [tokens, width, vocabulary]} | as_json(row) for row in rows]
    if arguments.output:
        write_result(arguments.output, header, results)


if __name__ == "__main__":
    main()
