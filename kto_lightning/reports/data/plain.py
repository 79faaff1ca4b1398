"""Dataclasses of plain values from the dicts and lists that JSON stores."""

from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_MOST = 2**53
"""No number of a report is as large."""


def from_plain(kind: Any, value: Any) -> Any:
    """A dataclass from dicts, or a plain value unchanged."""
    if get_origin(kind) in (Union, UnionType):
        some = [option for option in get_args(kind) if option is not NoneType]
        return None if value is None else from_plain(some[0], value)
    if get_origin(kind) is list:
        return [from_plain(get_args(kind)[0], item) for item in _checked(list, value)]
    if get_origin(kind) is dict:
        kinds = get_args(kind)
        items = _checked(dict, value).items()
        return {from_plain(kinds[0], name): from_plain(kinds[1], item) for name, item in items}
    made: Any = get_origin(kind) or kind
    if not isinstance(made, type) or not is_dataclass(made):
        return _checked(kind, value)
    hints = get_type_hints(made)
    field_type = get_args(kind)  # of PerClass[int]: int for both fields
    known = {name: field_type[0] if field_type else hints[name] for name in value if name in hints}
    make: Any = made
    return make(**{name: from_plain(hint, value[name]) for name, hint in known.items()})


def _checked(kind: Any, value: Any) -> Any:
    """A plain value, if it is of that type."""
    kinds = {float: (int, float), str: (str,), int: (int,), bool: (bool,)}
    kinds |= {list: (list,), dict: (dict,)}
    fits = isinstance(value, kinds.get(kind, (object,)))
    if get_origin(kind) is Literal:
        fits = value in get_args(kind)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        fits = fits and abs(value) < _MOST
    if not fits or (kind in (int, float) and isinstance(value, bool)):
        raise TypeError(f"{value!r:.60} is no {kind}")
    return value
