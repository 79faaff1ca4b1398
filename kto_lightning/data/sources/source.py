"""`Source`: where rows come from, such as one file or one hub data set."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

from kto_lightning.data.rows import BadRecord, Row

Choose = Callable[[list[str]], list[str]]
"""From the columns that a table has, those to read."""


class Source(ABC):
    """One file or one hub data set."""

    name: str
    """What its rows, messages and the cache's key call it."""
    path: Path | None = None
    """The file or directory that it is read from; None: it is none."""
    downloads: bool = False
    """Whether reading its rows with `streaming` downloads them."""

    @property
    def is_empty(self) -> bool:
        """Whether it is a file without a single byte."""
        return self.path is not None and self.path.is_file() and not self.path.stat().st_size

    @abstractmethod
    def content_hash(self) -> str:
        """Hash of the contents: equal hashes mean equal rows.

        Raises:
            DataError: if the source cannot be read.
        """

    @abstractmethod
    def rows(
        self, *, streaming: bool = False, choose: Choose | None = None
    ) -> Iterator[Row | BadRecord]:
        """The rows in order; a row that cannot be parsed is a `BadRecord`.

        Args:
            streaming: whether a hub data set is read while it is downloaded and never stored on
                disk as a whole.
            choose: picks the columns to read, for the formats that store columns apart; None:
                `record_columns`.

        Raises:
            DataError: if the source cannot be read at all.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"
