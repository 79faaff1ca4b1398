"""Splits and configs of hub data sets, which `datasets` also reads from the working directory."""

import json
from pathlib import Path

import datasets
import pytest

from kto_lightning.data.dataset import read_records
from kto_lightning.data.records import Record
from kto_lightning.data.sources import expand
from kto_lightning.data.sources.hub import HubSource
from kto_lightning.errors import DataError
from tests.data.rows import PLAIN, jsonl

CONFIGS = """---
configs:
- config_name: {}
  data_files: [{{split: train, path: a.jsonl}}, {{split: dev, path: b.jsonl}}]
- config_name: de
  data_files: [{{split: train, path: c.jsonl}}]
---
"""


@pytest.fixture(autouse=True)
def _hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`owner/named` with configs, `owner/plain` with a default one, `owner/dev` without train."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, default in (("named", "en"), ("plain", "default")):
        folder = tmp_path / "owner" / name
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(CONFIGS.format(default))
        for file in "abc":
            jsonl(folder / f"{file}.jsonl", PLAIN | {"prompt": file})
    (tmp_path / "owner/dev").mkdir()
    jsonl(tmp_path / "owner/dev/validation.jsonl", PLAIN)


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_and_configs(streaming: bool) -> None:
    def prompts(name: str) -> list[object]:
        # Not `expand`: without a split these are folders of this directory.
        rows = HubSource(name).rows(streaming=streaming)
        values = [row.value for row in rows]
        return [value["prompt"] for value in values]

    assert prompts("owner/plain") == ["a"]
    assert prompts("owner/plain:dev") == ["b"]
    assert prompts("owner/plain/de") == ["c"]
    assert prompts("owner/named/en:dev") == ["b"]
    (record,) = read_records("owner/named/de:train", streaming=streaming)
    assert isinstance(record, Record)
    assert (record.file, record.line, record.prompt) == ("owner/named/de:train", 1, "c")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dev", "/dev' has no split 'train'. Its splits are validation. Name one, such as {}:vali"),
        ("plain:test", "/plain' has no split 'test'. Its splits are train, dev. Its configs are d"),
        ("named/de:dev", "/named/de' has no split 'dev'. Its splits are train. Its configs are en"),
        ("named/fr", "/named' has no config 'fr'. Its configs are en, de. Name one, such as owner"),
        ("named", "/named' has several configs, en, de. Name one, such as {}/en:train."),
    ],
)
def test_what_exists_is_named(name: str, message: str, streaming: bool) -> None:
    with pytest.raises(DataError) as error:
        next(iter(HubSource(f"owner/{name}").rows(streaming=streaming)))
    assert str(error.value).startswith("'owner" + message.format(f"owner/{name}"))


def test_names_of_data_sets_and_of_files() -> None:
    for name in ("a/b", "a/b:test", "a/b.c/d-e+f:train", "0-a/b"):
        (source,) = expand(name)
        assert isinstance(source, HubSource)
        assert (source.name, source.path) == (name, None)
    for name in ("a", "a:train", "a/b/c/d", "a/b.jsonl", "a/b/c.csv.gz", "/a/b", "./a/b", "a/b:"):
        with pytest.raises(DataError, match=f"there is no file '{name}', and it cannot be a hub"):
            expand(name)


def test_rows_of_a_table_stay_json_values() -> None:
    row = PLAIN | {"prompt": json.dumps([{"role": "user", "content": "a"}])}
    jsonl(Path("owner/plain/a.jsonl"), row)
    (record,) = read_records("owner/plain:train")
    assert isinstance(record, Record)
    assert record.prompt == [{"role": "user", "content": "a"}]
