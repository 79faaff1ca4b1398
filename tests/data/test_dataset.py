"""The cached data set: columns, fingerprint, errors, real data and random input."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kto_lightning.data.dataset import load_records, read_records
from kto_lightning.data.records import Record
from kto_lightning.data.rows import BadRecord
from kto_lightning.data.sources.files import FileSource
from kto_lightning.errors import DataError
from tests.data.rows import CALL, DEEP, PLAIN, QUICK, ROWS, USER, check_yields, jsonl


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
    assert dataset.column_names == [
        "record",
        "desirable",
        "weight",
        "file",
        "line",
        "prompt_guessed",
        "messages_left",
    ]
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
        patch.setattr(FileSource, "rows", None)  # parsing again would fail
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
    why = (
        "'label' must be true or false, got null. Drop the line or give it a label; "
        "--data.unlabeled skip leaves such lines out."
    )
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


def test_records_that_fail_alike_are_one_message_with_all_columns(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "b", name: i} for i, name in enumerate(("first", "second"))
    ]
    source = jsonl(tmp_path / "a.jsonl", *rows * 50)
    with pytest.raises(DataError) as error:
        cached(tmp_path, source)
    assert str(error.value).splitlines() == [
        f"none of the 100 records can be used, in {source}, all for one reason:",
        f"  {source}:1: 'label' is missing; the record has prompt, completion, first. Drop the "
        "line or give it a label.",
        "The columns are prompt, completion, first, second.",
        "Nothing says which answers are good, although prompts have several: add a column with a "
        "judgement, such as `label`: true or false.",
        "Nothing has been trained.",
    ]
    (tmp_path / "a.jsonl").write_text("{\n[\n")
    with pytest.raises(DataError, match="2 of 2 records cannot be used"):
        cached(tmp_path, source)
    jsonl(tmp_path / "a.jsonl", *rows, {"prompt": "a", "label": True})
    with pytest.raises(DataError, match="3 of 3 records cannot be used"):
        cached(tmp_path, source)


def test_labels_may_be_missing_where_they_are_not_needed(tmp_path: Path) -> None:
    labels = [{"label": True}, {}, {"label": None}, {"label": 4}, {"label": "no"}]
    text = {"prompt": "a", "completion": "b"}
    source = jsonl(tmp_path / "a.jsonl", *(text | label for label in labels))
    records = load_records(source, cache_dir=str(tmp_path / "cache"), labels_needed=False)
    assert records["desirable"][:] == [True, None, None, None, False]
    with pytest.raises(DataError, match="3 of 5 records cannot be used"):
        cached(tmp_path, source)


def test_an_object_of_many_keys_is_read_in_linear_time(tmp_path: Path) -> None:
    keys = ", ".join(f'"key {i}": {i}' for i in range(200_000))
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{{keys}, "key 199999": 0}}\n{{{keys}}}\n')
    start = time.process_time()
    twice, unknown = read_records(str(path))
    assert time.process_time() - start < 20  # 600 s when the keys were counted one by one
    assert isinstance(twice, BadRecord)
    assert twice.message.startswith('an object has the key "key 199999" twice.')
    assert isinstance(unknown, BadRecord)
    assert "key 0, key 1," in unknown.message
    assert "key 39 and 199,960 more" in unknown.message
