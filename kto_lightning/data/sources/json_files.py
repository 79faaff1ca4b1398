"""Rows of JSON files: lines, an array, objects one after another, or one object."""

from collections.abc import Iterator

from kto_lightning.data.rows import BadRecord, Row
from kto_lightning.data.sources.data_file import DataFile
from kto_lightning.data.sources.encodings import decode
from kto_lightning.data.sources.json_shapes import records_of_object
from kto_lightning.data.sources.json_text import BrokenJsonError, JsonText
from kto_lightning.data.strict_json import RecordError, parse_json

BOM = b"\xef\xbb\xbf"
LONGEST_LINE = 1 << 24
"""Bytes of a line that decide whether a file is JSON lines."""


def json_rows(file: DataFile) -> Iterator[Row | BadRecord]:
    """The rows of a JSON file, whatever its extension says of lines.

    One value is in memory at a time, except in a file that is one object: it is read whole.

    Raises:
        DataError: for one object that is neither a record nor holds records.
    """
    with file.open() as stream:
        text = JsonText(stream.read, file.name)
        start = text.peek()
        if start == "[":
            text.skip()
            if file.format == ".json" or text.peek() == "{":
                yield from _value_rows(file.name, text, in_array=True)
                return
        line = text.line
        try:
            first = text.value() if start == "{" else None
        except RecordError as problem:
            first = problem
        broken = isinstance(first, BrokenJsonError)
        ends, end = text.line, "" if broken else text.peek()
        if start == "{" and not _is_lines(file, broken, end and ends == line < text.line):
            if not end and isinstance(first, dict):
                text.drop()
                values = records_of_object(file.name, first, unwrap=file.format == ".json")
                for number, value in enumerate(values, start=1):
                    yield _row(file.name, line if value is first else number, value)
                return
            at = first.line if isinstance(first, BrokenJsonError) else line
            yield _row(file.name, at, first)
            yield from () if broken else _value_rows(file.name, text)
            return
    yield from _line_rows(file)


def _is_lines(file: DataFile, broken: bool, one_a_line: object) -> bool:
    """Whether a file that begins with an object has one object per line.

    Args:
        file: the file.
        broken: whether the first object is no JSON.
        one_a_line: whether the first object is one line, and something follows on another.
    """
    if not broken:
        return bool(one_a_line)
    if file.format != ".json":
        return True
    with file.open() as stream:  # which line is broken: that of the object, or one within it?
        stream.readline(LONGEST_LINE)
        try:
            return isinstance(parse_json(stream.readline(LONGEST_LINE).decode()), dict)
        except (RecordError, UnicodeDecodeError):
            return False


def _row(name: str, line: int, value: object) -> Row | BadRecord:
    if isinstance(value, BrokenJsonError):
        message = f"{value} Nothing after it is read."
        return BadRecord(file=name, line=line, message=message)
    if isinstance(value, RecordError):
        return BadRecord(file=name, line=line, message=str(value), kind=value.kind)
    return Row(file=name, line=line, value=value)


def _line_rows(file: DataFile) -> Iterator[Row | BadRecord]:
    name = file.name
    with file.open() as stream:
        for line, raw in enumerate(stream, start=1):
            try:
                text = decode(raw.removeprefix(BOM) if line == 1 else raw, name).rstrip("\r\n")
                if text.strip():
                    yield Row(file=name, line=line, value=parse_json(text))
            except RecordError as problem:
                yield _row(name, line, problem)


def _value_rows(name: str, text: JsonText, *, in_array: bool = False) -> Iterator[Row | BadRecord]:
    """The elements of arrays, numbered from 1, and the objects between them, by their lines."""
    number = 0
    while (char := text.peek()) or in_array:
        if char == ("]" if in_array else "["):
            text.skip()
            in_array = not in_array
            continue
        number += 1
        line = number if in_array else text.line
        try:
            value = text.value()
        except BrokenJsonError as problem:
            yield _row(name, problem.line, problem)
            return
        except RecordError as problem:
            value = problem
        yield _row(name, line, value)
        try:
            in_array = in_array and text.in_array()
        except BrokenJsonError as problem:
            yield _row(name, problem.line, problem)
            return
