"""Rows of the tests of this folder, random ones too, and readers of them."""

import contextlib
import json
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from kto_lightning.data.dataset import read_records
from kto_lightning.data.records import Record
from kto_lightning.data.rows import BadRecord
from kto_lightning.data.sources.record_columns import COLUMNS
from kto_lightning.errors import DataError

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


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), inner)
        | st.dictionaries(st.text(), inner, max_size=4)
    ),
    max_leaves=12,
)
ROWS = st.dictionaries(st.sampled_from(COLUMNS), JSON_VALUES) | JSON_VALUES
QUICK = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def check_yields(path: Path) -> None:
    """Reading gives records, bad records or a DataError, and nothing else."""
    with contextlib.suppress(DataError):
        for record in read_records(str(path)):
            assert isinstance(record, Record | BadRecord)
            if isinstance(record, BadRecord):
                assert str(record).startswith(f"{path}:{record.line}: ")
                str(record).encode()
