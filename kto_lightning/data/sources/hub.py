"""`HubSource`: a split of a data set of the hub, downloaded or streamed."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import datasets

from kto_lightning.data.rows import BadRecord, Row
from kto_lightning.data.sources.arrow_tables import classes_of, dataset_rows, name_classes
from kto_lightning.data.sources.record_columns import record_columns
from kto_lightning.data.sources.source import Choose, Source
from kto_lightning.data.strict_json import RecordError
from kto_lightning.errors import DataError

HUB_NAME = re.compile(
    r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<config>[\w+-][\w.+-]*))?(?::(?P<split>[\w.-]+))?"
)
"""`owner/name`, `owner/name/config`, `owner/name:split` or `owner/name/config:split`."""


class HubSource(Source):
    """A split of a data set of the hub, `train` by default; its rows are numbered from 1.

    Args:
        name: as `HUB_NAME`.
    """

    downloads = True

    def __init__(self, name: str) -> None:
        self.name = name
        match = HUB_NAME.fullmatch(name)
        assert match is not None
        self._id, self._config = match["id"], match["config"]
        self._split = match["split"] or "train"

    def content_hash(self) -> str:
        return str(self._load()._fingerprint)

    def rows(
        self, *, streaming: bool = False, choose: Choose | None = None
    ) -> Iterator[Row | BadRecord]:
        if streaming:
            yield from self._streamed_rows(choose or record_columns)
        else:
            yield from dataset_rows(self.name, self._load(), choose)

    def _load(self) -> datasets.Dataset:
        """The split, downloaded or from the cache."""
        with self._hub_errors():
            dataset = datasets.load_dataset(*self._arguments(), split=self._split)
        assert isinstance(dataset, datasets.Dataset)
        return dataset

    def _arguments(self) -> list[str]:
        return [self._id] if self._config is None else [self._id, self._config]

    def _streamed_rows(self, choose: Choose) -> Iterator[Row | BadRecord]:
        with self._hub_errors():
            dataset = datasets.load_dataset(*self._arguments(), split=self._split, streaming=True)
            assert isinstance(dataset, datasets.IterableDataset)
            dataset = dataset.decode(False) if dataset.features else dataset
            classes = classes_of(dataset.features)
            chosen = choose(dataset.column_names) if dataset.column_names else None
            rows = iter(dataset)
        line = 0
        while True:
            with self._hub_errors():
                value = next(rows, None)
            if value is None:
                return
            assert isinstance(value, dict)
            line += 1
            try:
                keys = choose(list(value)) if chosen is None else chosen
                record = name_classes({key: value[key] for key in keys if key in value}, classes)
            except RecordError as problem:
                yield BadRecord(file=self.name, line=line, message=str(problem))
            else:
                yield Row(file=self.name, line=line, value=record, from_table=True)

    @contextmanager
    def _hub_errors(self) -> Iterator[None]:
        """Turn any error of the hub into a DataError."""
        try:
            yield
        except Exception as error:  # network, permissions, formats: they have no common base class
            # Without a connection another attempt would only wait as long once more.
            exists = self._what_exists() if isinstance(error, ValueError) else ""
            raise DataError(exists or self._unreachable(error)) from error

    def _unreachable(self, error: Exception) -> str:
        reason = str(error).splitlines()[0] if str(error) else ""
        return (
            f"'{self.name}' is neither a file here nor a data set that could be downloaded from "
            f"the hub ({type(error).__name__}: {reason}). Check the path, or the id and the "
            "connection."
        )

    def _what_exists(self) -> str:
        """A message if the data set exists and has no such config or split; else empty."""
        try:
            configs = datasets.get_dataset_config_names(self._id)
            if self._config is None and len(configs) > 1 and "default" not in configs:
                return (
                    f"'{self._id}' has several configs, {', '.join(configs)}. Name one, such as "
                    f"{self._id}/{configs[0]}:{self._split}."
                )
            if self._config is not None and self._config not in configs:
                return (
                    f"'{self._id}' has no config '{self._config}'. Its configs are "
                    f"{', '.join(configs)}. Name one, such as {self._id}/{configs[0]}."
                )
            splits = [
                str(split)
                for split in datasets.get_dataset_split_names(self._id, config_name=self._config)
            ]
        except Exception:  # no common base class
            return ""
        if not splits or self._split in splits:
            return ""
        of = self._id if self._config is None else f"{self._id}/{self._config}"
        more = f" Its configs are {', '.join(configs)}." if len(configs) > 1 else ""
        return (
            f"'{of}' has no split '{self._split}'. Its splits are {', '.join(splits)}.{more} Name "
            f"one, such as {of}:{splits[0]}."
        )
