"""`FILE.rewards.jsonl`: what the policy says of every record of a file."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kto_lightning.data.examples import ExampleSet
from kto_lightning.types import Prediction


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
        beside = Path(f"{name}.rewards.jsonl")
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
