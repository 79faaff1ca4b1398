"""Shared parts of the benchmarks: device and versions, paired timing, peak memory, tables.

Contestants are timed in turns: one run of each per round, and each round starts with another one,
so that other load or a warming machine affects all of them. Speedups are medians of the rounds'
ratios.
"""

import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from private_memory import trim

MIB = 2**20
PACKAGES = ("torch", "triton", "lightning", "transformers", "trl", "peft", "liger-kernel")
CLEAR_REFERENCES = Path("/proc/self/clear_refs")


def _nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """Code to be timed."""

    name: str
    run: Callable[[], object]
    """One run; its result is ignored."""
    prepare: Callable[[], None] = _nothing
    """Called before each run and not timed, for example to clear gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """A contestant's times, one per round, in milliseconds."""

    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    def quantile_ms(self, share: float) -> float:
        """The quantile `share` of the times, interpolated."""
        ordered = sorted(self.samples_ms)
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    def speedup_over(self, other: "Times") -> float:
        """How many times faster than `other`: the median of the rounds' ratios."""
        pairs = zip(other.samples_ms, self.samples_ms, strict=True)
        return statistics.median(theirs / mine for theirs, mine in pairs)

    def __str__(self) -> str:
        low, high = self.quantile_ms(0.1), self.quantile_ms(0.9)
        return f"{self.median_ms:.2f} [{low:.2f}, {high:.2f}]"


def describe(device: torch.device) -> dict[str, Any]:
    """Device and versions, for the header of a table and of a result file."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
    else:
        found["device"] = _cpu_name()
        found["capability"] = torch.backends.cpu.get_cpu_capability()
        found["threads"] = torch.get_num_threads()
        found["load_average"] = [round(load, 1) for load in os.getloadavg()]
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def print_header(description: dict[str, Any]) -> None:
    """One comment line per entry."""
    for name, value in description.items():
        print(f"# {name}: {value}")


def time_paired(
    contestants: Sequence[Contestant], device: torch.device, *, rounds: int, warmup: int = 2
) -> dict[str, Times]:
    """The times of all contestants over the same rounds, by name."""
    for contestant in contestants:
        for _ in range(warmup):
            contestant.prepare()
            contestant.run()
    samples: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for number in range(rounds):
        first = number % len(contestants)
        for contestant in (*contestants[first:], *contestants[:first]):
            contestant.prepare()
            samples[contestant.name].append(_time_once(contestant.run, device))
    return {name: Times(samples_ms=tuple(times)) for name, times in samples.items()}


def _time_once(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def peak_memory_mib(contestant: Contestant, device: torch.device) -> float | None:
    """Peak memory of one run, beyond that in use before it; None if it cannot be measured."""
    contestant.prepare()
    gc.collect()
    before = reset_peak_memory(device)
    contestant.run()
    taken = used_memory_mib(device, peak=True) - before
    return None if math.isnan(taken) else taken


def reset_peak_memory(device: torch.device) -> float:
    """Reset the peak; returns the memory in use now, in MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        trim()
        with suppress(OSError):
            CLEAR_REFERENCES.write_text("5")
    return used_memory_mib(device)


def used_memory_mib(device: torch.device, *, peak: bool = False) -> float:
    """Memory in use, or its peak since `reset_peak_memory`; NaN if it cannot be measured.

    On CUDA the memory allocated by PyTorch, on a CPU the process's resident memory (Linux only).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        used = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return used(device) / 2**20
    try:
        return _resident_kib("VmHWM" if peak else "VmRSS") / 2**10
    except OSError:
        return math.nan


def _resident_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no field {field}")


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """Rows with the same keys as an aligned Markdown table."""
    names = list(rows[0])
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    print("| " + " | ".join(name.ljust(widths[name]) for name in names) + " |")
    print("|" + "|".join("-" * (widths[name] + 2) for name in names) + "|")
    for row in rows:
        print("| " + " | ".join(row[name].ljust(widths[name]) for name in names) + " |")


def write_result(path: Path, description: dict[str, Any], results: Sequence[dict]) -> None:
    """A result file: header and rows, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"header": description, "results": list(results)}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
