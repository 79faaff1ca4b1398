"""Digests of the records that a run is trained on, so that it is resumed on the same."""

from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from pyarrow.compute import call_function

from kto_lightning.data.dataset import FORMAT_VERSION
from kto_lightning.data.examples import ExampleSet
from kto_lightning.errors import ConfigError

_PARTS = {
    "records": "their prompts, completions or order",
    "labels": "their labels",
    "weights": "their weights",
    "completion_ids": "the token ids of their completions (--data.tokenizer, the chat template)",
}
"""What a digest is of. Token ids of prompts are not compared: a chat template may write today's
date into them."""


def record_digests(examples: ExampleSet) -> dict[str, Any]:
    """Digests of the examples in their order, by part, with their number and the version of the
    form that they are of; records may have moved to other files."""
    rows = np.sort(examples.rows)
    order = sha256(np.argsort(np.argsort(examples.rows)).astype("<i8").tobytes()).digest()
    texts, ids = sha256(order), sha256(order)
    for chunk in _chosen(examples.records.data.column("record"), rows):
        _update(texts, call_function("binary_length", [chunk]), chunk.buffers()[2])
    for chunk in _chosen(examples.tokenized.data.column("completion_ids"), rows):
        _update(
            ids,
            call_function("list_value_length", [chunk]),
            chunk.flatten().to_numpy().astype("<i4"),
        )
    return {
        "version": FORMAT_VERSION,
        "number": len(examples),
        "records": texts.hexdigest(),
        "labels": sha256(examples.desirable.tobytes()).hexdigest(),
        "weights": sha256(examples.weights.astype("<f4").tobytes()).hexdigest(),
        "completion_ids": ids.hexdigest(),
    }


def _chosen(column: pa.ChunkedArray, rows: Int64[np.ndarray, " rows"]) -> Iterator[Any]:
    """Rows of a column, ascending, chunk by chunk: a copy of one chunk at a time."""
    start = 0
    for chunk in column.chunks:
        first, last = np.searchsorted(rows, [start, start + len(chunk)])
        if last > first:
            yield chunk.take(pa.array(rows[first:last] - start))
        start += len(chunk)


def _update(digest: Any, lengths: Any, values: Any) -> None:
    """Add values, and the lengths that tell where one ends, whatever the chunks are."""
    numbers = lengths.to_numpy().astype("<i8")
    digest.update(numbers.tobytes())
    if isinstance(values, np.ndarray):
        digest.update(values.tobytes())
    elif values is not None:
        digest.update(memoryview(values)[: int(numbers.sum())])


def check_same_records(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a run is resumed on the records of the checkpoint.

    Args:
        then: `record_digests` of the checkpoint. Without a part, or of another version of the
            form, it is not compared.
        now: of this run.

    Raises:
        ConfigError: with what differs.
    """
    advice = (
        "Give the same --data.train and --data.validation as then, or start a new run from the "
        "exported model."
    )
    if then.get("number", now["number"]) != now["number"]:
        raise ConfigError(
            f"the checkpoint's run was trained on {then['number']} records, and now there are "
            f"{now['number']}: some would be seen twice and others never. {advice} Another "
            "--data.max_length may drop other records."
        )
    if then.get("version") != now["version"]:
        return
    wrong = [words for part, words in _PARTS.items() if then.get(part, now[part]) != now[part]]
    if wrong:
        raise ConfigError(
            "the records are not those that the checkpoint's run was trained on. What differs: "
            f"{'; '.join(wrong)}. {advice}"
        )
