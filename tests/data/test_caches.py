"""Caches of records and token ids: damaged ones are made again, changing files leave none."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kto_lightning.data import dataset
from kto_lightning.data.dataset import load_records
from kto_lightning.data.examples import ExampleSet
from kto_lightning.data.tokenize import tokenize_records
from kto_lightning.errors import DataError
from tests.data.rows import PLAIN, jsonl
from tests.support.factories import make_tokenizer, plain_records, write_jsonl

TOKENIZER = make_tokenizer()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "other": lambda path: path.write_bytes(b'{"a": ['),
    "gone": Path.unlink,
    "directory": replace_by_directory,
}


def load(source: Path, cache: Path) -> ExampleSet:
    records = load_records(str(source), cache_dir=str(cache))
    return tokenize_records(records, TOKENIZER, max_length=None)


def contents(examples: ExampleSet) -> tuple:
    rows = [examples[index] for index in range(len(examples))]
    ids = [(row.prompt_ids.tolist(), row.completion_ids.tolist()) for row in rows]
    return examples.records[:], ids


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "a.jsonl"
    write_jsonl(path, plain_records(30))
    return path


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("0.0.0/dataset_info.json", "parsed records"),
        ("0.0.0/generator-train.arrow", "parsed records"),
        ("0.0.0/cache-*.arrow", "token ids"),
        ("records.hashes", "parsed records"),
        ("0.0.0/cache-*.hashes", "token ids"),
    ],
)
def test_a_damaged_cache_is_made_again(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    pattern: str,
    what: str,
    damage: str,
) -> None:
    cache = tmp_path / "cache"
    expected = contents(load(source, cache))
    (path,) = cache.glob(f"generator/*/{pattern}")
    DAMAGE[damage](path)
    capsys.readouterr()
    assert contents(load(source, cache)) == expected
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"warning: the cache of {what} in {cache}")
    assert contents(load(source, cache)) == expected
    assert "warning" not in capsys.readouterr().err


def test_more_workers_add_to_the_cache(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = load_records(str(source), cache_dir=str(tmp_path))
    for num_workers in (1, 2, 1, 2):
        tokenize_records(records, TOKENIZER, max_length=None, num_workers=num_workers)
    assert "warning" not in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_named(source: Path, tmp_path: Path) -> None:
    records = load_records(str(source), cache_dir=str(tmp_path))
    directory = Path(records.cache_files[0]["filename"]).parent
    shutil.rmtree(directory)
    directory.write_text("a file")
    with pytest.raises(DataError, match="the cache of token ids cannot be written"):
        tokenize_records(records, TOKENIZER, max_length=None)


def test_a_file_that_changes_while_it_is_read_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jsonl(tmp_path / "a.jsonl", *[PLAIN] * 3)
    as_row = dataset.as_row

    def as_row_and_append(record):  # as another process may append at any time
        with open(source, "a") as stream:
            stream.write("\n")
        return as_row(record)

    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "as_row", as_row_and_append)
        with pytest.raises(DataError, match=f"{source} has changed while it was read"):
            load_records(source, cache_dir=str(cache))
    assert not list(cache.rglob("*.arrow"))
    assert len(load_records(source, cache_dir=str(cache))) == 3
