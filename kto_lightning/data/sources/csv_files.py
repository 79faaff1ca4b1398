"""Rows of csv and tsv files as texts; the separator is found in the first rows."""

import csv
import io
from collections.abc import Iterator
from itertools import chain
from typing import cast

from kto_lightning.data.rows import BadRecord, Row
from kto_lightning.data.sources.data_file import DataFile
from kto_lightning.data.sources.encodings import check_decoded
from kto_lightning.data.sources.separators import (
    DECLARED,
    LONGEST_SAMPLE,
    NUM_LINES,
    find_separator,
    looks_joined,
)
from kto_lightning.data.strict_json import RecordError, quote
from kto_lightning.errors import DataError

OTHER_CELLS: dict[tuple[str, ...], tuple[str, ...]] = {
    # The log of a Gradio chat, whose flag is the value.
    ("conversation", "index", "value", "flag", "timestamp"): (
        *("conversation", "index", "value", "timestamp"),
    ),
}
"""Headers under which a tool writes rows of fewer cells, and the names of these."""


def csv_rows(file: DataFile) -> Iterator[Row | BadRecord]:
    """The rows of a table with one line of column names.

    Raises:
        DataError: if the header cannot be read, names a column twice, or is one cell that seems to
            hold several names.
    """
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell of more than 128 KiB
    # Invalid UTF-8 becomes surrogates, so that the error can name the row.
    raw = cast(io.BufferedReader, file.open())
    with io.TextIOWrapper(
        raw, encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as stream:
        sample = _first_lines(stream)
        declared = DECLARED.fullmatch(sample[0]) if sample else None
        num_skipped = 1 if declared else 0
        preferred = "\t" if file.format == ".tsv" else ","
        separator = declared[1] if declared else find_separator(sample, preferred=preferred)
        lines = chain(sample[num_skipped:], stream)
        reader = csv.reader(lines, delimiter=separator, strict=True)
        header = _header(file.name, reader, num_skipped + 1)
        other = OTHER_CELLS.get(tuple(header), ())
        while True:
            line = reader.line_num + num_skipped + 1
            try:
                cells = next(reader, None)
                if cells is None:
                    return
                if cells:
                    value = _record(
                        file.name, [*other] if len(cells) == len(other) else header, cells
                    )
                    yield Row(file=file.name, line=line, value=value, from_table=True)
            except csv.Error as error:
                message = f"invalid CSV ({error}). Check the quotes, or drop the line."
                yield BadRecord(file=file.name, line=line, message=message)
            except RecordError as problem:
                message = str(problem)
                yield BadRecord(file=file.name, line=line, message=message, kind=problem.kind)


def _first_lines(stream: io.TextIOWrapper) -> list[str]:
    lines, length = [], 0
    for line in stream:
        lines.append(line)
        length += len(line)
        if len(lines) == NUM_LINES or length > LONGEST_SAMPLE:
            break
    return lines


def _header(name: str, reader, line: int) -> list[str]:
    try:
        header = [cell.strip() for cell in next(reader, [])]
        check_decoded("".join(header), name)
    except csv.Error as error:
        message = f"{name}:{line}: invalid CSV header ({error}). Check the quotes."
        raise DataError(message) from error
    except RecordError as problem:
        raise DataError(f"{name}:{line}: {problem}") from problem
    if len(set(header)) < len(header):
        raise DataError(f"{name}:{line}: a column is named twice: {', '.join(header)}. Rename one.")
    if len(header) == 1 and looks_joined(header[0]):
        raise DataError(
            f"{name}:{line}: the header is a single column, {quote(header[0])}. Columns must be "
            "separated by a comma, semicolon, tab or |. Save the table again with one of these."
        )
    return header


def _record(name: str, header: list[str], cells: list[str]) -> dict[str, str | None]:
    if len(cells) != len(header):
        raise RecordError(
            f"{len(header)} cells are needed, one per column, got {len(cells)}. "
            "Check commas and quotes, or drop the line."
        )
    text = {"prompt", "completion"}  # an empty cell is a text here, and a missing value elsewhere
    check_decoded("".join(cells), name)
    return {
        key: cell if cell or key in text else None for key, cell in zip(header, cells, strict=True)
    }
