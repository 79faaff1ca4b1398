"""`FileSource`: a file, read by the reader that its extension names."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pyarrow as pa

from kto_lightning.data.rows import BadRecord, Row
from kto_lightning.data.sources.arrow_tables import arrow_rows, parquet_rows
from kto_lightning.data.sources.csv_files import csv_rows
from kto_lightning.data.sources.data_file import COMPRESSIONS, UNPACKING_ERRORS, DataFile
from kto_lightning.data.sources.json_files import json_rows
from kto_lightning.data.sources.source import Choose, Source
from kto_lightning.data.sources.wrong_kind import check_kind
from kto_lightning.errors import DataError

Rows = Iterator[Row | BadRecord]

TEXT_READERS: dict[str, Callable[[DataFile], Rows]] = {
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
}
TABLE_READERS: dict[str, Callable[[DataFile, Choose | None], Rows]] = {
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
    ".feather": arrow_rows,
}


class FileSource(Source):
    """A file, which is read again for every iteration over its rows.

    Raises:
        DataError: if its extension is unknown.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._file = DataFile(name)
        self.path: Path = self._file.path
        if not has_known_extension(name):
            texts, compressions = ", ".join(TEXT_READERS), ", ".join(COMPRESSIONS)
            advice = (
                "Unpack it."
                if self.path.suffix == ".zip"
                else ("Convert the file, or unpack it if it is compressed.")
            )
            raise DataError(
                f"{name}: unknown extension '{''.join(self.path.suffixes[-2:])}'; {texts} are "
                f"read, also with {compressions}, and {', '.join(TABLE_READERS)}. {advice}"
            )

    def content_hash(self) -> str:
        try:
            with open(self.path, "rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            self._raise_unreadable(error)

    def rows(
        self, *, streaming: bool = False, choose: Choose | None = None
    ) -> Iterator[Row | BadRecord]:
        file = self._file
        try:
            if self.is_empty:  # an empty part among others is normal
                return
            check_kind(file)
            if file.format in TEXT_READERS:
                yield from TEXT_READERS[file.format](file)
            else:
                yield from TABLE_READERS[file.format](file, choose)
        except (*UNPACKING_ERRORS, pa.ArrowException, UnicodeDecodeError) as error:
            self._raise_unreadable(error)

    def _raise_unreadable(self, error: Exception) -> NoReturn:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if self._file.compression and getattr(error, "errno", None) is None:
            raise DataError(
                f"{self.name} cannot be unpacked: {reason}. It is cut off, damaged, or not "
                "compressed as its extension says. Download or compress it again."
            ) from error
        raise DataError(
            f"{self.name} cannot be read: {reason.rstrip('.')}. Check the file."
        ) from error


def has_known_extension(name: str) -> bool:
    """Whether a file of this name is read."""
    file = DataFile(name)
    return file.format in TEXT_READERS or (file.format in TABLE_READERS and not file.compression)
