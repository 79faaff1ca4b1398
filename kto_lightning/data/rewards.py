"""Rewards files: `predict` writes `FILE.rewards.jsonl` with a reward for every record of FILE."""

import json
from collections.abc import Iterable
from pathlib import Path

from kto_lightning.batches.types import Prediction
from kto_lightning.data.examples import ExampleSet
from kto_lightning.data.sources import expand
from kto_lightning.errors import DataError

SUFFIX = ".rewards.jsonl"


def exclude_rewards_files(source: str | list[str]) -> tuple[list[str], list[str]]:
    """Separate a source's files from the rewards files that `write_rewards` left beside them.

    A pattern such as `*.jsonl` matches both. A rewards file is kept if it is named itself, or by a
    pattern that ends in `.rewards.jsonl`.

    Returns:
        The files to read, and the rewards files excluded.

    Raises:
        DataError: as `sources.expand`, or if a pattern matches only rewards files.
    """
    kept: list[str] = []
    excluded: list[str] = []
    for item in [source] if isinstance(source, str) else source:
        names = expand(item)
        by_pattern = names != [item] and not item.endswith(SUFFIX)
        rewards = [name for name in names if by_pattern and name.endswith(SUFFIX)]
        kept += [name for name in names if name not in rewards]
        excluded += rewards
    if not kept:
        raise DataError(
            f"'{source}' matches only rewards that `predict` wrote: {', '.join(excluded[:3])}. "
            "Check the pattern, or name the files."
        )
    return kept, excluded


def write_rewards(
    examples: ExampleSet, predictions: Iterable[Prediction], output_dir: str | Path
) -> list[Path]:
    """Write one line per record, in the order of its file, to a file beside it.

    A dropped record (its prompt fills `max_length`) has a null reward. Rewards of a hub data set
    are written to `output_dir`.

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


def _line(record: dict[str, object], prediction: Prediction | None) -> str:
    content = {
        "line": record["line"],
        "label": record["desirable"],
        "reward": None if prediction is None else prediction.reward,
        "policy_logps": None if prediction is None else prediction.policy_logps,
        "reference_logps": None if prediction is None else prediction.reference_logps,
    }
    return json.dumps(content) + "\n"
