"""Rewards files: `predict` writes `FILE.rewards.jsonl` with a reward for every record of FILE."""

import errno
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from kto_lightning.batches.types import Prediction
from kto_lightning.data.examples import ExampleSet
from kto_lightning.data.sources import Source, SourceLike, expand, items_of, names_of
from kto_lightning.errors import DataError, KTOError
from kto_lightning.files import write_whole

SUFFIX = ".rewards.jsonl"


def exclude_rewards_files(source: SourceLike) -> tuple[list[Source], list[str]]:
    """Separate a source's files from the rewards files that `write_rewards` left beside them.

    A pattern such as `*.jsonl` matches both. A rewards file is kept if it is named itself, or by a
    pattern that ends in `.rewards.jsonl`.

    Returns:
        The sources to read, and the rewards files excluded.

    Raises:
        DataError: as `sources.expand`, or if a pattern matches only rewards files.
    """
    kept: list = []
    excluded: list[str] = []
    for item in items_of(source):
        if not isinstance(item, str):
            kept.append(item)
            continue
        found = expand(item)
        is_itself = [file.name for file in found] == [os.path.expanduser(item)]
        by_pattern = not is_itself and not item.endswith(SUFFIX)
        rewards = [file for file in found if by_pattern and file.name.endswith(SUFFIX)]
        kept += [file for file in found if file not in rewards]
        excluded += [file.name for file in rewards]
    if not kept:
        raise DataError(
            f"'{names_of(source)}' matches only rewards that `predict` wrote: "
            f"{', '.join(excluded[:3])}. Check the pattern, or name the files."
        )
    return expand(kept), excluded


def rewards_paths(examples: ExampleSet, output_dir: str | Path | None) -> dict[str, Path]:
    """Where the rewards of each file of records go, by the file's name.

    Args:
        examples: the records.
        output_dir: None: beside each file; of what is no file, in `output`.

    Raises:
        DataError: if two files of one name would share a rewards file.
    """
    paths: dict[str, Path] = {}
    for name in dict.fromkeys(examples.records["file"]):
        is_file = Path(name).exists()
        # A hub data set: owner/name/config:split
        plain = name if is_file else re.sub("[/:]", "-", name.split("/", 1)[-1])
        inside = Path(output_dir or "output") / f"{Path(plain).name}{SUFFIX}"
        path = Path(f"{name}{SUFFIX}") if output_dir is None and is_file else inside
        taken = [other for other, used in paths.items() if used == path]
        if taken:
            raise DataError(
                f"the rewards of {taken[0]} and of {name} would both be {path}. Reward the files "
                "one by one, or omit --output_dir: then each is written beside its file."
            )
        paths[name] = path
    return paths


def check_writable(paths: Iterable[Path]) -> None:
    """Check that files can be written, before anything is computed for them.

    Raises:
        KTOError: with the first that cannot.
    """
    for path in paths:
        part = path.with_name(f".{path.name}.part")  # as `write_whole`
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            part.touch()
            part.unlink()
        except OSError as error:
            raise KTOError(
                f"{path} cannot be written: {error.strerror or error}. Choose another place for "
                "the rewards with --output_dir."
            ) from error


def write_rewards(
    examples: ExampleSet, predictions: Iterable[Prediction], output_dir: str | Path | None
) -> list[Path]:
    """Write one line per record, in the order of its file, to the places of `rewards_paths`.

    A dropped record (its prompt fills `max_length`) has a null reward, an unlabelled one a null
    label.

    Returns:
        The files written.

    Raises:
        KTOError: if one cannot be written.
    """
    by_row = {int(examples.rows[p.index]): p for p in predictions}
    lines: dict[str, list[str]] = {}
    for row, record in enumerate(examples.records):
        assert isinstance(record, dict)
        lines.setdefault(record["file"], []).append(_line(record, by_row.get(row)))
    paths = rewards_paths(examples, output_dir)
    for name, texts in lines.items():
        write_whole(paths[name], "".join(texts), what="the rewards")
    return list(paths.values())


def _line(record: dict[str, object], prediction: Prediction | None) -> str:
    content = {
        "line": record["line"],
        "label": record["desirable"],
        "reward": None if prediction is None else prediction.reward,
        "policy_logps": None if prediction is None else prediction.policy_logps,
        "reference_logps": None if prediction is None else prediction.reference_logps,
    }
    return json.dumps(content) + "\n"
