"""`FolderSource`: a folder that `Dataset.save_to_disk` wrote."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import datasets

from kto_lightning.data.rows import BadRecord, Row
from kto_lightning.data.sources.arrow_tables import dataset_rows
from kto_lightning.data.sources.data_file import DataFile
from kto_lightning.data.sources.source import Choose, Source
from kto_lightning.data.sources.wrong_kind import check_kind
from kto_lightning.errors import DataError


class FolderSource(Source):
    """A saved data set, memory-mapped; its rows are numbered from 1.

    Raises:
        DataError: if the folder holds several splits, or no data set.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.path: Path = Path(name)
        if (self.path / "dataset_dict.json").is_file():
            raise DataError(f"{name} holds the splits of a data set. Name one: {self._splits()}.")
        if not (self.path / "state.json").is_file():
            raise DataError(
                f"{name} is a directory. Name its files, such as '{self.path / '*.jsonl'}'."
            )

    def _splits(self) -> str:
        try:
            splits = json.loads((self.path / "dataset_dict.json").read_bytes())["splits"]
            return ", ".join(str(self.path / str(split)) for split in splits)
        except (OSError, ValueError, KeyError, TypeError):
            return f"{self.path / 'train'}, if there is one"

    def content_hash(self) -> str:
        digest = hashlib.sha256()
        try:
            for path in sorted(path for path in self.path.iterdir() if path.is_file()):
                with path.open("rb") as stream:
                    digest.update(path.name.encode(errors="surrogateescape") + b"\0")
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise DataError(f"{self.name} cannot be read: {error}. Check the folder.") from error
        return digest.hexdigest()

    def rows(
        self, *, streaming: bool = False, choose: Choose | None = None
    ) -> Iterator[Row | BadRecord]:
        try:
            for path in sorted(self.path.glob("*.arrow")):
                check_kind(DataFile(str(path)))
            dataset = datasets.Dataset.load_from_disk(str(self.path))
            yield from dataset_rows(self.name, dataset, choose)
        except DataError:
            raise
        except Exception as error:  # whatever damage `datasets` meets: no common base class
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"{self.name} cannot be read as a saved data set ({reason}). Save it again."
            ) from error
