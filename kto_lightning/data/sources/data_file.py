"""`DataFile`: a file by its name: its format, its compression, and its bytes unpacked."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa


def _open_zstd(path: Path) -> io.BufferedReader:
    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".zst": _open_zstd,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
UNPACKING_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a compressed file raises where it is damaged, cut off or none."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of rows."""

    name: str

    @property
    def path(self) -> Path:
        """The file as it is on disk, perhaps compressed."""
        return Path(self.name)

    @property
    def compression(self) -> str:
        """The extension of its compression, or an empty text."""
        suffix = self.path.suffix.lower()
        return suffix if suffix in COMPRESSIONS else ""

    @property
    def format(self) -> str:
        """The extension of its format, in lower case."""
        return (Path(self.path.stem) if self.compression else self.path).suffix.lower()

    def open(self) -> io.BufferedIOBase:
        """Its bytes, unpacked.

        Raises:
            OSError or another of `UNPACKING_ERRORS`, now or while they are read.
        """
        unpack = COMPRESSIONS.get(self.compression)
        return open(self.path, "rb") if unpack is None else unpack(self.path)
