"""Operations of a training step, relative to a supervised fine-tuning step on the same tokens.

    python benchmarks/step_cost.py                                   # on generated records
    python benchmarks/step_cost.py --data feedback.jsonl --json benchmarks/results/step_cost.json

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
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import describe, print_header, print_table, write_result
from inputs import made_records, read_jsonl, save_model, write_jsonl
from silence import quiet
from step_floor import UnitCosts, floor, mismatched_lengths
from step_runs import Inputs, Settings, run_ours, run_trl, sft_cost
from transformers import AutoModelForCausalLM

from kto_lightning.batches.types import StepBatch

ALLOWED_OVER_FLOOR = 1.03
CUTS = 3
"""For several micro-batches: the tokens of the largest step over `--data.max_tokens`."""
MADE = {"made, long prompts": 0.5, "made, short prompts": 0.05}
"""Prompt shares of the generated records."""


def measure_ours(
    inputs: Inputs, settings: Settings, directory: Path
) -> tuple[list[dict[str, Any]], list[StepBatch]]:
    """Our rows, not yet divided by SFT's operations, and the steps with one micro-batch each."""
    model = AutoModelForCausalLM.from_pretrained(inputs.model)
    unit = UnitCosts.of(model)
    whole = settings.batch_size * settings.max_length
    first = run_ours(inputs, settings, max_tokens=whole)
    cut = max(1, max(step.num_tokens for step in first.steps) // CUTS)
    cache = directory / "cache"
    run_ours(inputs, settings, max_tokens=whole, cache=cache)
    runs = [
        ("one", "computed", first),
        ("one", "cached", run_ours(inputs, settings, max_tokens=whole, cache=cache)),
        ("several", "computed", run_ours(inputs, settings, max_tokens=cut)),
        ("several", "cached", run_ours(inputs, settings, max_tokens=cut, cache=cache)),
    ]
    rows = [
        {
            "contestant": "ours",
            "reference": reference,
            "micro_batches": name,
            "operations": sum(run.costs),
            "floor_operations": sum(
                floor(step, unit, cached=reference == "cached") for step in run.steps
            ),
        }
        for name, reference, run in runs
    ]
    return rows, first.steps


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
    rows, steps = measure_ours(inputs, settings, directory)
    num_tokens = sum(step.num_tokens for step in steps)
    rows += measure_trl(inputs, settings, directory, num_tokens)
    sft = sft_cost(inputs, steps, completions_only=False)
    sft_completions = sft_cost(inputs, steps, completions_only=True)
    for row in rows:
        row["over_sft"] = row["operations"] / sft
        row["over_sft_completions"] = row["operations"] / sft_completions
        if "floor_operations" in row:
            row["floor_over_sft"] = row["floor_operations"] / sft
            row["over_floor"] = row["operations"] / row["floor_operations"]
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
    results = []
    with tempfile.TemporaryDirectory() as directory, quiet():
        for number, (name, records) in enumerate(sources.items()):
            result = measure(name, records, settings, Path(directory) / str(number))
            print_result(result)
            results.append(result)
    if options.json:
        write_result(options.json, header, results)
    worst = max(row.get("over_floor", 0.0) for result in results for row in result["rows"])
    if worst > ALLOWED_OVER_FLOOR:
        print(f"\na step of ours costs {worst:.3f} of its floor, more than {ALLOWED_OVER_FLOOR}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
