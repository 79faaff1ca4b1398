"""Operations of a training step, relative to a supervised fine-tuning step on the same tokens.

    python benchmarks/step_cost.py                                   # on generated records
    python benchmarks/step_cost.py --data feedback.jsonl --json benchmarks/results/step_cost.json
    python benchmarks/step_cost.py --architecture gemma2 lfm2        # of other families; none: all

Records are `{prompt, completion, label}` as TRL takes them, text or chat. The unit is SFT: forward
and backward of cross entropy, one record at a time, so that nothing is padded. The model's own loss
runs its head on every position; `completions` runs it on the completions alone.

Contestants train for one epoch on the same records, with their default pairing and order (C'
depends on which completions are paired with which prompts), and their steps are counted:

- ours: `KTOModule` under a Trainer; with `cached`, its reference cache is full;
- TRL: `KTOTrainer` as it runs on a CPU, where its head scores every position;
- TRL, completions only: the same with the scoring that TRL uses where Triton is available.

Operations are those of matrix products, counted by PyTorch's dispatcher. Attention is counted as
the whole rectangle of queries and keys for all contestants, also where a causal mask hides half.

The floor is computed from the lengths of the counted steps (`step_floor.py`).

With `--architecture`, small models of these families take our steps, by the route that fits each,
and TRL takes none. Their floor is counted on single sequences (`counted_floor.py`). Positions that
ran, padding included, are related to the tokens of the floor; forward and backward count as three.
"With padding" relates a step to a floor whose decoder runs as many positions. Elementwise work,
such as most of a scan over states, is not counted. The exit status is 1 if a packed step is off its
floor, or if one on cached prompts costs more than 10% above its floor with padding.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from architectures import FAMILIES
from common import describe, print_header, print_table, write_result
from inputs import made_records, read_jsonl, save_model, write_jsonl
from silence import quiet
from step_families import excesses, measure_family, print_families
from step_floor import UnitCosts, floor, mismatched_lengths
from step_runs import Inputs, Settings, add_ratios, row_of, run_all_ours, run_trl
from transformers import AutoModelForCausalLM

from kto_lightning.models.routes.choose import explain_obstacles

ALLOWED_OVER_FLOOR = 1.03
MADE = {"made, long prompts": 0.5, "made, short prompts": 0.05}
"""Prompt shares of the generated records."""


def measure_trl(
    inputs: Inputs, settings: Settings, directory: Path, num_tokens: int
) -> Iterator[dict[str, Any]]:
    """TRL's rows.

    Raises:
        SystemExit: if TRL did not train on the same tokens.
    """
    for micro_batches in (1, max(1, settings.batch_size // 2)):
        for completions_only in (False, True):
            for precomputed in (False, True):
                trainer = run_trl(
                    inputs,
                    settings,
                    directory / "trl",
                    precomputed=precomputed,
                    micro_batches=micro_batches,
                    completions_only=completions_only,
                )
                if trainer.num_tokens != num_tokens:
                    raise SystemExit(
                        f"step_cost: TRL trained on {trainer.num_tokens} tokens and we on "
                        f"{num_tokens}. Give records that both keep."
                    )
                yield {
                    "contestant": "TRL, completions only" if completions_only else "TRL",
                    "reference": "cached" if precomputed else "computed",
                    "micro_batches": "one" if micro_batches == 1 else "several",
                    "operations": sum(trainer.costs),
                    "positions_per_token": trainer.num_positions / num_tokens,
                }


def measure(
    name: str, records: list[dict[str, Any]], settings: Settings, directory: Path
) -> dict[str, Any]:
    """The result for one data set, a row per contestant. All records train the tokenizer."""
    directory.mkdir()
    inputs = Inputs(
        model=save_model(directory / "model", records, settings.shape),
        train=write_jsonl(directory / "train.jsonl", records[: settings.num_records]),
    )
    unit = UnitCosts.of(AutoModelForCausalLM.from_pretrained(inputs.model))
    runs = run_all_ours(inputs, settings, directory)
    first = runs["one", "computed"]
    if first.route_obstacles:
        raise SystemExit(f"step_cost: {explain_obstacles(first.route_obstacles)}")
    rows = [row_of(kind, run, partial(floor, unit=unit)) for kind, run in runs.items()]
    steps = first.steps
    num_tokens = sum(step.num_tokens for step in steps)
    rows += measure_trl(inputs, settings, directory, num_tokens)
    sft, sft_completions = add_ratios(rows, inputs, steps)
    lengths = [mismatched_lengths(batch) for step in steps for batch in step.micro_batches]
    return {
        "data": name,
        "records": sum(step.num_examples for step in steps),
        "tokens": num_tokens,
        "prompt_tokens": sum(sum(prompts) for prompts, _, _ in lengths),
        "mismatched_tokens": sum(sum(others) for _, _, others in lengths),
        "sft_operations": sft,
        "sft_completions_operations": sft_completions,
        "rows": rows,
    }


def print_result(result: dict[str, Any]) -> None:
    """The table of one data set."""
    prompts, tokens = result["prompt_tokens"], result["tokens"]
    share = prompts / tokens
    print(
        f"\n{result['data']}: {result['records']} records, P {prompts:,}, C {tokens - prompts:,}, "
        f"C' {result['mismatched_tokens']:,} tokens (prompts {share:.0%}); "
        f"(4P+6C)/(3P+3C) = {(6 - 2 * share) / 3:.2f}, (3P+4C)/(3P+3C) = {(4 - share) / 3:.2f}\n"
    )

    def number(row: dict[str, Any], name: str, pattern: str) -> str:
        return pattern.format(row[name]) if name in row else "–"

    order = {"ours": 0, "TRL, completions only": 1, "TRL": 2}
    rows = sorted(
        result["rows"],
        key=lambda r: (r["micro_batches"], r["reference"] == "cached", order[r["contestant"]]),
    )
    print_table(
        [
            {
                "micro-batches": row["micro_batches"],
                "reference": row["reference"],
                "": row["contestant"],
                "× SFT": f"{row['over_sft']:.3f}",
                "× SFT, completions": f"{row['over_sft_completions']:.3f}",
                "floor × SFT": number(row, "floor_over_sft", "{:.3f}"),
                "over floor": number(row, "over_floor", "{:.4f}"),
                "positions per token": number(row, "positions_per_token", "{:.2f}"),
            }
            for row in rows
        ]
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", type=Path, default=[], help="files of records, jsonl")
    parser.add_argument(
        "--architecture",
        nargs="*",
        choices=FAMILIES,
        metavar="NAME",
        help=f"families to compare instead of contestants, of {', '.join(FAMILIES)}; none: all",
    )
    parser.add_argument("--records", type=int, default=32, help="train on the first N")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="result file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    settings = Settings(
        num_records=options.records, batch_size=options.batch_size, max_length=options.max_length
    )
    sources = {
        name: made_records(settings.num_records, words=settings.words, prompt_share=share)
        for name, share in MADE.items()
    }
    sources |= {path.stem: read_jsonl(path) for path in options.data}
    header = describe(torch.device("cpu"))
    print_header(header)
    families = None if options.architecture is None else options.architecture or list(FAMILIES)
    compare = compare_contestants if families is None else partial(compare_families, families)
    with tempfile.TemporaryDirectory() as directory, quiet():
        results, failures = compare(sources, settings, Path(directory))
    if options.json:
        write_result(options.json, header, results)
    for failure in failures:
        print(f"\n{failure}")
    return 1 if failures else 0


def compare_contestants(
    sources: dict[str, list[dict[str, Any]]], settings: Settings, directory: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """The results by data set, and what costs more than it may."""
    results = []
    for number, (name, records) in enumerate(sources.items()):
        results.append(measure(name, records, settings, directory / str(number)))
        print_result(results[-1])
    worst = max(row.get("over_floor", 0.0) for result in results for row in result["rows"])
    failure = f"a step of ours costs {worst:.3f} of its floor, more than {ALLOWED_OVER_FLOOR}"
    return results, [failure] if worst > ALLOWED_OVER_FLOOR else []


def compare_families(
    families: list[str],
    sources: dict[str, list[dict[str, Any]]],
    settings: Settings,
    directory: Path,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The results by data set and family, and what costs more than it may."""
    results = []
    for number, (name, records) in enumerate(sources.items()):
        measured = [
            measure_family(family, records, settings, directory / f"{number}_{family}")
            for family in families
        ]
        print_families(name, measured)
        results += [{"data": name} | result for result in measured]
    return results, list(excesses(results))


if __name__ == "__main__":
    sys.exit(main())
