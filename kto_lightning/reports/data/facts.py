"""What the report needs to know of each record: a hundred bytes of numbers, so that texts may go.

A table of one row per record is kept instead of the records, which are read one at a time.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import datasets
import numpy as np

from kto_lightning.data.dataset import BadRecord, Record, is_conversational
from kto_lightning.data.messages import SPEAKS_WITHOUT_CONTENT
from kto_lightning.reports.data.fields import Places

MOST_SHOWN = 5
CALLS = ("tool_calls", "function_call")
SYSTEM_ROLES = ("system", "developer")

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
    ]
)


@dataclass(kw_only=True, slots=True)
class Facts:
    """All usable records of a source in their order, and what was said of the others."""

    table: np.ndarray
    """Of dtype `ROW`, a row per record."""
    files: list[str]
    """What the table's `file` counts through."""
    bad: Places

    def __len__(self) -> int:
        return len(self.table)

    def place(self, row: int) -> str:
        """Where a record was written, as `file:line`."""
        return f"{self.files[self.table['file'][row]]}:{self.table['line'][row]}"

    def places(self, rows: np.ndarray) -> Places:
        """The records of these rows, the first few named."""
        return Places(count=len(rows), first=[self.place(int(row)) for row in rows[:MOST_SHOWN]])


def gather_facts(records: Iterable[Record | BadRecord]) -> Facts:
    """Go through the records once."""
    bad = Places(count=0, first=[])
    files: dict[str, int] = {}

    def rows() -> Iterator[tuple]:
        for record in records:
            if isinstance(record, Record):
                yield _row(record, files.setdefault(record.file, len(files)))
                continue
            bad.count += 1
            if bad.count <= MOST_SHOWN:
                bad.first.append(str(record))

    return Facts(table=np.fromiter(rows(), dtype=ROW), files=list(files), bad=bad)


def records_of_dataset(records: datasets.Dataset) -> Iterator[Record]:
    """The records that `load_records` wrote as a data set."""
    for batch in records.iter(batch_size=1000):
        assert isinstance(batch, dict)
        columns = (batch[name] for name in ("record", "desirable", "weight", "file", "line"))
        for content, desirable, weight, file, line in zip(*columns, strict=True):
            yield Record(
                **json.loads(content),
                desirable=desirable,
                weight=weight,
                file=sys.intern(file),
                line=line,
            )


def _row(record: Record, file: int) -> tuple:
    prompt = [record.prompt, record.tools or None, record.chat_template_kwargs]
    messages = record.prompt if isinstance(record.prompt, list) else []
    answer = record.completion if isinstance(record.completion, list) else []
    roles = [message["role"] for message in messages]
    completion_text = visible_text(record.completion)
    return (
        record.desirable,
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
    )


def visible_text(text: str | list[dict]) -> str:
    """What is written in a text or in messages, without the marks that a template would add."""
    if isinstance(text, str):
        return text
    return "".join(_message_text(message) for message in text)


def _message_text(message: dict) -> str:
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    said = [message[key] for key in SPEAKS_WITHOUT_CONTENT if message.get(key)]
    return content + "".join(
        item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for item in said
    )


def _key(value: object) -> int:
    """64 bits of BLAKE2b of the value's JSON: two of a million share a key once in 10^7 files."""
    digest = blake2b(json.dumps(value, ensure_ascii=False).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
