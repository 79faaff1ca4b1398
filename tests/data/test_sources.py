"""Every kind of source, and every way in which one can be damaged."""

import gzip
import json
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kto_lightning.data import sources
from kto_lightning.data.dataset import read_records
from kto_lightning.data.records import Record, is_conversational
from kto_lightning.data.rows import BadRecord
from kto_lightning.errors import DataError
from tests.data.rows import CALL, DEEP, GOOD, PLAIN, USER, jsonl, message_of, read_one


def test_jsonl_gives_physical_lines_and_skips_empty_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = json.dumps(PLAIN)
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\n   \n{line}".encode())
    assert [(record.file, record.line) for record in read_records(str(path))] == [
        (str(path), 1),
        (str(path), 4),
    ]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    record = read_one(tmp_path, PLAIN | {"completion": "a\u2028b\u0085c"})
    assert record.completion == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([PLAIN, PLAIN], indent=2),
        json.dumps({"version": 2, "data": [PLAIN, PLAIN]}),
        json.dumps(PLAIN) + "\n" + json.dumps(PLAIN),
    ],
)
def test_json_is_an_array_or_holds_one_or_is_lines(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    assert [record.line for record in read_records(str(path))] == [1, 2]


def test_one_json_object_is_one_record(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"messages": [USER, GOOD], "label": 0}))
    (record,) = read_records(str(path))
    assert isinstance(record, Record)
    assert not record.desirable


def test_csv_rows_may_span_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        'prompt, completion,label,weight,extra\n"two\nlines",,TRUE,,x\n\n"say ""hi""",hi,0,2.5,y\n'
    )
    first, second = read_records(str(path))
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert (first.prompt, first.completion, first.desirable) == ("two\nlines", "", True)
    assert (first.line, first.weight) == (2, 1.0)
    assert (second.prompt, second.line, second.desirable) == ('say "hi"', 5, False)
    assert second.weight == 2.5


def test_csv_cells_may_hold_messages(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "sky"}}]
    row = {"prompt": json.dumps([USER]), "completion": json.dumps([CALL]), "label": "undesirable"}
    row |= {"tools": json.dumps(tools), "chat_template_kwargs": '{"thinking": false}'}
    path = tmp_path / "a.csv"
    datasets.Dataset.from_list([row]).to_csv(path)
    (record,) = read_records(str(path))
    assert isinstance(record, Record)
    assert (record.prompt, record.completion) == ([USER], [CALL])
    assert (record.tools, record.chat_template_kwargs) == (tools, {"thinking": False})
    assert is_conversational(record)


@pytest.mark.parametrize("text", ["[1, 2]", "[] or not", "[{}]", "[{"])
def test_a_cell_that_only_begins_like_messages_is_text(tmp_path: Path, text: str) -> None:
    pq.write_table(pa.Table.from_pylist([PLAIN | {"prompt": text}]), tmp_path / "a.parquet")
    (record,) = read_records(str(tmp_path / "a.parquet"))
    assert isinstance(record, Record)
    assert record.prompt == text
    assert not is_conversational(record)


def test_parquet_structs_lose_what_was_filled_in(tmp_path: Path) -> None:
    other = CALL | {"tool_calls": [{"type": "function", "function": {"name": "sea", "tide": 1}}]}
    rows = [
        {"messages": [USER, CALL | {"name": "bot"}], "label": 1.0},
        {"messages": [USER, other], "label": 0.0},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read_records(str(tmp_path / "a.parquet"))
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert first.prompt == second.prompt == [USER]
    assert second.completion == [other]
    function = {"name": "sky", "arguments": {}}
    assert first.completion == [
        CALL | {"name": "bot", "tool_calls": [{"type": "function", "function": function}]}
    ]
    assert (first.line, second.line) == (1, 2)


def test_parquet_of_json_columns_is_faithful(tmp_path: Path) -> None:
    """`datasets` writes lists of unequal objects as lists of JSON texts."""
    source = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": [USER], "completion": [CALL], "label": True},
        {"prompt": [USER], "completion": [GOOD], "label": False},
    )
    cache = str(tmp_path / "cache")
    dataset = datasets.load_dataset("json", data_files=source, split="train", cache_dir=cache)
    assert isinstance(dataset, datasets.Dataset)
    dataset.to_parquet(tmp_path / "a.parquet")
    completions = [
        record.completion
        for record in read_records(str(tmp_path / "a.parquet"))
        if isinstance(record, Record)
    ]
    assert completions == [[CALL], [GOOD]]


def test_globs_and_lists_keep_an_order(tmp_path: Path) -> None:
    files = [jsonl(tmp_path / f"{name}.jsonl", PLAIN) for name in "bac"]
    glob = str(tmp_path / "*.jsonl")
    assert [record.file for record in read_records(glob)] == sorted(files)
    assert [record.file for record in read_records([files[2], glob])] == [files[2], *sorted(files)]


def test_a_hub_data_set_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [PLAIN, {**PLAIN, "label": False, "prompt": json.dumps([USER])}]
    hub = datasets.Dataset.from_list([row | {"score": 1.0} for row in rows])
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return hub

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records = list(read_records("some-owner/some.set"))
    assert set(asked) == {("some-owner/some.set", "train")}
    assert [(record.file, record.line) for record in records] == [
        ("some-owner/some.set", 1),
        ("some-owner/some.set", 2),
    ]
    assert isinstance(records[1], Record)
    assert records[1].completion == [{"role": "assistant", "content": " Yes."}]


def test_an_unreachable_hub_names_both_possibilities() -> None:
    with pytest.raises(DataError, match=r"neither a file here nor a data set .*from the hub") as e:
        list(read_records("some-owner/nowhere"))
    assert str(e.value).endswith("Check the path, or the id and the connection.")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no.jsonl", "there is no file '{0}/no.jsonl', and it cannot be a hub data set"),
        ("", "{0} is a directory. Name its files, such as '{0}/*.jsonl'."),
        ("*.jsonl", "no file matches '{0}/*.jsonl'. Check the pattern and the directory."),
        (
            "a.txt",
            "{0}/a.txt: unknown extension '.txt'; .jsonl, .ndjson, .json, .csv, .tsv are read",
        ),
        ("a.parquet.gz", "{0}/a.parquet.gz: unknown extension '.parquet.gz'"),
        (
            "empty.json",
            "{0}/empty.json: empty, 0 bytes. Check that its download or export is complete.",
        ),
        ("blank.csv", "{0}/blank.csv: no record in there. Check that it is the right file."),
        ("twice.csv", "{0}/twice.csv:1: a column is named twice: label, label. Rename one."),
        ("open.csv", "{0}/open.csv:1: invalid CSV header (unexpected end of data)."),
        ("bad.parquet", "{0}/bad.parquet cannot be read: Parquet magic bytes not found"),
        ("lists.json", "{0}/lists.json must hold one array of records, or an object with"),
        ("x" * 300, "the data files cannot be found: [Errno 36] File name too long"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "a.txt").write_text("{}")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"{}"))
    (tmp_path / "empty.json").touch()
    (tmp_path / "blank.csv").write_text("\n\n")
    (tmp_path / "twice.csv").write_text("label,label\n1,1\n")
    (tmp_path / "open.csv").write_text('"label\n1,1\n')
    (tmp_path / "bad.parquet").write_text("not a parquet file at all")
    (tmp_path / "lists.json").write_text('{"train": [], "test": []}')
    with pytest.raises(DataError) as error:
        list(read_records(f"{tmp_path}/{source}" if source else str(tmp_path)))
    assert str(error.value).startswith(message.format(tmp_path))


def test_no_source_at_all() -> None:
    with pytest.raises(DataError, match="the list of data files is empty"):
        list(read_records([]))
    with pytest.raises(DataError, match="there is no file ''"):
        list(read_records(""))
    with pytest.raises(DataError, match="the name is not UTF-8"):
        sources.expand("owner/\udcff")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": ', "invalid JSON (Expecting value, column 12). Fix or remove it."),
        (b'{"prompt": "\xff"}', "not valid UTF-8 (byte 0xff at offset 12). Save the file as"),
        (b'{"weight": NaN}', "NaN is not JSON. Write null or a number, or drop it."),
        (
            b'{"label": 1, "label": 0}',
            'an object has the key "label" twice. Keep one of the two.',
        ),
        (b'{"weight": ' + b"9" * 5000 + b"}", "a number has too many digits to be read."),
        (b"[" * 100_000, "the JSON is nested too deep. Flatten or drop it."),
        (
            (DEEP % ('{"a": ' * 150 + "1" + "}" * 150)).encode(),
            "nested deeper than 100 levels. Flatten or drop it.",
        ),
        (
            b'{"prompt": "\\ud83d", "completion": "b", "label": true}',
            "the text contains an unpaired surrogate (\\ud83d). Fix or remove it.",
        ),
        (
            (DEEP % '{"a": 1e999}').encode(),
            "a value cannot be written as JSON (Out of range float values are not JSON compliant",
        ),
        (b'"\\ud83d"', 'a record must be a JSON object, got "\\ud83d". Drop or wrap it.'),
    ],
)
def test_lines_that_are_not_json(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(PLAIN).encode() + b"\n" + line + b"\n" + json.dumps(PLAIN).encode())
    good, bad, last = read_records(str(path))
    assert isinstance(good, Record)
    assert isinstance(bad, BadRecord)
    assert isinstance(last, Record)
    assert str(bad).startswith(f"{path}:2: {message}")
    assert last.line == 3


def test_a_broken_array_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(f'[\n  {json.dumps(PLAIN)},\n  {{"prompt": }}\n]')
    good, bad = read_records(str(path))
    assert isinstance(good, Record)
    problem = (
        "invalid JSON (Expecting value, column 14). Fix or remove it. Nothing after it is read."
    )
    assert str(bad) == f"{path}:3: {problem}"


def test_broken_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'prompt,completion,label\na,b\n"a"x,b,1\n\xff,b,1\na,b,1\na,b,\n"open,b,1\nmore'
    )
    assert [str(record).removeprefix(f"{path}:") for record in read_records(str(path))][:3] == [
        "2: 3 cells are needed, one per column, got 2. Check commas and quotes, or drop the line.",
        "3: invalid CSV (',' expected after '\"'). Check the quotes, or drop the line.",
        "4: not valid UTF-8. Save the file as UTF-8.",
    ]
    *_, good, unlabelled, unclosed = read_records(str(path))
    assert isinstance(good, Record)
    assert good.line == 5
    assert str(unlabelled).startswith(f"{path}:6: 'label' must be true or false, got null.")
    assert str(unclosed).startswith(f"{path}:7: invalid CSV (unexpected end of data).")


def test_parquet_values_that_json_cannot_carry(tmp_path: Path) -> None:
    text = pa.StringArray.from_buffers(  # what a careless writer may leave: bytes, not UTF-8
        2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")
    )
    tools = pa.array([[{"a": b"\0"}], None])
    columns = {"prompt": text, "completion": ["a", "b"], "label": [1, 1], "tools": tools}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    first, second = read_records(str(tmp_path / "a.parquet"))
    assert isinstance(first, BadRecord)
    assert first.message.startswith("a value cannot be written as JSON (Object of type bytes")
    assert isinstance(second, BadRecord)
    assert second.message == "a text is not valid UTF-8. Fix or remove the row."


def test_a_line_of_ten_megabytes(tmp_path: Path) -> None:
    long = "word " * 2_000_000
    assert read_one(tmp_path, PLAIN | {"completion": long}).completion == long
    message = message_of(tmp_path, PLAIN | {"label": long})
    assert len(message) < 200
    (tmp_path / "a.csv").write_text(f"prompt,completion,label\na,{long},1\n")
    (record,) = read_records(str(tmp_path / "a.csv"))
    assert isinstance(record, Record)
    assert record.completion == long


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    source = jsonl(tmp_path / "a.jsonl", PLAIN)
    for name in ("~/a.jsonl", "~/*.jsonl"):
        assert [record.file for record in read_records(name)] == [source]
    with pytest.raises(DataError, match=f"there is no file '{tmp_path}/b.jsonl'"):
        list(read_records("~/b.jsonl"))
    (tmp_path / "~").mkdir()
    jsonl(tmp_path / "~/b.jsonl", PLAIN)
    assert [record.file for record in read_records("~/b.jsonl")] == ["~/b.jsonl"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([2**62, -(2**62)], pa.timestamp("us")),
        ([2**62, -(2**62)], pa.timestamp("us", tz="UTC")),
        ([1, 2], pa.timestamp("us", tz="Mars/Base")),
        ([2**31 - 1, -(2**31)], pa.date32()),
        ([2**62, -(2**62)], pa.duration("s")),
        ([[2**62], None], pa.list_(pa.timestamp("us"))),
        ([{"at": 2**62}, None], pa.struct([("at", pa.timestamp("us"))])),
    ],
)
def test_parquet_values_that_python_cannot_hold(
    tmp_path: Path, values: list, kind: pa.DataType
) -> None:
    path = tmp_path / "a.parquet"
    columns = {"prompt": ["a", "b"], "completion": ["c", "d"], "label": [True, False]}
    pq.write_table(pa.table(columns | {"weight": pa.array(values, kind)}), path)
    first = next(iter(read_records(str(path))))
    assert isinstance(first, BadRecord)
    assert first.message.startswith("'weight' ")
    assert "that cannot be read" in first.message or "got" in first.message
    assert (first.file, first.line) == (str(path), 1)
    pq.write_table(pa.table({"prompt": ["a", "b"], "created": pa.array(values, kind)}), path)
    first = next(iter(read_records(str(path))))
    assert isinstance(first, BadRecord)
    assert first.message.startswith("'completion' is missing; the record has prompt, created.")


def test_decimals_of_parquet_are_numbers(tmp_path: Path) -> None:
    decimals = {"label": [Decimal("1.00"), Decimal("0.00")], "weight": [Decimal("0.5")] * 2}
    table = pa.table({"prompt": ["a", "b"], "completion": ["c", "d"]} | decimals)
    pq.write_table(table, tmp_path / "a.parquet")
    records = list(read_records(str(tmp_path / "a.parquet")))
    assert [(r.desirable, r.weight) for r in records if isinstance(r, Record)] == [
        (True, 0.5),
        (False, 0.5),
    ]


def test_a_parquet_file_with_a_column_twice(tmp_path: Path) -> None:
    columns = [pa.array(["a"])] * 2
    pq.write_table(pa.Table.from_arrays(columns, ["prompt", "prompt"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a column is named twice: prompt, prompt"):
        list(read_records(str(tmp_path / "a.parquet")))


def test_columns_that_are_not_asked_for_are_named_where_one_is_missing(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a"], "completion": ["b"], "rating": [5]})
    pq.write_table(table, tmp_path / "a.parquet")
    (bad,) = read_records(str(tmp_path / "a.parquet"))
    assert isinstance(bad, BadRecord)
    assert bad.message.startswith("'label' is missing; the record has prompt, completion, rating.")
