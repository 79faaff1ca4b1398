"""Sources of records: files, globs of files and hub data sets, read row by row.

This module knows file formats; what a row must contain is up to `records`.
"""

import codecs
import csv
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pyarrow as pa

from kto_lightning.data.rows import BadRecord, Row
from kto_lightning.data.strict_json import RecordError, parse_json
from kto_lightning.data.tables import hub_dataset, hub_rows, parquet_rows
from kto_lightning.errors import DataError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def expand(source: str | list[str]) -> list[str]:
    """The files and hub data sets of a source, with globs expanded in alphabetical order.

    Raises:
        DataError: for an empty list, a directory, a glob without a match, an unknown extension, and
            a name that is neither a file nor has the form of a hub data set's.
    """
    sources = [source] if isinstance(source, str) else source
    if not sources:
        raise DataError("the list of data files is empty. Name at least one file or hub data set.")
    try:
        return [name for item in sources for name in _expand_one(item)]
    except OSError as error:  # a name too long, a directory without read permission
        raise DataError(f"the data files cannot be found: {error}. Check the path.") from error


def _expand_one(item: str) -> list[str]:
    _check_utf8(item)
    item = item if Path(item).exists() else os.path.expanduser(item)
    path = Path(item)
    if item and path.is_file():
        names = [item]
    elif item and path.is_dir():
        raise DataError(f"{item} is a directory. Name its files, such as '{path / '*.jsonl'}'.")
    elif glob.has_magic(item):
        names = sorted(name for name in glob.glob(item, recursive=True) if Path(name).is_file())
        if not names:
            raise DataError(f"no file matches '{item}'. Check the pattern and the directory.")
    elif HUB_ID.fullmatch(item) and path.suffix.lower() not in READERS:
        return [item]
    else:
        raise DataError(
            f"there is no file '{item}', and it cannot be a hub data set, which is named "
            "owner/name. Check the path."
        )
    for name in names:
        if Path(_check_utf8(name)).suffix.lower() not in READERS:
            known = ", ".join(READERS)
            raise DataError(
                f"{name}: unknown extension '{Path(name).suffix}'; {known} are read. "
                "Convert the file, or unpack it if it is compressed."
            )
    return names


def _check_utf8(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name!a}: the name is not UTF-8. Rename the file.") from error
    return name


def content_hash(name: str) -> str:
    """Hash of the contents of one of `expand`'s names: equal hashes mean equal rows."""
    if not Path(name).is_file():
        return str(hub_dataset(name)._fingerprint)
    try:
        with open(name, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        _raise_unreadable(name, error)


def read_rows(
    name: str, *, streaming: bool = False, only: list[str] | None = None
) -> Iterator[Row | BadRecord]:
    """The rows of one of `expand`'s names, in order; a row that cannot be parsed is a `BadRecord`.

    Only a `.json` file is held in memory whole. With `streaming`, a hub data set is read while it
    is downloaded and never stored on disk as a whole. `only`: columns that are enough, for the
    formats that store columns apart.

    Raises:
        DataError: if the file or the hub data set cannot be read at all.
    """
    if not Path(name).is_file():
        yield from hub_rows(name, only, streaming=streaming)
        return
    suffix = Path(name).suffix.lower()
    try:
        yield from parquet_rows(name, only) if suffix == ".parquet" else READERS[suffix](name)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        _raise_unreadable(name, error)


def _raise_unreadable(name: str, error: Exception) -> NoReturn:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise DataError(f"{name} cannot be read: {reason}. Check the file.") from error


def _decode(raw: bytes) -> str:
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise RecordError(f"not valid UTF-8 ({got}). Save the file as UTF-8.") from error


def _jsonl_rows(name: str) -> Iterator[Row | BadRecord]:
    with open(name, "rb") as stream:
        for line, raw in enumerate(stream, start=1):
            try:
                text = _decode(raw).rstrip("\r\n")
                if text.strip():
                    yield Row(file=name, line=line, value=parse_json(text))
            except RecordError as problem:
                yield BadRecord(file=name, line=line, message=str(problem))


def _json_rows(name: str) -> Iterator[Row | BadRecord]:
    try:
        text = _decode(Path(name).read_bytes())
        content = parse_json(text) if text.strip() else []
    except RecordError as problem:
        cause = problem.__cause__
        if isinstance(cause, json.JSONDecodeError) and cause.msg == "Extra data":
            yield from _jsonl_rows(name)  # JSON lines with the extension .json, as is common
            return
        yield BadRecord(file=name, line=problem.line, message=str(problem))
        return
    for line, value in enumerate(_record_list(name, content), start=1):
        yield Row(file=name, line=line, value=value)


def _record_list(name: str, content: object) -> list:
    """The records of a whole JSON file: an array, the single list of an object, or one record."""
    if isinstance(content, list):
        return content
    if isinstance(content, dict):
        if "prompt" in content or "label" in content or "chosen" in content:
            return [content]
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) == 1:
            return lists[0]
    raise DataError(
        f"{name} must hold one array of records, or an object with a single list in it. "
        "Save the records as one array, or as JSON lines."
    )


def _csv_rows(name: str) -> Iterator[Row | BadRecord]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell of more than 128 KiB
    # Invalid UTF-8 becomes surrogates, so that the error can name the row.
    with open(name, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        header = _csv_header(name, reader)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
                if cells is None:
                    return
                if cells:
                    value = _csv_record(header, cells)
                    yield Row(file=name, line=line, value=value, from_table=True)
            except csv.Error as error:
                message = f"invalid CSV ({error}). Check the quotes, or drop the line."
                yield BadRecord(file=name, line=line, message=message)
            except RecordError as problem:
                yield BadRecord(file=name, line=line, message=str(problem))


def _csv_header(name: str, reader) -> list[str]:
    try:
        header = [cell.strip() for cell in next(reader, [])]
    except csv.Error as error:
        raise DataError(f"{name}:1: invalid CSV header ({error}). Check the quotes.") from error
    if len(set(header)) < len(header):
        raise DataError(f"{name}:1: a column is named twice: {', '.join(header)}. Rename one.")
    return header


def _csv_record(header: list[str], cells: list[str]) -> dict[str, str | None]:
    if len(cells) != len(header):
        raise RecordError(
            f"{len(header)} cells are needed, one per column, got {len(cells)}. "
            "Check commas and quotes, or drop the line."
        )
    try:
        "".join(cells).encode()
    except UnicodeEncodeError as error:
        raise RecordError("not valid UTF-8. Save the file as UTF-8.") from error
    text = {"prompt", "completion"}  # an empty cell is a text here, and a missing value elsewhere
    return {
        key: cell if cell or key in text else None for key, cell in zip(header, cells, strict=True)
    }


READERS = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": parquet_rows,
}
