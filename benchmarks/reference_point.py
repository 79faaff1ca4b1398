"""How well z0 is known, and what that does to training.

    python benchmarks/reference_point.py                          # on a model made on the spot
    python benchmarks/reference_point.py --model DIR --data FILE… --learning-rate 1e-6 --beta 0.1

z0 is the mean of mismatched log-ratios, log π_θ(y'|x) − log π_ref(y'|x), clamped at 0. We take it
over the whole batch. TRL takes it over each micro-batch, which with `per_device_train_batch_size` 2
is two of them, however many micro-batches are accumulated.

First: a model is trained for a while, and z0 estimated from many batches of each size, drawn as
the sampler draws them. Shown are the standard error of the mean before and after its clamp, what
the former were if a batch's members were independent (σ/√n), and the clamp's bias,
E[max(0, mean)] − max(0, E).

Second: training with z0 over the whole batch and with z0 over each micro-batch of 2, everything
else equal: start, records, partners, order, steps. The second is TRL's step made with our parts;
`tests/parity` holds it against TRL's own. Losses and margins are taken alike of both, with z0 over
the whole batch. A seed draws the held-out records, partners and order; differences are taken seed
by seed. They say how runs on this model and these records scatter, and nothing of others.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import describe, print_header, write_result
from estimator_comparison import compare
from estimator_runs import (
    CONTESTANTS,
    MICRO_BATCH_SIZE,
    Settings,
    set_up_process,
    train,
    trained_log_ratios,
)
from estimator_start import make_start
from estimator_statistics import MOST_PAIRS, Estimate, batch_means, estimate
from estimator_tables import print_comparison, print_estimates

from kto_lightning.batches.sampler import epoch_order

NUM_PAIRINGS = 4
"""Ways to pair the examples, which give so many mismatched log-ratios of each."""
NUM_EPOCHS = 100
"""Orders in which batches are drawn from each pairing."""


def estimates(settings: Settings, sizes: list[int], seed: int) -> dict[str, Any]:
    """The first part on one data set. A size that would leave fewer than 4 batches is left out."""
    found = trained_log_ratios(settings, seed=seed, num_pairings=NUM_PAIRINGS)
    values = np.concatenate([log_ratios for _, log_ratios in found])
    rows: list[Estimate] = []
    for size in (size for size in sizes if 4 * size <= len(found[0][1])):
        means = [
            batch_means(
                log_ratios, epoch_order(pairing, shuffle=True, seed=seed, epoch=epoch), size
            )
            for pairing, log_ratios in found
            for epoch in range(NUM_EPOCHS)
        ]
        row = estimate(
            np.concatenate(means),
            size=size,
            sigma=float(values.std(ddof=1)),
            truth=float(values.mean()),
        )
        rows.append(row)
    return {
        "log_ratios": len(values),
        "mean": float(values.mean()),
        "sigma": float(values.std(ddof=1)),
        "rows": rows,
    }


@contextmanager
def runner(processes: int) -> Iterator[Any]:
    """`map`, over processes where there are to be several."""
    if processes == 1:
        yield map
        return
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=set_up_process
    ) as pool:
        yield pool.map


def measure(
    name: str, settings: Settings, options: argparse.Namespace, map_jobs: Any
) -> dict[str, Any]:
    """Both parts on one data set, printed as they come."""
    first = estimates(settings, options.sizes, options.first_seed)
    print_estimates(name, settings.steps, first)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    comparisons = []
    for accumulation in options.accumulation:
        batch_size = accumulation * MICRO_BATCH_SIZE
        shared = replace(settings, batch_size=batch_size, held_out=options.held_out)
        jobs = [(who, shared, seed) for seed in seeds for who in CONTESTANTS]
        done = list(zip(jobs, map_jobs(train, jobs), strict=True))
        runs = {who: [run for job, run in done if job[0] == who] for who in CONTESTANTS}
        result = {"batch_size": batch_size, "accumulation": accumulation, **compare(runs)}
        title = (
            f"{name}, batches of {batch_size} ({accumulation} micro-batches of "
            f"{MICRO_BATCH_SIZE}), {settings.steps} steps, seeds {seeds[0]} to {seeds[-1]}"
        )
        print_comparison(title, result)
        comparisons.append(result)
    return {"data": name, "estimates": first, "comparisons": comparisons}


def plain(value: Any) -> Any:
    """Dataclasses as dictionaries, however deep, for JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model directory; made where not given")
    parser.add_argument("--data", nargs="+", type=Path, help="files of records for --model")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--accumulation", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--steps", type=int, default=48, help="of every run")
    parser.add_argument("--seeds", type=int, default=6, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--held-out", type=float, default=0.2, help="share of the records")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--json", type=Path, help="result file")
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.data is None):
        parser.error("--model and --data go together")
    if not 2 <= options.seeds <= MOST_PAIRS:
        parser.error(f"--seeds must be 2 to {MOST_PAIRS}, got {options.seeds}")
    if options.steps < 2 or options.steps % 2:
        parser.error(f"--steps must be even, for a look half way, got {options.steps}")
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    for name in ("sizes", "accumulation"):
        if min(getattr(options, name)) < 1:
            parser.error(f"--{name} must be at least 1, got {min(getattr(options, name))}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    set_up_process()
    header = describe(torch.device("cpu")) | {
        "beta": options.beta,
        "learning_rate": options.learning_rate,
        "steps": options.steps,
        "seeds": list(range(options.first_seed, options.first_seed + options.seeds)),
    }
    print_header(header)
    results = []
    with tempfile.TemporaryDirectory() as directory, runner(options.processes) as map_jobs:
        if options.model is None:
            model, files = make_start(Path(directory), options.first_seed)
        else:
            model, files = options.model, {path.stem: path for path in options.data}
        for name, file in files.items():
            settings = Settings(
                model=model,
                train=file,
                batch_size=max(options.accumulation) * MICRO_BATCH_SIZE,
                steps=options.steps,
                beta=options.beta,
                learning_rate=options.learning_rate,
                max_length=options.max_length,
                held_out=None,
            )
            results.append(measure(name, settings, options, map_jobs))
    if options.json:
        write_result(options.json, header, [plain(result) for result in results])
    return 0


if __name__ == "__main__":
    sys.exit(main())
