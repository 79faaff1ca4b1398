"""Facts about each record, as a row of numbers: records are read one at a time and not kept."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kto_lightning.data.messages import KEYS_REPLACING_CONTENT
from kto_lightning.data.proposal.propose import is_rendered
from kto_lightning.data.records import Record, is_conversational
from kto_lightning.data.rows import BadRecord, SkippedRow
from kto_lightning.data.sources import Source, SourceLike, expand
from kto_lightning.data.texts import SYSTEM_ROLES
from kto_lightning.errors import DataError
from kto_lightning.reports.data.fields import Column, Places

MAX_SHOWN = 5
CALLS = ("tool_calls", "function_call")
DOTS = ("...", "…")

ROW = np.dtype(
    [
        ("desirable", np.bool_),
        ("prompt_key", np.int64),  # equal where prompt, tools and template settings are
        ("answer_key", np.int64),  # equal where the completion is, too
        ("prompt_characters", np.int64),
        ("completion_characters", np.int64),
        ("empty", np.bool_),
        ("chat", np.bool_),
        ("user_turns", np.int64),
        ("system", np.bool_),
        ("tools", np.bool_),
        ("tool_call", np.bool_),
        ("file", np.int32),
        ("line", np.int64),
        ("prompt_guessed", np.bool_),
        ("messages_left", np.bool_),
        ("plain_turns", np.bool_),  # plain text, and the completion begins a turn of its own
        ("dots", np.int8),  # characters of the `...` or `…` that the completion ends with
        ("dotted_key", np.int64),  # equal where such a completion is
    ]
)


MAX_KEYS = 8
KINDS = {bool: "boolean", int: "number", float: "number", str: "string", dict: "object"}


@dataclass(kw_only=True, slots=True)
class Facts:
    """The usable records of a source in file order, and the bad ones."""

    table: np.ndarray
    """Of dtype `ROW`, a row per record."""
    files: list[str]
    """File names, which the column `file` indexes."""
    bad: Places
    left_out: dict[str, int]
    """Rows that are left out, by the reason."""

    def __len__(self) -> int:
        return len(self.table)

    def place(self, row: int) -> str:
        """The place of a record, as `file:line`."""
        return f"{self.files[self.table['file'][row]]}:{self.table['line'][row]}"

    def places(self, rows: np.ndarray) -> Places:
        """The places of the records in these rows."""
        return Places(count=len(rows), first=[self.place(int(row)) for row in rows[:MAX_SHOWN]])


def gather_facts(records: Iterable[Record | BadRecord | SkippedRow]) -> Facts:
    """Read the records once."""
    bad = Places(count=0, first=[])
    left_out: dict[str, int] = {}
    files: dict[str, int] = {}

    def rows() -> Iterator[tuple]:
        for record in records:
            if isinstance(record, Record):
                yield _row(record, files.setdefault(record.file, len(files)))
                continue
            if isinstance(record, SkippedRow):
                left_out[record.why] = left_out.get(record.why, 0) + 1
                continue
            bad.count += 1
            if bad.count <= MAX_SHOWN:
                bad.first.append(str(record))

    return Facts(
        table=np.fromiter(rows(), dtype=ROW), files=list(files), bad=bad, left_out=left_out
    )


def records_of_dataset(records: datasets.Dataset) -> Iterator[Record]:
    """The records that `load_records` wrote as a data set."""
    for batch in records.iter(batch_size=1000):
        assert isinstance(batch, dict)
        for values in zip(*batch.values(), strict=True):
            row: dict[str, Any] = dict(zip(batch, values, strict=True))
            row["file"] = sys.intern(row["file"])
            yield Record(**json.loads(row.pop("record")), **row)


def _row(record: Record, file: int) -> tuple:
    prompt = [record.prompt, record.tools or None, record.chat_template_kwargs]
    messages = record.prompt if isinstance(record.prompt, list) else []
    answer = record.completion if isinstance(record.completion, list) else []
    roles = [message["role"] for message in messages]
    completion_text = visible_text(record.completion)
    dots = next((len(dots) for dots in DOTS if completion_text.endswith(dots)), 0)
    return (
        bool(record.desirable),
        _key(prompt),
        _key([*prompt, record.completion]),
        len(visible_text(record.prompt)),
        len(completion_text),
        not completion_text.strip(),
        is_conversational(record),
        roles.count("user"),
        any(role in SYSTEM_ROLES for role in roles),
        bool(record.tools),
        any(message.get(key) for message in answer for key in CALLS),
        file,
        record.line,
        record.prompt_guessed,
        record.messages_left,
        _is_plain_turns(record.prompt, record.completion),
        dots,
        _key(completion_text) if dots else 0,
    )


def _is_plain_turns(prompt: str | list[dict], completion: str | list[dict]) -> bool:
    if isinstance(prompt, list) or isinstance(completion, list):
        return False
    return not completion[:1].isspace() and bool(prompt.strip()) and not is_rendered(prompt)


def visible_text(text: str | list[dict]) -> str:
    """The text of a string or of messages, without the markup of a chat template."""
    if isinstance(text, str):
        return text
    return "".join(_message_text(message) for message in text)


def _message_text(message: dict) -> str:
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    other = [message[key] for key in KEYS_REPLACING_CONTENT if message.get(key)]
    return content + "".join(
        item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for item in other
    )


def _key(value: object) -> int:
    """64 bits of BLAKE2b of the value's JSON: with a million records P(collision) = 3e-8."""
    digest = blake2b(json.dumps(value, ensure_ascii=False).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@dataclass(slots=True)
class _ColumnScan:
    """Types, keys and number of the values of one column; dicts keep the order of occurrence."""

    kinds: dict[str, None] = field(default_factory=dict)
    keys: dict[str, None] = field(default_factory=dict)
    filled: int = 0

    def add(self, value: object) -> None:
        self.filled += 1
        items = value if isinstance(value, list) else [value]
        for item in items:
            if isinstance(item, dict):
                self.keys.update(dict.fromkeys(item))
        self.kinds[_kind(value)] = None

    def describe(self) -> str:
        """The type as text, such as `string | list of objects (role, content)`."""
        names = [str(key) for key in self.keys]
        shown = ", ".join(names[:MAX_KEYS]) + (", …" if len(names) > MAX_KEYS else "")
        return " | ".join(
            f"{kind} ({shown})" if "object" in kind and shown else kind for kind in self.kinds
        )


def published_columns(source: SourceLike) -> list[Column]:
    """The columns of all files of a source; of a hub data set those that training reads.

    Reads every row once more, because any row may have a further column.

    Raises:
        DataError: as `read_records`.
    """
    seen: dict[str, _ColumnScan] = {}
    for item in expand(source):
        if item.path is not None and item.path.suffix.lower() == ".parquet":
            _scan_parquet(item.path, seen)
        else:
            _scan_rows(item, seen)
    return [
        Column(name=name, type=column.describe(), filled=column.filled)
        for name, column in seen.items()
    ]


def _scan_rows(source: Source, seen: dict[str, _ColumnScan]) -> None:
    for row in source.rows(choose=None if source.downloads else list):
        if isinstance(row, BadRecord) or not isinstance(row.value, dict):
            continue
        for key, value in row.value.items():
            column = seen.setdefault(str(key), _ColumnScan())
            if value is not None:
                column.add(value)


def _scan_parquet(path: Path, seen: dict[str, _ColumnScan]) -> None:
    try:
        with pq.ParquetFile(path) as table:
            for column in table.schema_arrow:
                seen.setdefault(column.name, _ColumnScan()).kinds[str(column.type)] = None
            for batch in table.iter_batches():
                for key, values in zip(batch.schema.names, batch.columns, strict=True):
                    seen[key].filled += len(values) - values.null_count
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}. Check the file.") from error


def _kind(value: object) -> str:
    if not isinstance(value, list):
        return KINDS.get(type(value), type(value).__name__)
    if not value:
        return "empty list"
    plurals = {**KINDS, list: "list", type(None): "null"}
    kinds = dict.fromkeys(plurals.get(type(item), type(item).__name__) for item in value)
    return "list of " + " or ".join(f"{kind}s" for kind in kinds)
