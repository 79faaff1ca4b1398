"""Operations of the steps of several families, by the route that each takes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from architectures import make_family
from common import print_table
from counted_floor import CountedFloor
from inputs import save_tokenizer, write_jsonl
from step_runs import Inputs, Settings, add_ratios, row_of, run_all_ours
from transformers import AutoModelForCausalLM

from kto_lightning.models.routes.choose import explain_obstacles

ALLOWED_OVER_FLOOR = {"packed": 1.03, "cached": 1.1}
"""Of a floor whose decoder pays for padding too. The padded route has no limit: what it pays is the
reason for the others."""


def measure_family(
    family: str, records: list[dict[str, Any]], settings: Settings, directory: Path
) -> dict[str, Any]:
    """The result for one family on one data set. All records train the tokenizer."""
    tokens = save_tokenizer(directory / "model", records, settings.shape.vocabulary)
    make_family(family, settings.shape, **tokens).save_pretrained(directory / "model")
    train = write_jsonl(directory / "train.jsonl", records[: settings.num_records])
    inputs = Inputs(model=directory / "model", train=train)
    floor = CountedFloor(AutoModelForCausalLM.from_pretrained(inputs.model))
    runs = run_all_ours(inputs, settings, directory)
    rows = [row_of(kind, run, floor) for kind, run in runs.items()]
    for row, run in zip(rows, runs.values(), strict=True):
        cached = row["reference"] == "cached"
        decoder = sum(floor(step, cached=cached, head=False) for step in run.steps)
        head = row["floor_operations"] - decoder
        row["over_padded_floor"] = row["operations"] / (decoder * row["positions_per_token"] + head)
    first = runs["one", "computed"]
    sft, sft_completions = add_ratios(rows, inputs, first.steps)
    assert first.policy is not None
    return {
        "family": family,
        "route": first.policy.route,
        "reason": explain_obstacles(first.route_obstacles),
        "sft_operations": sft,
        "sft_completions_operations": sft_completions,
        "rows": rows,
    }


def print_families(data: str, results: list[dict[str, Any]]) -> None:
    """The table of one data set, and why families do not take the faster routes."""
    print(f"\n{data}\n")
    print_table(
        [
            {
                "family": result["family"],
                "route": result["route"],
                "micro-batches": row["micro_batches"],
                "reference": row["reference"],
                "× SFT": f"{row['over_sft']:.3f}",
                "× SFT, completions": f"{row['over_sft_completions']:.3f}",
                "over floor": f"{row['over_floor']:.4f}",
                "positions per token": f"{row['positions_per_token']:.4f}",
                "with padding": f"{row['over_padded_floor']:.4f}",
            }
            for result in results
            for row in result["rows"]
        ]
    )
    for result in results:
        if result["reason"]:
            print(f"\n{result['family']}: {result['route']}; {result['reason']}")


def excesses(results: list[dict[str, Any]]) -> Iterator[str]:
    """What costs more than it may."""
    for result in results:
        allowed = ALLOWED_OVER_FLOOR.get(result["route"])
        worst = max(row["over_padded_floor"] for row in result["rows"])
        if allowed is not None and worst > allowed:
            yield (
                f"{result['family']} ({result['route']}): a step costs {worst:.3f} of its floor "
                f"with padding, more than {allowed}"
            )
