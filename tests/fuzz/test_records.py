"""Records and files of records that nobody would write, through `inspect` and `fit`'s reading."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cli import small_model
from tests.support.factories import make_tokenizer, plain_records, save_model
from tests.support.fuzz import (
    ODD_TEXT,
    fuzz,
    mutated_bytes,
    mutated_json,
    run_within_bounds,
    to_json,
)

USER = {"role": "user", "content": "Is it raining?"}
ANSWER = {"role": "assistant", "content": "Yes, since noon."}
CALL = {"type": "function", "function": {"name": "sky", "arguments": {"at": "noon"}}}
TOOL = {"type": "function", "function": {"name": "sky", "parameters": {"type": "object"}}}
FORMS: tuple[dict[str, Any], ...] = (
    {"prompt": "Is it raining?", "completion": " Yes.", "label": True},
    {"prompt": [USER], "completion": [ANSWER], "label": False, "weight": 0.5},
    {"messages": [{"role": "system", "content": "Be short."}, USER, ANSWER], "label": 1},
    {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
    | {"tools": [TOOL], "label": "desirable", "chat_template_kwargs": {"enable_thinking": False}},
    {"conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "It is."}]}
    | {"system": "Be short.", "label": 0},
    {"prompt": "Is it?", "chosen": " Yes.", "rejected": " No."},
    {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "No."}]},
    {"prompt": [USER | {"content": [{"type": "text", "text": "Is it?"}]}]}
    | {"completion": [ANSWER | {"reasoning_content": "I look."}], "label": "👍"},
)


@pytest.fixture(scope="module", params=("plain", "qwen3"))
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory, without and with a chat template."""
    template = None if request.param == "plain" else request.param
    directory = tmp_path_factory.mktemp(request.param)
    return save_model(directory, "qwen2", make_tokenizer(chat_template=template))


@st.composite
def _records(draw: st.DrawFn) -> list[Any]:
    """Rows of one form or of several, most of them changed."""
    forms = draw(st.lists(st.sampled_from(FORMS), min_size=1, max_size=4))
    return [draw(st.one_of(st.just(form), mutated_json(form))) for form in forms]


@fuzz(60)
@given(records=_records())
def test_odd_records_are_read_or_named(
    tokenizer: Path, tmp_path_factory: pytest.TempPathFactory, records: list[Any]
) -> None:
    file = tmp_path_factory.mktemp("records") / "odd.jsonl"
    file.write_bytes(b"\n".join(map(to_json, records)) + b"\n")
    outcome = run_within_bounds("inspect", file, "--tokenizer", tokenizer, names="odd.jsonl")
    if outcome.status == 0:  # JSON has no NaN: its readers refuse one
        found = run_within_bounds("inspect", file, "--tokenizer", tokenizer, "--json")
        json.loads(found.out, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def _valid_files() -> dict[str, bytes]:
    """The same records in the formats of files, by their names' endings."""
    records = plain_records(4)
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    table = pa.Table.from_pylist(records)
    parquet, csv, arrow = (pa.BufferOutputStream() for _ in range(3))
    pyarrow.parquet.write_table(table, parquet)
    pyarrow.csv.write_csv(table, csv)
    with pa.ipc.new_stream(arrow, table.schema) as writer:
        writer.write_table(table)
    return {
        "jsonl": lines,
        "json": json.dumps(records).encode(),
        "csv": csv.getvalue().to_pybytes(),
        "parquet": parquet.getvalue().to_pybytes(),
        "arrow": arrow.getvalue().to_pybytes(),
        "ndjson": json.dumps({key: [row[key] for row in records] for key in records[0]}).encode(),
        "tsv": csv.getvalue().to_pybytes().replace(b",", b"\t"),
        "jsonl.gz": gzip.compress(lines, mtime=0),
        "json.zst": pa.compress(json.dumps(records, indent=1).encode(), "zstd", asbytes=True),
    }


VALID_FILES = _valid_files()


@st.composite
def _files(draw: st.DrawFn) -> tuple[str, bytes]:
    """(ending, content): damaged, or with another format's ending."""
    ending, content = draw(st.sampled_from(sorted(VALID_FILES.items())))
    if draw(st.booleans()):
        content = draw(mutated_bytes(content))
    else:
        ending = draw(st.sampled_from((*VALID_FILES, "txt", "JSONL", "zip", "bin")))
    return ending, content


@fuzz(60)
@given(file=_files())
def test_damaged_files_are_read_or_named(
    tmp_path_factory: pytest.TempPathFactory, file: tuple[str, bytes]
) -> None:
    ending, content = file
    path = tmp_path_factory.mktemp("files") / f"odd.{ending}"
    path.write_bytes(content)
    run_within_bounds("inspect", path, names=path.name)


CELLS = {
    pa.string(): ODD_TEXT,
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.uint64(): st.integers(0, 2**64 - 1),
    pa.float64(): st.floats(),
    pa.bool_(): st.booleans(),
    pa.binary(): st.binary(max_size=20),
    pa.timestamp("us"): st.integers(-(2**62), 2**62),
    pa.timestamp("ns", tz="UTC"): st.integers(-(2**62), 2**62),
    pa.date32(): st.integers(-(2**31), 2**31 - 1),
    pa.time64("us"): st.integers(0, 10**10),
    pa.duration("s"): st.integers(-(2**62), 2**62),
    pa.decimal128(20, 4): st.decimals(-1000, 1000, places=4),
    pa.list_(pa.string()): st.lists(ODD_TEXT, max_size=3),
    pa.map_(pa.string(), pa.int32()): st.lists(st.tuples(ODD_TEXT, st.integers(-5, 5)), max_size=2),
    pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})): st.lists(
        st.fixed_dictionaries({"role": ODD_TEXT, "content": ODD_TEXT}), max_size=3
    ),
}
"""Types that a column of a table may have, and cells of each."""


@st.composite
def _tables(draw: st.DrawFn) -> pa.Table:
    """A table with the columns of a record, one or two of them of another type."""
    size = draw(st.integers(1, 3))
    columns = {"prompt": ["Is it?"] * size, "completion": [" Yes."] * size, "label": [True] * size}
    table = pa.table(columns)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from((*columns, "weight", "messages", "tools", "system", "when")))
        kind = draw(st.sampled_from(list(CELLS)))
        cells = draw(st.lists(st.one_of(st.none(), CELLS[kind]), min_size=size, max_size=size))
        column = pa.array(cells, kind)
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, column)
    return table


@fuzz(40)
@given(table=_tables())
def test_odd_tables_are_read_or_named(
    tmp_path_factory: pytest.TempPathFactory, table: pa.Table
) -> None:
    file = tmp_path_factory.mktemp("tables") / "odd.parquet"
    pyarrow.parquet.write_table(table, file)
    run_within_bounds("inspect", file, names="odd.parquet")


@fuzz(12)
@given(records=_records())
def test_fit_trains_on_odd_records_or_names_them(
    tmp_path_factory: pytest.TempPathFactory, records: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("fit")
    file = folder / "odd.jsonl"
    file.write_bytes(b"\n".join(map(to_json, records)) + b"\n")
    policy = tmp_path_factory.getbasetemp() / "fuzzed_policy"
    if not policy.exists():
        small_model(policy)
    run_within_bounds(
        *("fit", "--model.policy", policy, "--data.train", file, "--output_dir", folder / "out"),
        *("--trainer.accelerator", "cpu", "--trainer.max_steps", 1, "--data.batch_size", 2),
        names=("odd.jsonl", "--data.", "--model.", "template"),
    )
