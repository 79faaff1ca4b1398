"""Rows of the tests of this folder, and readers of one row."""

import json
from pathlib import Path

from kto_lightning.data.dataset import read_records
from kto_lightning.data.records import Record
from kto_lightning.data.sources import BadRecord

USER = {"role": "user", "content": "Is it raining?"}
GOOD = {"role": "assistant", "content": "Yes."}
BAD = {"role": "assistant", "content": "Perhaps."}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "sky", "arguments": {"at": None}}}],
}
PLAIN = {"prompt": "Is it raining?", "completion": " Yes.", "label": True}
DEEP = '{"prompt": "a", "completion": "b", "label": true, "tools": [%s]}'


def jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def read_one(tmp_path: Path, row: object) -> Record:
    (record,) = read_records(jsonl(tmp_path / "one.jsonl", row))
    assert isinstance(record, Record), record
    return record


def message_of(tmp_path: Path, row: object) -> str:
    (bad,) = read_records(jsonl(tmp_path / "one.jsonl", row))
    assert isinstance(bad, BadRecord)
    assert (bad.file, bad.line) == (str(tmp_path / "one.jsonl"), 1)
    return bad.message
