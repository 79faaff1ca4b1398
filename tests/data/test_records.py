"""Every source, form and label; every way in which they can be wrong; the cache."""

import contextlib
import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from trl.data_utils import extract_prompt

from kto_lightning.data import sources
from kto_lightning.data.dataset import (
    BadRecord,
    Record,
    is_conversational,
    load_records,
    read_records,
)
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


# Sources


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
    assert asked == [("some-owner/some.set", "train")]
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
        ("a.txt", "{0}/a.txt: unknown extension '.txt'; .jsonl, .ndjson, .json, .csv, .parquet"),
        ("a.jsonl.gz", "{0}/a.jsonl.gz: unknown extension '.gz'"),
        ("empty.json", "{0}/empty.json: no record in there. Check that it is the right file."),
        ("empty.csv", "{0}/empty.csv: no record in there."),
        ("twice.csv", "{0}/twice.csv:1: a column is named twice: label, label. Rename one."),
        ("open.csv", "{0}/open.csv:1: invalid CSV header (unexpected end of data)."),
        ("bad.parquet", "{0}/bad.parquet cannot be read: Parquet magic bytes not found"),
        ("lists.json", "{0}/lists.json must hold one array of records, or an object with"),
        ("x" * 300, "the data files cannot be found: [Errno 36] File name too long"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "a.txt").write_text("{}")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    (tmp_path / "empty.json").touch()
    (tmp_path / "empty.csv").touch()
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


# Forms


@pytest.mark.parametrize(
    ("label", "desirable"),
    [
        *((True, True), (False, False), (1, True), (0, False), (1.0, True), (0.0, False)),
        *(("desirable", True), ("Undesirable", False), ("true", True), ("FALSE", False)),
        *(("1", True), (" 0 ", False)),
    ],
)
def test_labels(tmp_path: Path, label: object, desirable: bool) -> None:
    assert read_one(tmp_path, PLAIN | {"label": label}).desirable is desirable


def test_a_plain_record(tmp_path: Path) -> None:
    record = read_one(tmp_path, PLAIN | {"context": {"ignored": True}})
    expected = Record(
        prompt="Is it raining?",
        completion=" Yes.",
        desirable=True,
        weight=1.0,
        tools=None,
        chat_template_kwargs={},
        file=str(tmp_path / "one.jsonl"),
        line=1,
    )
    assert record == expected


def test_a_chat_record_keeps_what_templates_may_ask_for(tmp_path: Path) -> None:
    said = {"role": "tool", "content": "wet", "name": "sky", "tool_call_id": "1"}
    thought = GOOD | {"reasoning": "It is wet."}
    tools = [{"type": "function", "function": {"name": "sky", "b": 1, "a": None}}]
    row = {"prompt": [USER, CALL, said | {"tool_calls": None}], "completion": [thought]}
    record = read_one(tmp_path, row | {"label": True, "tools": json.dumps(tools), "weight": 2})
    assert record.prompt == [USER, CALL, said]
    assert record.completion == [thought]
    assert record.tools == tools
    assert record.weight == 2.0


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_the_last_turn_of_the_assistant_is_the_completion(tmp_path: Path, key: str) -> None:
    record = read_one(tmp_path, {key: [USER, BAD, USER, GOOD, USER], "label": False})
    assert record.prompt == [USER, BAD, USER]
    assert record.completion == [GOOD]


def test_sharegpt_is_translated(tmp_path: Path) -> None:
    call = {"name": "sky", "arguments": {"at": "noon"}}
    turns = [("system", "Be brief."), ("human", "Rain?"), ("function_call", json.dumps(call))]
    turns += [("observation", "wet"), ("gpt", "Yes.")]
    row = {"conversations": [{"from": name, "value": text} for name, text in turns], "label": 1}
    record = read_one(tmp_path, row)
    assert record.prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": call}],
        },
        {"role": "tool", "content": "wet"},
    ]
    assert record.completion == [GOOD]


def test_text_beside_messages_becomes_a_turn(tmp_path: Path) -> None:
    for prompt, completion in (([USER], GOOD["content"]), (USER["content"], [GOOD])):
        row = {"prompt": prompt, "completion": completion, "label": True}
        record = read_one(tmp_path, row)
        assert (record.prompt, record.completion) == ([USER], [GOOD])


def read_pair(tmp_path: Path, row: dict) -> tuple:
    path = jsonl(tmp_path / "pair.jsonl", PLAIN, row | {"weight": 3})
    _, chosen, rejected = read_records(path)
    assert isinstance(chosen, Record)
    assert isinstance(rejected, Record)
    assert chosen.prompt == rejected.prompt
    assert (chosen.desirable, rejected.desirable) == (True, False)
    assert chosen.weight == rejected.weight == 3
    assert chosen.line == rejected.line == 2
    return chosen.prompt, chosen.completion, rejected.completion


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Rain?", " Yes.", " No."),
        ([USER], [GOOD], [BAD]),
        (USER["content"], [GOOD], [BAD]),
        ([USER], GOOD["content"], BAD["content"]),
        # Whole conversations beside their prompt
        (USER["content"], [USER, GOOD], [USER, BAD]),
        ([USER], [USER, GOOD], [USER, BAD]),
        (None, [USER, GOOD], [USER, BAD]),
    ],
)
def test_a_pair_becomes_two_records(
    tmp_path: Path, prompt: object, chosen: object, rejected: object
) -> None:
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "label": None}
    expected = ([USER], [GOOD], [BAD])
    if isinstance(prompt, str) and isinstance(chosen, str):
        expected = (prompt, chosen, rejected)
    assert read_pair(tmp_path, row) == expected


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("The sky is blue.", "The sky is green."),
        ("The sky is bright.", "The sky is blue."),
        ("same", "same"),
        ("a b", "a b c"),
        ("a b c", "a b"),
        ("a ", "a b"),
        ([USER, GOOD, USER, GOOD], [USER, GOOD, USER, BAD]),
        ([USER, GOOD], [USER, GOOD]),
        ([USER, GOOD], [USER, GOOD, USER, BAD]),
    ],
)
def test_a_missing_prompt_is_found_as_trl_finds_it(
    tmp_path: Path, chosen: str | list, rejected: str | list
) -> None:
    ours = read_pair(tmp_path, {"chosen": chosen, "rejected": rejected})
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert ours == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


def test_pairs_without_a_common_beginning_have_no_prompt(tmp_path: Path) -> None:
    # TRL would look at the character before the first and cut off the last one.
    assert read_pair(tmp_path, {"chosen": "b ", "rejected": "c"}) == ("", "b ", "c")
    assert read_pair(tmp_path, {"chosen": "", "rejected": "c"}) == ("", "", "c")


# Bad records


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            PLAIN | {"label": None},
            "'label' must be true or false, got null. Drop the line or give it a label.",
        ),
        (
            PLAIN | {"label": "maybe"},
            """'label' must be true or false, got "maybe". Drop the line or give it a label.""",
        ),
        (
            PLAIN | {"label": 2},
            "'label' must be true or false, got 2. Drop the line or give it a label.",
        ),
        (
            {"prompt": "a", "completion": "b"},
            "'label' is missing. Drop the line or give it a label.",
        ),
        (
            {"prompt": "a", "label": True, "text": "b"},
            "'completion' is missing; the record has \"prompt, label\". Drop the line or add it.",
        ),
        (
            {"question": "a"},
            "'prompt' is missing; the record has \"question\". Drop the line or add it.",
        ),
        (PLAIN | {"prompt": None}, "'prompt' is null. Drop the line or fill it in."),
        (
            PLAIN | {"prompt": 7},
            "'prompt' must be a string or a non-empty list of messages, got 7. "
            "Fix or remove the line.",
        ),
        (
            PLAIN | {"completion": []},
            "'completion' must be a string or a non-empty list of messages, got []. "
            "Fix or remove the line.",
        ),
        (
            {"messages": "hello", "label": True},
            "'messages' must be a non-empty list of messages, got \"hello\". "
            "Fix or remove the line.",
        ),
        (
            PLAIN | {"prompt": [USER, "a"]},
            "'prompt[1]' must be an object with 'role' and 'content', got \"a\". "
            "Fix or remove the line.",
        ),
        (
            PLAIN | {"prompt": [{"role": "user", "content": None}]},
            "'prompt[0].content' must be text (null only beside 'tool_calls'), got null. "
            "Fix or remove the line.",
        ),
        (
            PLAIN | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            "'prompt[0].content' must be text (null only beside 'tool_calls'), "
            'got [{"type": "image"}]. Fix or remove the line.',
        ),
        (PLAIN | {"prompt": [USER | {"role": 1}]}, "'prompt[0].role' must be a name, got 1."),
        (
            {"conversations": [{"from": "cat", "value": "miaow"}], "label": True},
            "'conversations[0].from' must be one of human, user, gpt,",
        ),
        (
            {"messages": [USER], "label": True},
            "no message is the assistant's: nothing to judge. Drop the line.",
        ),
        (
            {"messages": [GOOD], "label": True},
            "no message stands before the completion. Add a prompt or drop the line.",
        ),
        ({"prompt": "a", "chosen": "b"}, "'rejected' is missing; the record has"),
        (
            {"chosen": "b", "rejected": [GOOD]},
            "'chosen' and 'rejected' must both be text or both messages. Fix the line.",
        ),
        (
            PLAIN | {"tools": "{not json"},
            "'tools' must be a list of objects, got \"{not json\". Fix or remove it.",
        ),
        (
            PLAIN | {"chat_template_kwargs": [1]},
            "'chat_template_kwargs' must be an object, got [1]. Fix it.",
        ),
        (
            PLAIN | {"chat_template_kwargs": {"tokenize": False}},
            "'chat_template_kwargs' may not set tokenize: tokenization sets it. Remove it.",
        ),
        (
            PLAIN | {"weight": -1},
            "'weight' must be a positive, finite number, got -1. Fix it, or omit it for 1.0.",
        ),
        ([1], "a record must be a JSON object, got [1]. Drop or wrap it."),
    ],
)
def test_bad_records_say_what_they_got_and_what_to_do(
    tmp_path: Path, row: object, message: str
) -> None:
    assert message_of(tmp_path, row).startswith(message)


@pytest.mark.parametrize("weight", [0, True, "heavy", 1e-50, 1e39, 10**400, [1], "nan"])
def test_bad_weights(tmp_path: Path, weight: object) -> None:
    assert message_of(tmp_path, PLAIN | {"weight": weight}).startswith("'weight' must be")


@pytest.mark.parametrize("label", [-1, 0.5, "", "yes", [True], {}, 10**400])
def test_bad_labels(tmp_path: Path, label: object) -> None:
    assert message_of(tmp_path, PLAIN | {"label": label}).startswith("'label' must be")


DEEP = '{"prompt": "a", "completion": "b", "label": true, "tools": [%s]}'


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
            "the text holds half a character (\\ud83d). Fix or remove it.",
        ),
        (
            (DEEP % '{"a": 1e999}').encode(),
            "a value cannot be written as JSON (Out of range float values are not JSON compliant",
        ),
        (b'"\\ud83d"', 'a record must be a JSON object, got "\\ud83d". Drop or wrap it.'),
    ],
)
def test_lines_that_are_no_json(tmp_path: Path, line: bytes, message: str) -> None:
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
    path.write_text('[\n  {"prompt": "a"},\n  {"prompt": }\n]')
    (bad,) = read_records(str(path))
    assert str(bad) == f"{path}:3: invalid JSON (Expecting value, column 14). Fix or remove it."


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


# The data set


def cached(tmp_path: Path, source: str | list[str]) -> datasets.Dataset:
    return load_records(source, cache_dir=str(tmp_path / "cache"))


def test_the_columns_of_the_data_set(tmp_path: Path) -> None:
    tools = [{"z": 1, "a": "ä"}]
    source = jsonl(
        tmp_path / "a.jsonl",
        PLAIN,
        {"messages": [USER, CALL], "label": 0, "tools": tools, "weight": 0.5},
    )
    dataset = cached(tmp_path, source)
    assert dataset.column_names == ["record", "desirable", "weight", "file", "line"]
    assert dataset["desirable"][:] == [True, False]
    assert dataset["weight"][:] == [1.0, 0.5]
    assert dataset["file"][:] == [source, source]
    assert dataset["line"][:] == [1, 2]
    assert json.loads(dataset[0]["record"]) == {
        "prompt": "Is it raining?",
        "completion": " Yes.",
        "tools": None,
        "chat_template_kwargs": {},
    }
    assert json.loads(dataset[1]["record"])["completion"] == [CALL]
    assert '"tools": [{"z": 1, "a": "ä"}]' in dataset[1]["record"]


def test_the_cache_follows_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = jsonl(tmp_path / "a.jsonl", PLAIN)
    first = cached(tmp_path, source)
    os.utime(source, (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr("kto_lightning.data.dataset.read_rows", None)  # parsing again would fail
        again = cached(tmp_path, source)
    assert again._fingerprint == first._fingerprint
    assert again[:] == first[:]
    stamp = os.stat(source)
    jsonl(tmp_path / "a.jsonl", PLAIN | {"label": False})
    os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    changed = cached(tmp_path, source)
    assert changed["desirable"][:] == [False]
    assert changed._fingerprint != first._fingerprint
    with monkeypatch.context() as patch:
        patch.setattr("kto_lightning.data.dataset.FORMAT_VERSION", 0)
        assert cached(tmp_path, source)._fingerprint != changed._fingerprint


def test_the_fingerprint_is_that_of_any_process(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", PLAIN)
    script = (
        "import sys; from kto_lightning.data.dataset import load_records; "
        "print(load_records(sys.argv[1], cache_dir=sys.argv[2])._fingerprint)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, source, str(tmp_path / "other-cache")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert result.stdout.strip() == cached(tmp_path, source)._fingerprint


def test_bad_records_are_counted_and_leave_no_cache(tmp_path: Path) -> None:
    bad = PLAIN | {"label": None}
    source = jsonl(tmp_path / "a.jsonl", PLAIN, *[bad] * 7, PLAIN)
    why = "'label' must be true or false, got null. Drop the line or give it a label."
    for _ in range(2):
        with pytest.raises(DataError) as error:
            cached(tmp_path, source)
        assert str(error.value).splitlines() == [
            f"7 of 9 records cannot be used, in {source}:",
            *[f"  {source}:{line}: {why}" for line in range(2, 7)],
            "  … and 2 more",
            "Fix or remove them and start again; nothing has been trained.",
        ]
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    jsonl(tmp_path / "a.jsonl", PLAIN)
    assert len(cached(tmp_path, source)) == 1


def test_other_errors_come_through_the_cache(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no record in there"):
        cached(tmp_path, str(tmp_path / "empty.jsonl"))
    source = jsonl(tmp_path / "a.jsonl", PLAIN)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="the cache of parsed records cannot be written"):
        load_records(source, cache_dir=str(tmp_path / "file" / "cache"))


@pytest.mark.parametrize(
    ("name", "desirable", "undesirable", "chat"),
    [
        ("claudesidian_1000.jsonl", 746, 254, False),
        ("claudesidian_1000_raw.jsonl", 746, 254, True),
        ("toolcalls_2386.jsonl", 1344, 1042, True),
        ("kto_en_demo_300.jsonl", 150, 150, True),
        ("kto_en_demo_300_raw.json", 150, 150, True),
        ("gsm8k_solutions_5276.jsonl", 2001, 3275, False),
    ],
)
def test_real_data(
    tmp_path: Path, shared_data: Path, name: str, desirable: int, undesirable: int, chat: bool
) -> None:
    dataset = cached(tmp_path, str(shared_data / name))
    assert Counter(dataset["desirable"][:]) == {True: desirable, False: undesirable}
    assert dataset["line"][:] == list(range(1, len(dataset) + 1))
    assert isinstance(json.loads(dataset[0]["record"])["prompt"], list) is chat


def test_raw_and_prepared_conversations_are_the_same_records(shared_data: Path) -> None:
    raw, prepared = (
        [record for record in read_records(str(shared_data / name)) if isinstance(record, Record)]
        for name in ("kto_en_demo_300_raw.json", "kto_en_demo_300.jsonl")
    )
    assert len(raw) == 300
    for ours, expected in zip(raw, prepared, strict=True):
        assert (ours.prompt, ours.completion) == (expected.prompt, expected.completion)
        assert ours.desirable == expected.desirable


def test_texts_are_those_that_datasets_reads(tmp_path: Path, shared_data: Path) -> None:
    """TRL's users load the same file so; whatever a chat template sees must be the same."""
    source = str(shared_data / "toolcalls_2386.jsonl")
    cache = str(tmp_path / "cache")
    rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=cache)
    assert isinstance(rows, datasets.Dataset)
    for record, row in zip(read_records(source), rows, strict=True):
        assert isinstance(record, Record)
        expected = {key: dict(row)[key] for key in ("prompt", "completion")}
        ours = {"prompt": record.prompt, "completion": record.completion}
        assert json.dumps(ours) == json.dumps(expected)  # the order of keys too


# Fuzzing

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), inner)
        | st.dictionaries(st.text(), inner, max_size=4)
    ),
    max_leaves=12,
)
ROWS = st.dictionaries(st.sampled_from(sources.COLUMNS), JSON_VALUES) | JSON_VALUES
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


@QUICK
@given(st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet"]), st.binary(max_size=300))
@example("a.csv", b'prompt,completion,label\n"\n\0,"a"b\r,\xff')
@example("a.json", b"\xef\xbb\xbf{}\n{}")
def test_any_bytes(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    check_yields(tmp_path / name)


@QUICK
@given(st.lists(ROWS, max_size=4))
def test_any_json(tmp_path: Path, rows: list[object]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check_yields(path)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    check_yields(tmp_path / "a.json")


@QUICK
@given(st.integers(1, 20_000), st.sampled_from(["[", '{"a":', '{"prompt":[']))
def test_any_nesting(tmp_path: Path, depth: int, opener: str) -> None:
    path = tmp_path / "a.jsonl"
    closer = "".join({"[": "]", "{": "}"}.get(char, "") for char in reversed(opener))
    inner = opener * depth + "1" + closer * depth
    path.write_text(inner + "\n" + DEEP % inner + "\n")
    check_yields(path)
