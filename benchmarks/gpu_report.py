"""The table at the end of the GPU acceptance, on the terminal and as Markdown."""

import io
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any

from common import print_table
from gpu_goals import kernel_rows, profile_rows, proposed_dispatch, step_rows
from gpu_parts import PARTS, STAGES, Part
from gpu_results import FAILED, Results

from kto_kernels.linear_logps.plan import DISPATCH

COMMAND = "python -m benchmarks.gpu_acceptance --minutes 9 --output DIR"


def one_line(result: dict[str, Any]) -> str:
    """What became of a part."""
    text = result["status"]
    if "tests" in result:
        text += ": " + ", ".join(f"{n} {name}" for name, n in result["tests"].items() if n)
    if "reason" in result:
        text += f": {result['reason']}"
    return text if not result["seconds"] else f"{text} ({result['seconds']:.0f} s)"


def part_rows(results: Results, left: Sequence[Part]) -> Iterator[dict[str, str]]:
    """A row for each part that has a result or is left."""
    for part in PARTS:
        result = results.of(part)
        if result is None and part not in left:
            continue
        seconds = "" if result is None else f"{result['seconds']:.0f}"
        yield {
            "stage": f"{part.stage} {STAGES[part.stage]}",
            "part": part.name,
            "s": seconds,
            "result": "left for the next call"
            if result is None
            else one_line(result | {"seconds": 0}),
        }


def tables(results: Results, left: Sequence[Part]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """All tables that have rows, by title."""
    kernels = [row for _, rows in results.rows(3) for row in rows]
    found = {
        "Parts": list(part_rows(results, left)),
        "Kernels: our fastest beside the fastest peer, forward and backward": list(
            kernel_rows(kernels)
        ),
        "Steps": list(step_rows(results.rows(4))),
        "Profiles": list(profile_rows(results.rows(6))),
    }
    yield from ((title, rows) for title, rows in found.items() if rows)


def dispatch_lines(results: Results) -> list[str]:
    """Proposed rows of `plan.DISPATCH`."""
    kernels = [row for _, rows in results.rows(3) for row in rows]
    return proposed_dispatch(kernels, results.page, tile_mib=DISPATCH[-1].tile_mib)


def failures(results: Results) -> Iterator[tuple[str, str]]:
    """Failed parts and tests, with their tracebacks or the end of their output."""
    for part in PARTS:
        result = results.of(part)
        if result is None or result["status"] != FAILED:
            continue
        failed_tests = result.get("failures", ())
        for failure in failed_tests:
            yield failure["test"], failure["traceback"]
        if not failed_tests:
            yield f"{part.stage} {part.name}", result.get("output", result.get("reason", ""))


def print_report(results: Results, left: Sequence[Part]) -> None:
    """The tables, proposed dispatch rows, and the last line of each failure."""
    for title, rows in tables(results, left):
        if title == "Profiles":
            continue  # long; in the Markdown file
        print(f"\n{title}\n")
        print_table(rows)
    for line in dispatch_lines(results):
        print(f"plan.DISPATCH: {line}")
    for name, text in failures(results):
        print(f"\nfailed: {name}\n  {(text.strip().splitlines() or ['?'])[-1]}")
    if left:
        print(f"\n{len(left)} parts are left: run the same command again")


def markdown(results: Results, left: Sequence[Part]) -> str:
    """The same with versions, commands and tracebacks."""
    lines = [f"# GPU acceptance: {results.device}", "", f"`{COMMAND}`", ""]
    lines += [
        f"- {name}: {value}"
        for name, value in ({"commit": results.commit} | results.header).items()
    ]
    for title, rows in tables(results, left):
        lines += ["", f"## {title}", "", _table(rows)]
    if proposed := dispatch_lines(results):
        lines += ["", "## Proposed rows of `plan.DISPATCH`", "", "```python", *proposed, "```"]
    lines += ["", "## Commands", ""]
    for part in PARTS:
        result = results.of(part)
        if result is not None and "command" in result:
            lines.append(f"- {part.stage} {part.name}: `{result['command']}`")
    for name, text in failures(results):
        lines += ["", f"## Failed: {name}", "", "```", text.strip(), "```"]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[dict[str, str]]) -> str:
    """`print_table` as text; a line break or a bar in a cell would end it."""
    cells = [
        {name: " ".join(text.split()).replace("|", "\\|") for name, text in row.items()}
        for row in rows
    ]
    with redirect_stdout(io.StringIO()) as printed:
        print_table(cells)
    return printed.getvalue().rstrip()
