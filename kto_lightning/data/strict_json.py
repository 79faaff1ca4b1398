"""Strict JSON, and small questions about JSON values. Knows neither files nor records."""

import json
from typing import NoReturn


class Unusable(ValueError):
    """A row that cannot become a record. Its message says what, got and do."""

    def __init__(self, message: str, line: int = 1) -> None:
        super().__init__(message)
        self.line = line


def parse_json(text: str) -> object:
    """`text` as strict JSON: no NaN, no key twice in one object.

    Raises:
        Unusable: for whatever is not that, and for what is nested too deep or too long to read.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_reject_constant)
    except json.JSONDecodeError as error:
        at = f"{error.msg}, column {error.colno}"
        raise Unusable(f"invalid JSON ({at}). Mend or drop it.", error.lineno) from error
    except RecursionError as error:
        raise Unusable("the JSON is nested too deep. Flatten or drop it.") from error
    except Unusable:
        raise
    except ValueError as error:  # an integer of more digits than Python converts
        raise Unusable("a number has too many digits to be read. Mend or drop it.") from error


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) == len(pairs):
        return unique
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    raise Unusable(f"an object has the key {json.dumps(twice[:60])} twice. Keep one of the two.")


def _reject_constant(name: str) -> NoReturn:
    raise Unusable(f"{name} is not JSON. Write null or a number, or drop it.")


def json_or_text(text: str) -> object:
    """JSON text as a value; an empty cell is no value, and what is not JSON stays the text."""
    try:
        return parse_json(text) if text.strip() else None
    except Unusable:
        return text


def without_none(value: object) -> object:
    """Drops what tables fill in where a struct of the column lacks a key that another one has."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value


def shown(value: object) -> str:
    """`value` as an error message shows it: JSON, cut short, safe to print."""
    value = value[:80] if isinstance(value, str) else value
    text = json.dumps(value, ensure_ascii=False, default=repr)
    text = text if len(text) <= 60 else text[:59] + "…"
    return text.encode("utf-8", "backslashreplace").decode()


def is_deeper(value: list, levels: int) -> bool:
    """Whether lists and objects are nested in more than `levels` levels."""
    layer: list[list | dict] = [value]
    for _ in range(levels):
        items = (item.values() if isinstance(item, dict) else item for item in layer)
        layer = [child for item in items for child in item if isinstance(child, dict | list)]
        if not layer:
            return False
    return True
