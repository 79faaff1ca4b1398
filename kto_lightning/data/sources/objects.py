"""Sources in memory, from Python: a `datasets.Dataset`, a list of dicts, a pandas DataFrame."""

import hashlib
import json
import math
import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from datetime import date, time
from typing import Any

import datasets
import numpy as np

from kto_lightning.data.rows import BadRecord, Row
from kto_lightning.data.sources.arrow_tables import dataset_rows
from kto_lightning.data.sources.source import Choose, Source
from kto_lightning.errors import DataError


class DatasetSource(Source):
    """A data set that is loaded already."""

    def __init__(self, dataset: datasets.Dataset, name: str = "Dataset") -> None:
        self.name = name
        self._dataset = dataset

    def content_hash(self) -> str:
        return str(self._dataset._fingerprint)

    def rows(
        self, *, streaming: bool = False, choose: Choose | None = None
    ) -> Iterator[Row | BadRecord]:
        return dataset_rows(self.name, self._dataset, choose)


class _ObjectSource(Source):
    """Rows made of Python objects, one at a time, numbered from 1."""

    _is_table: bool
    """`from_table` of the rows."""

    @abstractmethod
    def _values(self) -> Iterator[object]:
        """The rows as JSON values."""

    def content_hash(self) -> str:
        digest = hashlib.sha256()
        for value in self._values():
            digest.update(json.dumps(value, default=repr).encode() + b"\n")
        return digest.hexdigest()

    def rows(
        self, *, streaming: bool = False, choose: Choose | None = None
    ) -> Iterator[Row | BadRecord]:
        for line, value in enumerate(self._values(), start=1):
            yield Row(file=self.name, line=line, value=value, from_table=self._is_table)


class ListSource(_ObjectSource):
    """A list of dicts."""

    _is_table = False

    def __init__(self, records: Sequence[object], name: str = "list") -> None:
        self.name = name
        self._records = records

    def _values(self) -> Iterator[object]:
        for record in self._records:
            is_dict = isinstance(record, dict)
            yield _plain_row(record.keys(), record.values()) if is_dict else plain(record)


class FrameSource(_ObjectSource):
    """A pandas DataFrame; its index is not read.

    Raises:
        DataError: if two columns have the same name.
    """

    _is_table = True

    def __init__(self, frame: Any, name: str = "DataFrame") -> None:
        self.name = name
        self._frame = frame
        self._columns = [str(column) for column in frame.columns]
        if len(set(self._columns)) < len(self._columns):
            columns = ", ".join(self._columns)
            raise DataError(f"{name}: a column is named twice: {columns}. Rename one.")

    def _values(self) -> Iterator[object]:
        for row in self._frame.itertuples(index=False, name=None):
            yield _plain_row(self._columns, row)


def is_frame(value: object) -> bool:
    """Whether a value is a pandas DataFrame; pandas itself is not imported."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.DataFrame)


def _plain_row(keys: Any, values: Any) -> dict[str, object]:
    return {
        str(key): None if _is_missing(value) else plain(value)
        for key, value in zip(keys, values, strict=True)
    }


def _is_missing(value: object) -> bool:
    """Whether a cell is NaN, NaT or pandas' NA, which all mean that there is no value."""
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, np.datetime64 | np.timedelta64):
        return bool(np.isnat(value))
    return type(value).__name__ in ("NaTType", "NAType")


def plain(value: object) -> object:
    """A value with lists, numbers and texts in the place of numpy's arrays and scalars."""
    if value is None or isinstance(value, str | bool) or type(value) in (int, float):
        return value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, date | time):  # pandas' timestamps too
        return value.isoformat()
    return value
