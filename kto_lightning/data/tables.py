"""Rows of parquet files and hub data sets as JSON values; names stand for ClassLabel integers."""

import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from kto_lightning.data.rows import BadRecord, Row
from kto_lightning.data.strict_json import RecordError, quote
from kto_lightning.data.texts import MEDIA_KEYS, SYSTEM_KEYS
from kto_lightning.errors import DataError

COLUMNS = (
    *("prompt", "completion", "messages", "conversations", "chosen", "rejected"),
    *("label", "weight", "tools", "chat_template_kwargs"),
    *(*SYSTEM_KEYS, *MEDIA_KEYS),
)
"""The columns of a record; others are not read from a table that has what a record needs."""
NEEDED_COLUMNS = (
    *({"prompt", "completion", "label"}, {"messages", "label"}, {"conversations", "label"}),
    {"prompt", "chosen", "rejected"},
)
MEDIA_FEATURES = (datasets.Image, datasets.Audio, datasets.Video)


def record_columns(columns: list[str]) -> list[str]:
    """The columns of a record; all columns if one is missing, so that the error can name them."""
    if any(needed <= set(columns) for needed in NEEDED_COLUMNS):
        return [column for column in columns if column in COLUMNS]
    return columns


def parquet_rows(name: str, only: list[str] | None = None) -> Iterator[Row | BadRecord]:
    """The rows of a parquet file; `only`: these columns, else those of a record.

    Raises:
        DataError: if two columns have the same name, or the class names cannot be read.
    """
    with pq.ParquetFile(name) as table:
        schema = table.schema_arrow
        if len(set(schema.names)) < len(schema.names):
            raise DataError(f"{name}: a column is named twice: {', '.join(schema.names)}.")
        wanted = record_columns(schema.names)
        if only is not None:
            wanted = [column for column in wanted if column in only]
        classes = _class_names(name, schema)
        lines = itertools.count(1)
        for batch in table.iter_batches(batch_size=64, columns=wanted):
            for index in range(batch.num_rows):
                line = next(lines)
                try:
                    value = _name_classes(_row_values(batch, index), classes)
                except RecordError as problem:
                    yield BadRecord(file=name, line=line, message=str(problem))
                else:
                    yield Row(file=name, line=line, value=value, from_table=True)


def _row_values(batch: pa.RecordBatch, index: int) -> dict[str, object]:
    """The values of a row; None for one that Python cannot hold in a column that is not read.

    Raises:
        RecordError: for such a value in a column of a record.
    """
    values: dict[str, object] = {}
    for column, cells in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value = cells[index].as_py()
        except UnicodeDecodeError as error:
            raise RecordError("a text is not valid UTF-8. Fix or remove the row.") from error
        except Exception as error:  # dates out of range, unknown time zones: no common base class
            if column in COLUMNS:
                raise RecordError(
                    f"'{column}' holds a {cells.type} that cannot be read ({quote(str(error))}). "
                    "Fix or remove the row."
                ) from error
            value = None
        values[column] = _as_number(value) if isinstance(value, Decimal) else value
    return values


def _as_number(value: Decimal) -> object:
    if not value.is_finite():
        return str(value)
    return int(value) if value == value.to_integral_value() else float(value)


def _class_names(name: str, schema: pa.Schema) -> dict[str, list[str]]:
    """The names of the classes of each ClassLabel column, which `datasets` writes as metadata.

    Raises:
        DataError: if the metadata cannot be read: the integers would be taken for labels.
    """
    metadata = (schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return {}
    try:
        features = json.loads(metadata)["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{name}: the features that `datasets` wrote into it cannot be read "
            f"({type(error).__name__}), so it is unknown what the integers of a ClassLabel mean. "
            "Write the file again."
        ) from error


def _name_classes(value: dict[str, object], classes: Mapping[str, list[str]]) -> dict[str, object]:
    """Replace the integers of ClassLabel columns by the names of their classes; -1 is missing.

    Raises:
        RecordError: for an integer without a name.
    """
    for column, names in classes.items():
        index = value.get(column)
        if not isinstance(index, int) or isinstance(index, bool):
            continue
        if not -1 <= index < len(names):
            raise RecordError(
                f"'{column}' is {index}, but its classes are {quote(', '.join(names))}. Fix it."
            )
        value[column] = None if index == -1 else names[index]
    return value


def hub_dataset(name: str) -> datasets.Dataset:
    """A data set of the hub, downloaded or from the cache.

    Raises:
        DataError: if it cannot be downloaded.
    """
    with _hub_errors(name):
        dataset = datasets.load_dataset(name, split="train")
    assert isinstance(dataset, datasets.Dataset)
    return dataset


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn any error of the hub into a DataError."""
    try:
        yield
    except Exception as error:  # network, permissions, formats: they have no common base class
        reason = str(error).splitlines()[0] if str(error) else ""
        raise DataError(
            f"'{name}' is neither a file here nor a data set that could be downloaded from the hub "
            f"({type(error).__name__}: {reason}). Check the path, or the id and the connection."
        ) from error


def hub_rows(
    name: str, only: list[str] | None = None, *, streaming: bool = False
) -> Iterator[Row | BadRecord]:
    """The rows of a hub data set; `only`: these columns, else those of a record.

    With `streaming` it is read while it is downloaded.

    Raises:
        DataError: if it cannot be downloaded.
    """
    with _hub_errors(name):
        dataset = _open(name, streaming, only)
        classes = {
            column: feature.names
            for column, feature in (dataset.features or {}).items()
            if isinstance(feature, datasets.ClassLabel)
        }
        rows = iter(dataset)
    for line in itertools.count(1):
        with _hub_errors(name):
            value = next(rows, None)
        if value is None:
            return
        assert isinstance(value, dict)
        wanted = record_columns(list(value)) if only is None else only
        try:
            record = {key: value[key] for key in wanted if key in value}
            record = _name_classes(record, classes)
        except RecordError as problem:
            yield BadRecord(file=name, line=line, message=str(problem))
        else:
            yield Row(file=name, line=line, value=record, from_table=True)


def _open(
    name: str, streaming: bool, only: list[str] | None
) -> datasets.Dataset | datasets.IterableDataset:
    """The data set with the columns of a record, its images and sounds undecoded."""
    if streaming:
        dataset = datasets.load_dataset(name, split="train", streaming=True)
        assert isinstance(dataset, datasets.IterableDataset)
        return dataset.decode(False) if dataset.features else dataset
    dataset = hub_dataset(name)
    wanted = record_columns(dataset.column_names)
    dataset = dataset.select_columns([name for name in wanted if only is None or name in only])
    for column, feature in dataset.features.items():
        inner = feature.feature if isinstance(feature, datasets.List) else feature
        if isinstance(inner, MEDIA_FEATURES):
            raw = type(inner)(decode=False)
            raw = datasets.List(raw) if isinstance(feature, datasets.List) else raw
            dataset = dataset.cast_column(column, raw)
    return dataset
