"""Tables in text files: separators, and headers that are none."""

from pathlib import Path

import pytest

from kto_lightning.data.dataset import read_records
from kto_lightning.data.records import Record
from kto_lightning.data.rows import BadRecord
from kto_lightning.errors import DataError


def read(path: Path, content: str) -> list[tuple[int, object, object, bool | None]]:
    path.write_bytes(content.encode())
    records = list(read_records(str(path)))
    assert all(isinstance(record, Record) for record in records), records
    return [(r.line, r.prompt, r.completion, r.desirable) for r in records if isinstance(r, Record)]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_the_separator_is_found_outside_quotes(tmp_path: Path, separator: str, suffix: str) -> None:
    cells = [["prompt", "completion", "label"], ['"a,b;c\t|', '\nd,;"', "1"], ["e", '"f,,,,"', "0"]]
    content = "".join(separator.join(row) + "\r\n" for row in cells)
    content = content.replace('"a,b;c\t|' + separator, '"a,b;c\t|"' + separator + '"')
    assert read(tmp_path / f"a{suffix}", content) == [
        (2, "a,b;c\t|", "\nd,;", True),
        (4, "e", "f,,,,", False),
    ]


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        ("prompt;completion;label\na, b, c;d;1\ne, f, g;h;0\n", "a, b, c"),
        ("prompt,completion,label\na;b;c,d|e|f,1\n", "a;b;c"),
        ("prompt|completion|label|note, or two\na|b|1|c, d\n", "a"),
        ("prompt\tcompletion\tlabel\na, b\tc;d\t1\n", "a, b"),
        ("prompt,completion,label\ra,b,1\r", "a"),
        ("sep=;\nprompt;completion;label\na,b;c;1\n", "a,b"),
        ('\ufeff"sep=|"\r\nprompt|completion|label\r\na|b|1\r\n', "a"),
    ],
)
def test_separators_of_mixed_texts(tmp_path: Path, content: str, prompt: str) -> None:
    assert read(tmp_path / "a.csv", content)[0][1] == prompt


def test_a_declared_separator_keeps_the_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sep=;\nprompt;completion;label\na;b;1\nc;d\n")
    record, bad = read_records(str(tmp_path / "a.csv"))
    assert record.line == 3
    assert isinstance(bad, BadRecord)
    assert str(bad).startswith(f"{tmp_path}/a.csv:4: 3 cells are needed")


@pytest.mark.parametrize(
    "header", ["prompt^completion^label", "prompt completion label", "prompt:label", "a\u00a6b"]
)
def test_an_unknown_separator_is_named(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\nx\n")
    with pytest.raises(DataError, match=r"a.csv:1: the header is a single column, .* must be sep"):
        list(read_records(str(tmp_path / "a.csv")))


def test_one_column_is_a_table_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user_prompt-1.b\nx\n")
    (bad,) = read_records(str(tmp_path / "a.csv"))
    assert isinstance(bad, BadRecord)
    assert bad.keys == ["user_prompt-1.b"]


def test_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("prompt,completion,label\nCafé?,“Oui”,1\n".encode("cp1252"))
    (bad,) = read_records(str(path))
    convert = f"perhaps Windows-1252. Convert the file: iconv -f CP1252 -t UTF-8 {path} > converted"
    assert str(bad).startswith(f"{path}:2: not valid UTF-8, {convert}.csv")
    path.write_bytes("prompt,réponse,label\na,b,1\n".encode("cp1252"))
    with pytest.raises(DataError) as error:
        list(read_records(str(path)))
    assert str(error.value).startswith(f"{path}:1: not valid UTF-8, {convert}.csv")
