"""The layouts of JSON files: lines, arrays, objects one after another, columns."""

import json
from pathlib import Path

import pytest

from kto_lightning.data.dataset import read_records
from kto_lightning.data.records import Record
from kto_lightning.data.rows import BadRecord
from kto_lightning.errors import DataError
from tests.data.rows import BAD, GOOD, PLAIN, USER

THREE = [PLAIN | {"prompt": f"Question {i}?", "label": i % 2 == 0} for i in range(3)]


def pretty(*rows: object) -> str:
    return "\n".join(json.dumps(row, indent=2) for row in rows) + "\n"


def read(tmp_path: Path, name: str, content: str) -> list[tuple[int, str, bool | None]]:
    path = tmp_path / name
    path.write_text(content)
    records = list(read_records(str(path)))
    assert all(isinstance(record, Record) for record in records), records
    return [(r.line, str(r.prompt), r.desirable) for r in records if isinstance(r, Record)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("".join(json.dumps(row) + "\n" for row in THREE), [1, 2, 3]),
        (json.dumps(THREE), [1, 2, 3]),
        (json.dumps(THREE, indent=1).replace("\n", "\r\n"), [1, 2, 3]),
        ("\ufeff \n" + json.dumps(THREE), [1, 2, 3]),
        (json.dumps(THREE[:2]) + "\n" + json.dumps(THREE[2:]), [1, 2, 3]),
        (pretty(*THREE), [1, 6, 11]),
        ("\n" + pretty(*THREE), [2, 7, 12]),
        ("".join(map(json.dumps, THREE)), [1, 1, 1]),
        (json.dumps({key: [row[key] for row in THREE] for key in PLAIN}), [1, 2, 3]),
        (json.dumps({k: {i * 7: r[k] for i, r in enumerate(THREE)} for k in PLAIN}), [1, 2, 3]),
        (json.dumps(dict(enumerate(THREE)), indent=1), [1, 2, 3]),
        (
            json.dumps(
                {"columns": [*PLAIN], "index": [0, 1, 2]} | {"data": [[*r.values()] for r in THREE]}
            ),
            [1, 2, 3],
        ),
    ],
    ids=[
        *("lines", "array", "array over lines", "after a mark", "two arrays", "objects"),
        *("objects after a line", "objects on a line", "columns", "pandas", "index", "split"),
    ],
)
def test_every_layout_gives_the_same_records(
    tmp_path: Path, name: str, content: str, lines: list[int]
) -> None:
    expected = [(line, row["prompt"], row["label"]) for line, row in zip(lines, THREE, strict=True)]
    assert read(tmp_path, name, content) == expected


def test_a_list_in_an_object_is_found_in_json_only(tmp_path: Path) -> None:
    content = {"version": 2, "rows": THREE}
    assert [line for line, *_ in read(tmp_path, "a.json", json.dumps(content))] == [1, 2, 3]
    (tmp_path / "a.jsonl").write_text(json.dumps(content))
    (bad,) = read_records(str(tmp_path / "a.jsonl"))
    assert isinstance(bad, BadRecord)
    assert bad.keys == ["version", "rows"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "completion": [GOOD], "label": [True]},
        {"messages": [USER, GOOD], "rating": 5},
        {"conversationId": "a", "messages": [USER, GOOD]},
        {"question": "a", "answer": "b", "sources": ["c"]},
        {"question": {"0": "a"}, "answer": {"1": "b"}},
        {"input": {"text": "a"}, "output": {"text": "b"}},
        {"0": "a", "1": "b"},
    ],
)
def test_one_object_with_lists_or_objects_is_one_record(tmp_path: Path, row: dict) -> None:
    (tmp_path / "a.json").write_text(pretty(row))
    read = list(read_records(str(tmp_path / "a.json")))
    assert {(record.file, record.line) for record in read} == {(str(tmp_path / "a.json"), 1)}
    assert len(read) == 2 if "chosen" in row else 1
    if isinstance(read[0], BadRecord):
        assert read[0].keys == list(row)


def test_lists_of_several_splits_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"train": THREE, "test": THREE}))
    with pytest.raises(DataError, match="must hold one array of records, or an object with a sing"):
        list(read_records(str(tmp_path / "a.json")))


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("a.json", json.dumps(THREE)[:-4] + "]", "1 2 1:"),
        ("a.json", json.dumps(THREE)[:-1], "1 2 3 1:"),
        ("a.json", json.dumps(THREE)[:-1] + ",]", "1 2 3 1:"),
        ("a.json", "[", "1:"),
        ("a.json", "[" * 100_000, "1:"),
        ("a.json", json.dumps(THREE) + "]", "1 2 3 1:"),
        ("a.json", pretty(THREE[0]) + '{\n"prompt": x}\n' + pretty(THREE[1]), "1 7:"),
        ("a.json", '{\n "prompt": "a",\n "completion": }\n', "3:"),
        (
            "a.json",
            '{"prompt": "a" "b"}\n' + pretty(*THREE).replace("\n", "").replace("}", "}\n"),
            "1: 2 3 4",
        ),
        ("a.json", '{"prompt": \n' + "".join(json.dumps(row) + "\n" for row in THREE), "1: 2 3 4"),
        ("a.jsonl", '{"prompt": \n{"label": \n' + json.dumps(PLAIN), "1: 2: 3"),
        ("a.jsonl", json.dumps(PLAIN) + "\n]\n" + json.dumps(PLAIN), "1 2: 3"),
        ("a.jsonl", "[1]\n" + json.dumps(PLAIN), "1: 2"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: str, read: str) -> None:
    """`read`: the lines of the records, those of bad ones with a colon."""
    (tmp_path / name).write_text(content)
    items = list(read_records(str(tmp_path / name)))
    assert (
        " ".join(f"{i.line}:" if isinstance(i, BadRecord) else str(i.line) for i in items) == read
    )


def test_text_in_another_encoding(tmp_path: Path) -> None:
    latin = json.dumps(PLAIN | {"prompt": "Café “bar”?"}, ensure_ascii=False).encode("cp1252")
    good = json.dumps(PLAIN).encode()
    (tmp_path / "a.json").write_bytes(b"[" + latin + b"," + good + b"]")
    (tmp_path / "a.jsonl").write_bytes(latin + b"\n" + good)
    for name, at in (("a.json", ""), ("a.jsonl", " (byte 0xe9 at offset 15)")):
        bad, record = read_records(str(tmp_path / name))
        assert isinstance(record, Record)
        assert isinstance(bad, BadRecord)
        assert bad.message == (
            f"not valid UTF-8{at}, perhaps Windows-1252. Convert the file: iconv -f CP1252 -t "
            f"UTF-8 {tmp_path / name} > converted{Path(name).suffix}"
        )
        assert (bad.line, bad.kind) == (1, "not valid UTF-8")
    damaged = json.dumps(PLAIN | {"prompt": "Café?"}, ensure_ascii=False).encode()
    (tmp_path / "a.jsonl").write_bytes(damaged.replace(b"?", b"\xe9") + b"\n" + good)
    bad, _ = read_records(str(tmp_path / "a.jsonl"))
    assert str(bad).endswith("Save the file as UTF-8.")
