"""Strict JSON parsing, and helpers for JSON values."""

import json
from collections import Counter
from collections.abc import Callable
from typing import NoReturn, TypeVar

T = TypeVar("T")


class RecordError(ValueError):
    """A row that cannot become a record: what is wrong, the value got and what to do.

    Caught in `sources` and `dataset`, which add file and line and yield a `BadRecord`.

    Attributes:
        line: the line of the error in the text parsed, from 1.
        kind: what is wrong, without the value got.
    """

    def __init__(self, message: str, line: int = 1, *, kind: str | None = None) -> None:
        super().__init__(message)
        self.line = line
        self.kind = message.split(", got ", 1)[0] if kind is None else kind


def parse_json(text: str, *, unique_keys: bool = True) -> object:
    """Parse strict JSON: no NaN, no duplicate keys in an object.

    Args:
        unique_keys: whether to check for duplicate keys, which no program writes; looking for them
            takes most of the time.

    Raises:
        RecordError: for anything else, and for nesting or numbers beyond Python's limits.
    """
    decoder = STRICT_DECODER if unique_keys else _PROGRAM_DECODER
    return decode_strictly(decoder.decode, text)


def decode_strictly(decode: Callable[..., T], *arguments: object) -> T:
    """Call `decode`, which uses `STRICT_DECODER`.

    Raises:
        RecordError: for all that it raises.
    """
    try:
        return decode(*arguments)
    except json.JSONDecodeError as error:
        at = f"{error.msg}, column {error.colno}"
        raise RecordError(f"invalid JSON ({at}). Fix or remove it.", error.lineno) from error
    except RecursionError as error:
        raise RecordError("the JSON is nested too deep. Flatten or drop it.") from error
    except RecordError:
        raise
    except ValueError as error:  # an integer of more digits than Python converts
        raise RecordError("a number has too many digits to be read. Fix or remove it.") from error


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) == len(pairs):
        return unique
    twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    raise RecordError(f"an object has the key {json.dumps(twice[:60])} twice. Keep one of the two.")


def _reject_constant(name: str) -> NoReturn:
    raise RecordError(f"{name} is not JSON. Write null or a number, or drop it.")


STRICT_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_reject_constant)
_PROGRAM_DECODER = json.JSONDecoder(parse_constant=_reject_constant)


def parse_json_or_text(value: object) -> object:
    """The value of a JSON text, None for a blank text, or the text itself if it is not JSON; what
    is no text, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else None
    except RecordError:
        return value


def drop_none(value: object) -> object:
    """Drop the nulls with which tables fill in keys that only other rows' structs have."""
    if isinstance(value, dict):
        return {key: drop_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_none(item) for item in value]
    return value


def quote(value: object) -> str:
    """`value` for an error message: JSON, shortened, safe to print."""
    value = value[:80] if isinstance(value, str) else value
    text = json.dumps(value, ensure_ascii=False, default=repr)
    text = text if len(text) <= 60 else text[:59] + "…"
    return text.encode("utf-8", "backslashreplace").decode()


def exceeds_depth(value: list, levels: int) -> bool:
    """Whether lists and objects are nested deeper than `levels` levels."""
    layer: list[list | dict] = [value]
    for _ in range(levels):
        items = (item.values() if isinstance(item, dict) else item for item in layer)
        layer = [child for item in items for child in item if isinstance(child, dict | list)]
        if not layer:
            return False
    return True
