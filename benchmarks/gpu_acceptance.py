"""Everything that a GPU has to prove, in parts that fit into the minutes there are.

    python -m benchmarks.gpu_acceptance --minutes 9 --output output/gpu     # or: make gpu

Stages, in this order: does it run (a canary for each path, against float64 or a CPU), does a step
wait for the device, kernels beside their peers, steps beside TRL's, quality on a real model, and a
profile. Each part runs in a process of its own; its result is kept before the next begins, by
commit and device, so that the same command goes on where it stopped. A part that fails keeps its
traceback, and the next ones run; a part that no longer fits into the minutes is left for the next
call. The table at the end is also written as `<device>_<date>.md`.

Without a GPU what needs one is skipped, and the canaries run on the CPU, which tests the tests.
Exit status 1: a part has failed, now or in an earlier call for this commit.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# However it is started, and with nothing of ours installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from common import describe, print_header
from gpu_parts import PARTS, STAGES, Part
from gpu_report import markdown, one_line, print_report
from gpu_results import FAILED, SKIPPED, Results, revision
from gpu_running import Place, reason_to_skip, run_part

WHOLE_CALL = 0.9
"""A part that had this share of a call's minutes and did not end has failed."""


def run_parts(
    parts: Sequence[Part],
    results: Results,
    *,
    run: Callable[[Part, float], dict[str, Any] | None],
    reason_to_skip: Callable[[Part], str | None],
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[Part]:
    """Run what has no result yet, as long as it fits; the parts that are left.

    Args:
        run: runs a part with a limit in seconds; None: it did not end within it.
        reason_to_skip: why a part cannot run here; None: it can.
        seconds: of this call.
        clock: seconds that have passed since some moment.
    """
    until, left = clock() + seconds, []
    for part in parts:
        if results.of(part) is not None:
            continue
        if (reason := reason_to_skip(part)) is not None:
            results.add(part, {"status": SKIPPED, "reason": reason, "seconds": 0.0})
            continue
        remaining = until - clock()
        if remaining < min(part.seconds, WHOLE_CALL * seconds):
            left.append(part)
            continue
        print(f"{part.stage} {part.name} …", flush=True)
        result = run(part, remaining)
        if result is None and remaining >= WHOLE_CALL * seconds and not part.resumes:
            reason = f"did not end within the {remaining:.0f} s of a whole call"
            result = {"status": FAILED, "reason": reason, "seconds": remaining}
        if result is None:
            left.append(part)
            print("  its time was up", flush=True)
            continue
        results.add(part, result)
        print(f"  {one_line(result)}", flush=True)
    return left


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="of this call")
    add("--output", type=Path, default=Path("output/gpu"), help="folder of the results")
    add("--stages", type=int, nargs="+", choices=STAGES, default=list(STAGES))
    add("--again", action="store_true", help="run again what has failed for this commit")
    add("--model", type=Path, help="a real model for stage 5; default: that of `make real`")
    add("--scratch", type=Path, help="folder of stage 5's models; default: below --output")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    on_gpu = torch.cuda.is_available()
    header = describe(torch.device("cuda" if on_gpu else "cpu"))
    results = Results(options.output, revision(), header)
    parts = [part for part in PARTS if part.stage in options.stages]
    if options.again:
        results.forget(part for part in parts if _failed(results, part))
    print_header({"commit": results.commit} | header)
    scratch = options.scratch or options.output / "scratch"
    place = Place(on_gpu=on_gpu, scratch=scratch.resolve(), model=options.model)
    left = run_parts(
        parts,
        results,
        run=lambda part, seconds: run_part(part, place, seconds),
        reason_to_skip=lambda part: reason_to_skip(part, place),
        seconds=60 * options.minutes,
    )
    print_report(results, left)
    (options.output / results.page).write_text(markdown(results, left), encoding="utf-8")
    return int(any(_failed(results, part) for part in parts))


def _failed(results: Results, part: Part) -> bool:
    result = results.of(part)
    return result is not None and result["status"] == FAILED


if __name__ == "__main__":
    sys.exit(main())
