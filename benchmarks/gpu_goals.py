"""Goals on a GPU, and the rows of the dispatch table that its measurements propose."""

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

CEILING = 0.85
"""Of the measured rate of a matrix product, from this width on."""
WIDE = 2048
SPEEDUP = 2.0
"""Times the examples per second of TRL's KTO."""
OVER_SFT = {"computed": 1.9, "cached": 1.3}
"""At most, times the step time of TRL's SFT over the same tokens, by reference."""
OURS = "ours"

Row = dict[str, Any]


def _median(row: Row) -> float:
    return statistics.median(row["total_ms"])


def _tasks(rows: Iterable[Row]) -> dict[tuple[int, int, str], list[Row]]:
    """Rows with times, by width, vocabulary and task."""
    found: dict[tuple[int, int, str], list[Row]] = {}
    for row in rows:
        if "total_ms" in row:
            _, width, vocabulary = row["shape"]
            found.setdefault((width, vocabulary, row["task"]), []).append(row)
    return found


def _is_ours(row: Row) -> bool:
    return row["contestant"].startswith(OURS)


def kernel_rows(rows: Iterable[Row]) -> Iterator[dict[str, str]]:
    """Our fastest kernel of each head and task, beside the fastest peer."""
    for (width, vocabulary, task), contestants in _tasks(rows).items():
        mine = min((row for row in contestants if _is_ours(row)), key=_median, default=None)
        peer = min((row for row in contestants if not _is_ours(row)), key=_median, default=None)
        if mine is None or peer is None:
            continue
        share = mine["ceiling_share"]
        reached = [_median(mine) < _median(peer)]
        reached += [share >= CEILING] if width >= WIDE and share is not None else []
        yield {
            "head": f"{width} x {vocabulary}",
            "task": task,
            "ours": f"{mine['contestant']}, {_median(mine):.2f} ms",
            "fastest peer": f"{peer['contestant']}, {_median(peer):.2f} ms",
            "of the ceiling": "–" if share is None else f"{share:.0%}",
            "goal": "reached" if all(reached) else "missed",
        }


def step_rows(named: Iterable[tuple[str, list[Row]]]) -> Iterator[dict[str, str]]:
    """Steps beside TRL's KTO and SFT."""
    for name, results in named:
        for result in results:
            limit = OVER_SFT[result["reference"]]
            reached = result["speedup"] >= SPEEDUP and result["time_over_sft"] <= limit
            rows = result["rows"]
            yield {
                "steps": name,
                "examples/s": f"{rows[OURS]['examples_per_second']:.2f}",
                "MFU": f"{rows[OURS]['mfu']:.0%}" if "mfu" in rows[OURS] else "–",
                "peak MiB": f"{rows[OURS]['peak_mib']:.0f}",
                f"x TRL's KTO (goal {SPEEDUP:g})": f"{result['speedup']:.2f}",
                "x SFT's time (goal)": f"{result['time_over_sft']:.2f} ({limit:g})",
                "goal": "reached" if reached else "missed",
            }


def profile_rows(named: Iterable[tuple[str, list[Row]]]) -> Iterator[dict[str, str]]:
    """The largest operations of each profiled step."""
    for name, results in named:
        for result in results:
            idle = result.get("idle_share")
            for row in result["largest"]:
                yield {
                    "step": name,
                    "ms": f"{result['step_ms']:.1f}",
                    "idle": "–" if idle is None else f"{idle:.0%}",
                    "operation": row["operation"][:70].replace("|", "/"),
                    "operation's ms": f"{row['ms']:.2f}",
                    "share": f"{row['share']:.1%}",
                }


def proposed_dispatch(rows: Iterable[Row], measured: str, *, tile_mib: int) -> list[str]:
    """Lines of `plan.DISPATCH`: whether the fused kernel was faster without a gradient, by width.

    A width at which vocabularies disagree gets tiles, which also serve every other mode.

    Args:
        rows: results of `linear_logps.py`.
        measured: name of the file with these results.
        tile_mib: the size that they were measured with.
    """
    wins: dict[int, list[bool]] = {}
    for (width, _, task), contestants in _tasks(rows).items():
        times = {row["contestant"]: _median(row) for row in contestants}
        if task == "gradient-free" and {OURS, "ours, fused"} <= times.keys():
            wins.setdefault(width, []).append(times["ours, fused"] < times[OURS])
    choices = [(width, all(wins[width])) for width in sorted(wins)]
    lines = []
    for index, (width, fused) in enumerate(choices):
        is_last = index == len(choices) - 1
        if not is_last and choices[index + 1][1] == fused:
            continue  # the next row covers it
        most = None if is_last else width
        lines.append(
            f"Dispatch(max_width={most}, fused={fused}, tile_mib={tile_mib}, "
            f'measured="{measured}"),'
        )
    return lines
