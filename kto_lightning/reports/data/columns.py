"""The columns of a file as it was published, in their order, with their types."""

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kto_lightning.data.sources import BadRecord, expand, read_rows
from kto_lightning.errors import DataError
from kto_lightning.reports.data.fields import Column

MOST_KEYS = 8
KINDS = {bool: "boolean", int: "number", float: "number", str: "string", dict: "object"}


@dataclass(slots=True)
class _Seen:
    """What was met in one column; dicts keep the order of what was met first."""

    kinds: dict[str, None] = field(default_factory=dict)
    keys: dict[str, None] = field(default_factory=dict)
    filled: int = 0

    def add(self, value: object) -> None:
        self.filled += 1
        items = value if isinstance(value, list) else [value]
        for item in items:
            if isinstance(item, dict):
                self.keys.update(dict.fromkeys(item))
        self.kinds[_kind(value)] = None

    def describe(self) -> str:
        """Such as `string | list of objects (role, content)`."""
        names = [str(key) for key in self.keys]
        shown = ", ".join(names[:MOST_KEYS]) + (", …" if len(names) > MOST_KEYS else "")
        return " | ".join(
            f"{kind} ({shown})" if "object" in kind and shown else kind for kind in self.kinds
        )


def published_columns(source: str | list[str]) -> list[Column]:
    """The columns of all files of a source; of a hub data set those that records are made of.

    Reads every row once more, because a column may stand in any of them.

    Raises:
        DataError: as `read_records`.
    """
    seen: dict[str, _Seen] = {}
    for name in expand(source):
        if Path(name).suffix.lower() == ".parquet" and Path(name).is_file():
            _look_at_parquet(name, seen)
        else:
            _look_at_rows(name, seen)
    return [
        Column(name=name, type=column.describe(), filled=column.filled)
        for name, column in seen.items()
    ]


def _look_at_rows(name: str, seen: dict[str, _Seen]) -> None:
    for row in read_rows(name):
        if isinstance(row, BadRecord) or not isinstance(row.value, dict):
            continue
        for key, value in row.value.items():
            column = seen.setdefault(str(key), _Seen())
            if value is not None:
                column.add(value)


def _look_at_parquet(name: str, seen: dict[str, _Seen]) -> None:
    try:
        with pq.ParquetFile(name) as table:
            for column in table.schema_arrow:
                seen.setdefault(column.name, _Seen()).kinds[str(column.type)] = None
            for batch in table.iter_batches():
                for key, values in zip(batch.schema.names, batch.columns, strict=True):
                    seen[key].filled += len(values) - values.null_count
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{name} cannot be read: {error}. Check the file.") from error


def _kind(value: object) -> str:
    if not isinstance(value, list):
        return KINDS.get(type(value), type(value).__name__)
    if not value:
        return "empty list"
    plurals = {**KINDS, list: "list", type(None): "null"}
    kinds = dict.fromkeys(plurals.get(type(item), type(item).__name__) for item in value)
    return "list of " + " or ".join(f"{kind}s" for kind in kinds)
