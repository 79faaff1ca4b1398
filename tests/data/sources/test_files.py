"""Compressed files, and files that are something else than their extension says."""

import bz2
import gzip
import io
import json
import lzma
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from kto_lightning.data.dataset import read_records
from kto_lightning.data.rows import BadRecord
from kto_lightning.data.sources import expand
from kto_lightning.errors import DataError
from tests.data.rows import PLAIN

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda raw: pa.compress(raw, "zstd", asbytes=True),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
LINES = (json.dumps(PLAIN) + "\n").encode() * 3
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HTML = b"\n<!DOCTYPE html>\n<html><body>404: not found</body></html>\n"


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES),
        ("a.json", json.dumps([PLAIN] * 3).encode()),
        ("a.csv", b"prompt;completion;label\n" + b"Is it raining?; Yes.;1\n" * 3),
        ("a.tsv", b"prompt\tcompletion\tlabel\n" + b"Is it raining?\t Yes.\t1\n" * 3),
    ],
)
def test_compressed_texts(tmp_path: Path, name: str, content: bytes, suffix: str) -> None:
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(COMPRESS[suffix](content))
    records = list(read_records(f"{tmp_path}/*{suffix}"))
    assert [(r.file, r.prompt, r.completion, r.desirable) for r in records] == [
        (str(path), *PLAIN.values())
    ] * 3


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_of_several_parts(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](LINES) * 2)
    assert len(list(read_records(f"{tmp_path}/a.jsonl{suffix}"))) == 6


@pytest.mark.parametrize("suffix", COMPRESS)
def test_damaged_compressed_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](LINES * 1000)[:-20])
    with pytest.raises(DataError, match=r"cannot be unpacked: .*\. It is cut off, damaged, or not"):
        list(read_records(str(path)))
    path.write_bytes(LINES)
    with pytest.raises(DataError, match=f"is not compressed as its extension '{suffix}' says"):
        list(read_records(str(path)))
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"a.jsonl.*: empty, 0 bytes"):
        list(read_records(str(path)))
    path.write_bytes(COMPRESS[suffix](gzip.compress(LINES)))
    with pytest.raises(DataError, match="is compressed twice"):
        list(read_records(str(path)))
    path.with_suffix("").write_bytes(COMPRESS[suffix](LINES))
    with pytest.raises(DataError, match=f"is compressed. Rename it to {tmp_path}/a.jsonl{suffix}."):
        list(read_records(str(path.with_suffix(""))))


ZIP = io.BytesIO()
with zipfile.ZipFile(ZIP, "w") as archive:
    archive.writestr("a.jsonl", LINES)


TABLES, TEXTS = ("a.parquet", "a.arrow"), ("a.jsonl", "a.csv", "a.json")
ALL = (*TEXTS, *TABLES)
TEXT = LINES.decode()
UTF16 = TEXT.encode("utf-16")
OTHERS: list[tuple[tuple[str, ...], bytes, str]] = [
    ((*ALL, "a.json.gz"), LFS, "{} is a git-LFS pointer: .* Run `git lfs pull`"),
    ((*ALL, "a.json.gz"), HTML, "{} is a web page .* Download the file again."),
    (("a.jsonl.gz",), gzip.compress(HTML), "{} is a web page"),
    ((*ALL, "a.json.gz"), ZIP.getvalue(), "{} is a zip archive. Unpack it"),
    (("a.zip",), ZIP.getvalue(), "{}: unknown extension '.zip'; .* Unpack it."),
    (TEXTS, b"PAR1....", "{} is a parquet file. Rename it so that it ends in .parquet."),
    (
        ("a.jsonl", "a.json"),
        LINES.replace(b"\n", b"\r"),
        "{}: its lines end with a carriage .* tr ",
    ),
    (TEXTS, UTF16, "{} is UTF-16 text, .*: iconv -f UTF-16 -t UTF-8 {} >"),
    (TEXTS, TEXT.encode("utf-16-be"), "{} is UTF-16BE text, .*: iconv -f UTF-16BE -t"),
    (TEXTS, TEXT.encode("utf-32"), "{} is UTF-32 text"),
    (("a.csv.gz",), gzip.compress(UTF16), "{} is UTF-16 text, .* UTF-8 [^ ]*/a.csv >"),
    (ALL, b"", "{}: empty, 0 bytes. Check that its download or export"),
    (TABLES, LINES, "{} cannot be read: "),
]


@pytest.mark.parametrize(("names", "content", "message"), OTHERS, ids=range(len(OTHERS)))
def test_other_files(tmp_path: Path, names: tuple[str, ...], content: bytes, message: str) -> None:
    for name in names:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=message.replace("{}", str(path))):
            list(read_records(str(path)))


def test_an_empty_part_is_no_error(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.jsonl.gz", "c.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "d.jsonl").write_bytes(LINES)
    assert len(list(read_records(f"{tmp_path}/*"))) == 3


def test_choose_decides_where_columns_are_stored_apart(tmp_path: Path) -> None:
    row = PLAIN | {"rating": 5, "created": 1}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "saved")
    shutil.copy(next((tmp_path / "saved").glob("*.arrow")), tmp_path / "a.arrow")
    for name in ("a.parquet", "a.arrow", "saved"):
        (source,) = expand(str(tmp_path / name))
        asked = []

        def choose(columns: list[str], asked: list = asked) -> list[str]:
            asked.append(columns)
            return ["rating"]

        (all_,) = source.rows(choose=list)
        (default,) = source.rows()
        (chosen,) = source.rows(choose=choose)
        assert not isinstance(all_, BadRecord)
        assert not isinstance(default, BadRecord)
        assert not isinstance(chosen, BadRecord)
        assert (all_.value, default.value, chosen.value) == (row, PLAIN, {"rating": 5})
        assert asked == [list(row)]
