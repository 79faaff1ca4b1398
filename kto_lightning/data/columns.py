"""Columns by name and path: which column of a file holds which field of a record.

A path names a place inside a column: `fields.prompt`, `responses.quality.0.value`; `*` stands for
all elements of a list. A key of the row that is spelled like the path comes first, because keys
with dots exist. JSON text in a cell is read where a path goes into it.
"""

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

from kto_lightning.data.aliases import Alias, aliases_of
from kto_lightning.data.sources.record_columns import COLUMNS
from kto_lightning.data.strict_json import parse_json_or_text, quote
from kto_lightning.data.turns import judged_turns, rename_messages, role_of
from kto_lightning.errors import ConfigError

Getter = Callable[[Any], object]
MISSING = object()
"""What a path finds in a row that has nothing at its place."""
MAX_PATH_DEPTH = 20
SOUGHT_KEYS = 5000
"""Paths among which the nearest one to a wrong path is sought."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Columns of the file by the fields of a record: a name, or a path such as fields.prompt.

    Args:
        prompt: the question: text or messages.
        completion: the answer: text or messages.
        messages: a conversation whose last assistant turn is the answer.
        label: the judgement.
        weight: a weight or confidence of the record, a positive number.
        system: the system prompt.
        chosen: the better answer of a pair.
        rejected: the worse answer of a pair.
        tools: the tools of a conversation.
        role: inside a message: its speaker, where that is not role or from.
        content: inside a message: its text, where that is not content or value.
    """

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    label: str | None = None
    weight: str | None = None
    system: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    tools: str | None = None
    role: str | None = None
    content: str | None = None

    def __post_init__(self) -> None:
        given = self.given()
        for field, path in given.items():
            if not path or path.count(".") >= MAX_PATH_DEPTH:
                raise ConfigError(
                    f"--data.columns.{field} must be a column or a path such as fields.{field}, "
                    f"got {quote(path)}."
                )
        for one, other in (("messages", "completion"), ("chosen", "completion")):
            if one in given and other in given:
                raise ConfigError(
                    f"--data.columns.{one} and --data.columns.{other} both name the answer. "
                    "Give one of the two."
                )

    def given(self) -> dict[str, str]:
        """The paths that are given, by field."""
        return {field: path for field, path in asdict(self).items() if path is not None}


IN_MESSAGES = ("role", "content")
FIELDS = tuple(field.name for field in fields(Columns) if field.name not in IN_MESSAGES)
TEXT_FIELDS = frozenset({"prompt", "completion", "messages", "chosen", "rejected"})
NATIVE_NAMES = {**{field: (field,) for field in FIELDS}, "messages": ("messages", "conversations")}
"""The columns that are read as a field without being asked for."""
_OVERRIDES = {
    "prompt": ("prompt",),
    "completion": ("completion", "messages", "conversations", "chosen", "rejected"),
    "messages": ("prompt", "completion", "messages", "conversations", "chosen", "rejected"),
    "chosen": ("completion", "label", "chosen"),
    "rejected": ("completion", "label", "rejected"),
    "system": ("system", "system_prompt"),
}
"""Columns of the row that a named one takes the place of."""


class ColumnMapping:
    """Turns the rows of one file into rows whose keys are the fields of a record.

    Args:
        columns: the columns that are named.
        keys: the keys of the file's first rows, which decide what is read without being asked for.
    """

    def __init__(self, columns: Columns | None, keys: Iterable[str]) -> None:
        given = {} if columns is None else columns.given()
        self._message_paths = {key: given.pop(key) for key in IN_MESSAGES if key in given}
        self._in_messages = {key: _getter(path) for key, path in self._message_paths.items()}
        keys = dict.fromkeys(keys)
        aliases = aliases_beside(given, keys)
        self.found: dict[str, bool] = dict.fromkeys([*given, *self._message_paths], False)
        """Whether a row had something at the path given for a field."""
        self.hides = {f for f in given if any(name in keys for name in NATIVE_NAMES[f])}
        """Fields with a given path whose own columns are there too, and not read."""
        aliased = {field: path for alias in aliases for field, path in alias.fields.items()}
        self.paths = {**_same_but_for_case(keys, {**aliased, **given}), **aliased, **given}
        """Where fields are read that are not read by their names: a path, or a function of the
        row."""
        self._getters = [(field, _getter(path)) for field, path in self.paths.items()]
        self._replaced = {name for field in given for name in _OVERRIDES.get(field, (field,))}
        self._replaced |= {name for alias in aliases for name in alias.replaces}
        self._judgement_of = self._turn_judgement()

    def _turn_judgement(self) -> Getter | None:
        """What finds the judgement in a message, where the label's path goes into the messages."""
        messages, label = self.paths.get("messages", "messages"), self.paths.get("label")
        if not isinstance(label, str) or not label.startswith(f"{messages}.*."):
            return None
        get = _getter(label.removeprefix(f"{messages}.*."))
        return lambda message: None if (found := get(message)) is MISSING else found

    @property
    def note(self) -> str | None:
        """Which columns are read as which fields, for a person; None: those of the same names."""
        shown = [f"{field} <- {name}" for field, name in self._names() if name != field]
        return f"read as: {', '.join(shown)}" if shown else None

    def _names(self) -> Iterator[tuple[str, str]]:
        for field, path in {**self.paths, **self._message_paths}.items():
            yield field, quote(path)[1:-1] if isinstance(path, str) else str(path.__doc__)

    def name_columns(self, message: str) -> str:
        """An error message about fields, with the columns that they are read from."""
        read = [f"'{f}' is read from '{n}'" for f, n in self._names() if f"'{f}'" in message]
        return f"{message} ({', '.join(read)}.)" if read else message

    @property
    def renames(self) -> bool:
        """Whether a field is read from elsewhere than the column of its name."""
        return bool(self._getters or self._in_messages)

    def rows_of(self, row: dict) -> Iterable[dict]:
        """A row by fields, or one for each judged turn of its conversation.

        Raises:
            RecordError: as `judged_turns`.
        """
        fields = self.fields_of(row)
        if self._judgement_of is None:
            return [fields]
        return judged_turns(fields, self._judgement_of)

    def fields_of(self, row: dict) -> dict:
        """A row by fields; columns that are not read keep their names."""
        if not self.renames:
            return row
        named = {key: value for key, value in row.items() if key not in self._replaced}
        for field, get in self._getters:
            value = get(row)
            if value is not MISSING:
                named[field] = value
                if field in self.found:
                    self.found[field] = True
        if self._in_messages:
            for field in (*TEXT_FIELDS, "conversations"):
                if field in named:
                    named[field] = rename_messages(named[field], self._rename)
        return named

    def _rename(self, message: dict) -> dict:
        """A message with `role` and `content`."""
        found = {key: get(message) for key, get in self._in_messages.items()}
        found = {key: value for key, value in found.items() if value is not MISSING}
        self.found.update(dict.fromkeys(found, True))
        if "role" in found:
            found["role"] = role_of(found["role"])
        return {**message, **found}

    def columns_to_read(self, columns: list[str]) -> list[str]:
        """Those of a table's columns that records are read from."""
        if any(not isinstance(path, str) for path in self.paths.values()):
            return columns
        paths = [str(path) for path in self.paths.values()]
        return [c for c in columns if c in COLUMNS or _is_inside(c, paths)]

    def label_columns(self, columns: list[str]) -> list[str]:
        """Those of a table's columns that the label is read from."""
        path = self.paths.get("label", "label")
        return [c for c in columns if not isinstance(path, str) or _is_inside(c, [path])]


def filled_keys(rows: Iterable[object]) -> dict[str, None]:
    """The keys that rows have with another value than null."""
    return dict.fromkeys(
        str(key)
        for row in rows
        if isinstance(row, dict)
        for key, value in row.items()
        if value is not None
    )


def aliases_beside(given: Mapping[str, str], keys: Iterable[str]) -> list[Alias]:
    """The forms of other tools that columns have, beside the columns that are named."""
    aliases = aliases_of(keys)
    if given.keys() & TEXT_FIELDS:  # texts are where they are said to be
        aliases = [alias for alias in aliases if not alias.fields.keys() & TEXT_FIELDS]
    return aliases


def _is_inside(column: str, paths: Iterable[str]) -> bool:
    return any(path == column or path.startswith(f"{column}.") for path in paths)


def _same_but_for_case(keys: Iterable[str], given: Collection[str]) -> dict[str, str]:
    """Columns such as `Prompt`, by the field that they are if nothing else is."""
    keys = list(keys)
    found: dict[str, str] = {}
    for field, names in NATIVE_NAMES.items():
        if field in given or any(name in keys for name in names):
            continue
        same = [key for key in keys if key.strip().casefold() in names]
        if len(same) == 1:
            found[field] = same[0]
    return found


def _getter(path: str | Getter) -> Getter:
    """A function from a row to what a path leads to, or to `MISSING`."""
    if not isinstance(path, str):
        return path
    if "." not in path:
        return lambda row: row.get(path, MISSING)
    parts = path.split(".")
    getter: Getter = lambda value: value  # noqa: E731
    getters = [getter]  # of what follows each part, from the last one
    for start in reversed(range(len(parts))):
        # Longer literal keys come first: `rating.responses` is a column of some exports.
        keys = [
            (".".join(parts[start:end]), getters[len(parts) - end])
            for end in range(len(parts), start, -1)
        ]
        getters.append(partial(_step, parts[start], keys))
    return getters[-1]


def _step(part: str, keys: list[tuple[str, Getter]], value: object) -> object:
    """What the rest of a path leads to; a list of all values under a `*`."""
    if isinstance(value, str):
        value = parse_json_or_text(value)
    if isinstance(value, dict):
        for key, follow in keys:
            if key in value:
                found = follow(value[key])
                if found is not MISSING:
                    return found
    elif isinstance(value, list):
        follow = keys[-1][1]
        if part == "*":
            found = [item for item in map(follow, value) if item is not MISSING]
            nested = [item if isinstance(item, list) else [item] for item in found]
            return [item for items in nested for item in items]
        index = int(part) if part.isascii() and part.isdigit() and len(part) < 10 else None
        if index is not None and index < len(value):
            return follow(value[index])
    return MISSING


def paths_of(row: object, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """The names of a row's columns and of the values inside them."""
    if isinstance(row, str) and row[:1] in ("{", "[") and depth:
        row = parse_json_or_text(row)
    items: Iterable[tuple[str, object]] = ()
    if isinstance(row, dict):
        items = ((str(key), value) for key, value in row.items())
    elif isinstance(row, list):
        items = ((str(index), value) for index, value in enumerate(row[:1]))
    for key, value in items if depth < 8 else ():
        yield f"{prefix}{key}"
        yield from paths_of(value, f"{prefix}{key}.", depth + 1)


def unknown_path_error(field: str, path: str, seen: Iterable[str], where: str) -> ConfigError:
    """The error for a path that no row has; `seen`: the paths that rows have."""
    known = list(dict.fromkeys(seen))[:SOUGHT_KEYS]
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    last = path.rpartition(".")[2]
    near = near or [other for other in known if other.rpartition(".")[2] == last]
    columns = [name for name in known if "." not in name] or known
    hint = f"The nearest is {quote(near[0])[1:-1]}" if near else "It is none of the columns"
    shown = ", ".join(quote(name)[1:-1] for name in columns[:40])
    return ConfigError(
        f"--data.columns.{field} {quote(path)[1:-1]}: no record of {where} has it. {hint}. "
        f"The columns are {shown}."
    )
