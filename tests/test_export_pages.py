"""Pages on feedback: the file that a page shows, read with its command, gives what it shows."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import yaml

from kto_lightning.data.columns import Columns
from kto_lightning.data.dataset import ReadingSummary
from kto_lightning.data.importers import IMPORTERS
from kto_lightning.data.labels import Labels
from kto_lightning.data.reader import RecordReader
from kto_lightning.data.record_settings import RecordSettings
from kto_lightning.data.rows import BadRecord, SkippedRow
from kto_lightning.data.sources.expand import expand
from tests.support.cli import run_cli

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted((DOCS / "exports").glob("*.md"))
MORE_PAGES = [
    *(DOCS / f"{name}.md" for name in ("data", "exports", "ratings")),
    *(DOCS / f"coming_from_{name}.md" for name in ("axolotl", "llama_factory", "ms_swift")),
    DOCS.parent / "README.md",
]
BLOCK = re.compile(r'^```(\w+)(?: title="(.*?)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def words_of(command: str) -> list[str]:
    return shlex.split(command.replace("\\\n", " ").partition("-m kto_lightning ")[2])


def rendered(text: str | list[dict]) -> str | list[dict]:
    """A text without the keys of its messages that chat templates do not know."""
    if isinstance(text, str):
        return text
    known = ("role", "content", "reasoning_content")
    return [{key: message[key] for key in known if key in message} for message in text]


def read(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[list[dict], list[str]]:
    """The records of a `fit` command in our own form, and what its summary says of reading them."""
    words = words_of(command)
    assert words[0] == "fit"
    assert run_cli(*words, "--print_config") == 0
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    settings = {name: data[name] for name in ("unlabeled", "chat", "format", "repeated")}
    for name, kind in (("columns", Columns), ("labels", Labels)):
        settings[name] = data[name] and kind(**data[name])
    reader = RecordReader(expand(data["train"]), RecordSettings(**settings))
    records, left_out = [], Counter()
    for item in reader.read():
        assert not isinstance(item, BadRecord), str(item)
        if isinstance(item, SkippedRow):
            left_out[item.why] += 1
            continue
        assert not item.tools
        texts = {"prompt": rendered(item.prompt), "completion": rendered(item.completion)}
        parts = {**texts, "label": item.desirable}
        records.append(parts | ({} if item.weight == 1.0 else {"weight": item.weight}))
    return records, ReadingSummary(notes=reader.notes, left_out=dict(left_out)).sentences


@pytest.mark.parametrize("page", [*PAGES, *MORE_PAGES], ids=lambda path: path.stem)
def test_a_page_shows_what_is_trained_on(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command, printed = "", ""
    for language, title, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "bash":
            command = text
        elif title == "trained on":
            assert read(command, capsys)[0] == [json.loads(line) for line in text.splitlines()]
        elif title == "fit says":
            assert read(command, capsys)[1] == text.splitlines()
        elif title == "inspect says":
            assert run_cli(*words_of(command)) in (0, 1)
            said = capsys.readouterr().out
            assert [part for part in text.split("…\n") if part not in said] == []
        elif title == "prints":
            assert printed == text
        elif language == "python" and title:
            exec(compile(text, title, "exec"), {})  # a recipe of the page
            printed = capsys.readouterr().out
        elif title:
            Path(title).parent.mkdir(parents=True, exist_ok=True)
            Path(title).write_text(text, encoding="utf-8")


def test_every_page_shows_records():
    assert all('title="trained on"' in page.read_text(encoding="utf-8") for page in PAGES)


def test_every_importer_has_a_page():
    assert {page.stem for page in PAGES} >= set(IMPORTERS)


def test_every_page_is_in_the_table_and_in_the_navigation():
    table = (DOCS / "exports.md").read_text(encoding="utf-8")
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"exports/{page.name}" in table
        assert f"exports/{page.name}" in navigation
