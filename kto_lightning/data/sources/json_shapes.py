"""The records of a JSON file that is one object: a record, columns, or an object with a list."""

from collections.abc import Iterator

from kto_lightning.errors import DataError

RECORD_KEYS = ("prompt", "label", "chosen", "messages", "conversations")
"""An object with one of these is a record, though it may have lists."""


def records_of_object(name: str, content: dict, *, unwrap: bool) -> Iterator[object]:
    """The records of a file that is one object.

    These are pandas' columns `{"prompt": {"0": …}}`, its rows by index and its `split` form, lists
    as columns `{"prompt": […]}`, an object with a single list of records, and one record.

    Args:
        name: of the file.
        content: the object; rows of its columns are made one at a time.
        unwrap: whether the list of records in an object is looked for.

    Raises:
        DataError: if it has several lists and nothing else.
    """
    return _table_rows(content) or iter(_records(name, content, unwrap))


def _table_rows(content: dict) -> Iterator[object] | None:
    values = list(content.values())
    if content.keys() == {"columns", "index", "data"} and _is_split(**content):
        names = [str(name) for name in content["columns"]]
        return (dict(zip(names, row, strict=True)) for row in content["data"])
    if values and all(isinstance(value, dict) for value in values):
        if _is_index(content):
            return iter(values)
        if _is_index(values[0]) and all(value.keys() == values[0].keys() for value in values):
            rows = zip(*(value.values() for value in values), strict=True)
            return (dict(zip(content, row, strict=True)) for row in rows)
    if _are_columns(values):
        rows = zip(*values, strict=True)
        return (dict(zip(content, row, strict=True)) for row in rows)
    return None


def _is_split(columns: object, index: object, data: object) -> bool:
    return (
        isinstance(columns, list)
        and isinstance(index, list)
        and isinstance(data, list)
        and all(isinstance(row, list) and len(row) == len(columns) for row in data)
    )


def _is_index(content: dict) -> bool:
    return bool(content) and all(key.isdecimal() for key in content)


def _are_columns(values: list) -> bool:
    """Whether the values are lists of equal lengths, of which none is a conversation's and one at
    least has other items than objects."""
    if len(values) < 2 or not all(isinstance(value, list) and value for value in values):
        return False
    if any(len(value) != len(values[0]) for value in values):
        return False
    are_objects = [all(isinstance(item, dict) for item in value) for value in values]
    return not all(are_objects) and not any(
        all("role" in item or "from" in item for item in value)
        for value, objects in zip(values, are_objects, strict=True)
        if objects
    )


def _records(name: str, content: dict, unwrap: bool) -> list:
    if not unwrap or any(key in content for key in RECORD_KEYS):
        return [content]
    lists = [value for value in content.values() if isinstance(value, list)]
    of_records = [value for value in lists if all(isinstance(item, dict) for item in value)]
    if len(lists) == 1 and of_records:
        return lists[0]
    if len(lists) == len(content):
        raise DataError(
            f"{name} must hold one array of records, or an object with a single list in it. "
            f"Save the records as one array, or as JSON lines."
        )
    return [content]
