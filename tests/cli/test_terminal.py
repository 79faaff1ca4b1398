"""Text of data, templates and names of files on the terminal: without markup and controls."""

import json
import re
import shutil
from pathlib import Path
from unicodedata import category

import pytest

from tests.support.cli import fit, run_cli, small_data
from tests.support.factories import chat_records, plain_records, write_jsonl

HOSTILE = "[/INST][red]\x1b[31m\x9b2J\u202e\u2066\r"
ALLOWED = {"\n"}


def check_plain(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert "Traceback" not in text
    # Progress bars and colours, which are ours, do not come into a pipe.
    found = {c for c in text if category(c) in {"Cc", "Cf", "Cs"}} - ALLOWED
    assert not found, found
    return text


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    directory = tmp_path / HOSTILE.replace("/", "_")
    directory.mkdir()
    return small_data(directory / "train.jsonl")


def test_a_run_with_hostile_names(
    policy: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(policy, train_file.parent / "model"))
    output = train_file.parent / "output"
    fit(model, train_file, output, "--trainer.max_steps", 1)
    assert r"[_INST][red]\x1b[31m" in re.sub(r"\n\s*", "", check_plain(capsys))
    arguments = ("--model.policy", output / "model", "--output_dir", output)
    assert run_cli("predict", *arguments, "--data.predict", train_file) == 0
    assert run_cli("validate", *arguments, "--data.validation", train_file) == 0
    assert run_cli("report", output) == 0
    assert run_cli("inspect", train_file, train_file) == 0
    checkpoint = output / "checkpoints" / "step=1.ckpt"
    assert run_cli("export", checkpoint, train_file.parent / "exported") == 0
    check_plain(capsys)
    card = (train_file.parent / "exported" / "README.md").read_text()
    assert "\x1b" not in card
    assert r"\[_INST" in card


def test_errors_about_hostile_names(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = tmp_path / (HOSTILE.replace("/", "_") + "\nerror: another")
    fit(policy, name, tmp_path / "output", status=1)
    fit(name, name, tmp_path / "output", status=1)
    fit(policy, name, tmp_path / "output", "--model.dtype", HOSTILE, "--ckpt_path", name, status=2)
    fit(policy, name, tmp_path / "output", "--ckpt_path", name, status=1)
    for arguments in (("inspect", name), ("report", name), ("export", name, tmp_path / "out")):
        assert run_cli(*arguments) == 1
    assert run_cli("inspect", "a", f"--{HOSTILE}") == 2
    assert run_cli(HOSTILE) == 2
    check_plain(capsys)


def test_records_with_hostile_text(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        record | {"prompt": f"{HOSTILE} {record['prompt']}", HOSTILE: index}
        for index, record in enumerate(plain_records(12))
    ]
    train = write_jsonl(tmp_path / "train.jsonl", records)
    fit(policy, train, tmp_path / "output", "--trainer.max_steps", 1)
    assert run_cli("inspect", train, "--tokenizer", policy) == 0
    for record in records:
        record["label"] = HOSTILE
    fit(policy, write_jsonl(train, records), tmp_path / "again", status=1)
    assert run_cli("inspect", train) in (0, 1)
    check_plain(capsys)


def test_json_stays_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [record | {HOSTILE: 1} for record in plain_records(12)]
    train = write_jsonl(tmp_path / "train.jsonl", records)
    assert run_cli("inspect", "--json", train) == 0
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert HOSTILE in {column["name"] for column in json.loads(printed)["columns"]}


def test_a_long_message_of_a_template_is_shortened(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ raise_exception('z' * 100000) }}")
    train = write_jsonl(tmp_path / "train.jsonl", chat_records(4))
    fit(policy, train, tmp_path / "output", "--data.chat_template", template, status=1)
    assert 100 < check_plain(capsys).count("z") < 5000
