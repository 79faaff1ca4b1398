"""`FILE.rewards.jsonl`: what the policy says of every record of a file."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kto_lightning.batches.types import Prediction
from kto_lightning.data.examples import ExampleSet
from kto_lightning.data.sources import expand
from kto_lightning.errors import DataError

SUFFIX = ".rewards.jsonl"


def without_rewards(source: str | list[str]) -> tuple[list[str], list[str]]:
    """The files of a source but for those that `write_rewards` wrote beside them, and these.

    A pattern such as `*.jsonl` finds both. Whoever names such a file, or a pattern that ends like
    one, gets it.

    Raises:
        DataError: as `sources.expand`, or if a pattern finds nothing else.
    """
    kept: list[str] = []
    left_out: list[str] = []
    for item in [source] if isinstance(source, str) else source:
        names = expand(item)
        found_by_chance = names != [item] and not item.endswith(SUFFIX)
        rewards = [name for name in names if found_by_chance and name.endswith(SUFFIX)]
        kept += [name for name in names if name not in rewards]
        left_out += rewards
    if not kept:
        raise DataError(
            f"'{source}' finds only rewards that `predict` wrote: {', '.join(left_out[:3])}. "
            "Check the pattern, or name the files."
        )
    return kept, left_out


def write_rewards(
    examples: ExampleSet, predictions: Iterable[Prediction], output_dir: str | Path
) -> list[Path]:
    """Write a line per record, in the order of its file, beside the file.

    A record that was dropped (its prompt fills `max_length`) has a null reward. Records that came
    from a hub go into `output_dir`.

    Returns:
        The files written.
    """
    by_row = {int(examples.rows[p.index]): p for p in predictions}
    lines: dict[str, list[str]] = {}
    for row, record in enumerate(examples.records):
        assert isinstance(record, dict)
        lines.setdefault(record["file"], []).append(_line(record, by_row.get(row)))
    written = []
    for name, texts in lines.items():
        beside = Path(f"{name}{SUFFIX}")
        path = beside if Path(name).exists() else Path(output_dir) / beside.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(texts), encoding="utf-8")
        written.append(path)
    return written


def _line(record: dict[str, Any], prediction: Prediction | None) -> str:
    known = {
        "line": record["line"],
        "label": record["desirable"],
        "reward": None if prediction is None else prediction.reward,
        "policy_logps": None if prediction is None else prediction.policy_logps,
        "reference_logps": None if prediction is None else prediction.reference_logps,
    }
    return json.dumps(known) + "\n"
