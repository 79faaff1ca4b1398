"""Rows of Arrow tables as JSON values; names stand for ClassLabel integers."""

import json
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from kto_lightning.data.rows import BadRecord, Row
from kto_lightning.data.sources.data_file import DataFile
from kto_lightning.data.sources.record_columns import COLUMNS, record_columns
from kto_lightning.data.sources.source import Choose
from kto_lightning.data.strict_json import RecordError, quote
from kto_lightning.errors import DataError

BATCH = 64
Classes = Mapping[str, list[str]]
"""The names of the classes of each ClassLabel column."""


def parquet_rows(file: DataFile, choose: Choose | None = None) -> Iterator[Row | BadRecord]:
    """The rows of a parquet file; `choose` as for `Source.rows`.

    Raises:
        DataError: if two columns have the same name, or the class names cannot be read.
    """
    with pq.ParquetFile(file.path) as table:
        chosen, classes = _of_schema(file.name, table.schema_arrow, choose)
        batches = table.iter_batches(batch_size=BATCH, columns=chosen)
        yield from table_rows(
            file.name, batches, classes, strict=chosen != table.schema_arrow.names
        )


def arrow_rows(file: DataFile, choose: Choose | None = None) -> Iterator[Row | BadRecord]:
    """The rows of an Arrow file, in the file or the stream format of Arrow's IPC.

    Raises:
        DataError: as `parquet_rows`.
    """
    with pa.memory_map(str(file.path)) as mapped:
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        reader = pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)
        with reader:
            chosen, classes = _of_schema(file.name, reader.schema, choose)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            selected = (_checked(batch.select(chosen)) for batch in batches)
            strict = chosen != reader.schema.names
            yield from table_rows(file.name, selected, classes, strict=strict)


def dataset_rows(
    name: str, dataset: datasets.Dataset, choose: Choose | None = None
) -> Iterator[Row | BadRecord]:
    """The rows of a data set, its images and sounds undecoded; `choose` as for `Source.rows`."""
    chosen = (choose or record_columns)(dataset.column_names)
    selected = dataset.select_columns(chosen).with_format("arrow")
    batches = (
        _checked(batch)
        for table in selected.iter(BATCH)
        for batch in table.to_batches()  # type: ignore
    )
    classes = classes_of(dataset.features)
    yield from table_rows(name, batches, classes, strict=chosen != dataset.column_names)


def classes_of(features: Mapping[str, object] | None) -> Classes:
    """The names of the classes in the features of a data set."""
    return {
        column: feature.names
        for column, feature in (features or {}).items()
        if isinstance(feature, datasets.ClassLabel)
    }


def table_rows(
    name: str, batches: Iterable[pa.RecordBatch], classes: Classes, *, strict: bool
) -> Iterator[Row | BadRecord]:
    """The rows of the batches, numbered from 1.

    Args:
        name: of the source.
        batches: with the columns that are read.
        classes: of all columns.
        strict: whether a value that Python cannot hold makes its row bad in any column, because
            the columns were chosen, and not only in one of a record.
    """
    line = 0
    for batch in batches:
        for index in range(batch.num_rows):
            line += 1
            try:
                value = name_classes(_row_values(batch, index, strict=strict), classes)
            except RecordError as problem:
                yield BadRecord(file=name, line=line, message=str(problem))
            else:
                yield Row(file=name, line=line, value=value, from_table=True)


def _of_schema(name: str, schema: pa.Schema, choose: Choose | None) -> tuple[list[str], Classes]:
    """The columns to read, and the classes of all."""
    if len(set(schema.names)) < len(schema.names):
        raise DataError(f"{name}: a column is named twice: {', '.join(schema.names)}.")
    return (choose or record_columns)(schema.names), _class_names(name, schema)


def _checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same batch.

    Raises:
        pa.ArrowInvalid: if its buffers are damaged: reading it would end the process.
    """
    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            # A text that is no UTF-8 is named where its row is read, unless more may be damaged.
            if not (pa.types.is_string(column.type) and "UTF8" in str(error)):
                raise
    return batch


def _row_values(batch: pa.RecordBatch, index: int, *, strict: bool) -> dict[str, object]:
    """The values of a row; None for one that Python cannot hold in a column that is not read.

    Raises:
        RecordError: for such a value in a column of a record; if `strict`, in any column.
    """
    values: dict[str, object] = {}
    for column, cells in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value = cells[index].as_py()
        except UnicodeDecodeError as error:
            raise RecordError("a text is not valid UTF-8. Fix or remove the row.") from error
        except Exception as error:  # dates out of range, unknown time zones: no common base class
            if strict or column in COLUMNS:
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


def _class_names(name: str, schema: pa.Schema) -> Classes:
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


def name_classes(value: dict[str, object], classes: Classes) -> dict[str, object]:
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
