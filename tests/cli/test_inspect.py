"""`inspect`: its report at 80 columns and in a pipe, its JSON and its exit statuses."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from kto_lightning.cli.inspect import main
from kto_lightning.reports.data import DataReport, report_of_source
from kto_lightning.reports.data.view import show_reports
from tests.support.factories import (
    chat_records,
    make_tokenizer,
    plain_records,
    tool_records,
    write_jsonl,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def shown(reports: list[DataReport], width: int = 80) -> str:
    stream = io.StringIO()
    show_reports(Console(file=stream, width=width, highlight=False), reports)
    return stream.getvalue()


def test_three_files_at_80_columns(tmp_path: Path) -> None:
    names = ["one.jsonl", "a_rather_long_name_of_a_file_of_records.jsonl", "three.jsonl"]
    rows = [plain_records(50), chat_records(50), tool_records(50)]
    for name, records in zip(names, rows, strict=True):
        write_jsonl(tmp_path / name, records)
    reports = [report_of_source(str(tmp_path / name)) for name in names]
    text = shown(reports)
    lines = text.splitlines()
    # Full paths are on lines of their own and are not wrapped.
    assert all(len(line) <= 80 for line in lines if str(tmp_path) not in line)
    assert all(line == line.rstrip() for line in lines)
    assert "\x1b" not in text
    # Two fit side by side, the third follows below.
    assert [line.split() for line in lines if "examples" in line] == [
        ["examples", "50", "50"],
        ["examples", "50"],
    ]
    wide = [line for line in shown(reports, 200).splitlines() if "examples" in line]
    assert [line.split() for line in wide] == [["examples", "50", "50", "50"]]


def test_a_file_without_a_usable_record(tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "data.jsonl", [{"prompt": "q"}]))
    lines = shown([report_of_source(source)]).splitlines()
    assert (
        "  - There is no usable record: KTO takes a prompt, a completion and a label from" in lines
    )
    assert any(line.startswith(f"    {source}:1: 'completion' is missing") for line in lines)


def test_files_of_the_same_name_are_distinguished(tmp_path: Path) -> None:
    reports = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        source = write_jsonl(tmp_path / folder / "data.jsonl", plain_records(8))
        reports.append(report_of_source(str(source)))
    header = shown(reports, 500).splitlines()[0]
    assert str(tmp_path / "a" / "data.jsonl") in header
    assert str(tmp_path / "b" / "data.jsonl") in header


def test_the_comparison_of_two_files(
    shared_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    files = [
        str(shared_data / f"{name}.jsonl") for name in ("claudesidian_1000", "kto_en_demo_300")
    ]
    assert main(files) == 0
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for row in (
        "claudesidian_1000 kto_en_demo_300",
        "examples 1,000 300",
        "desirable : undesirable 746 : 254 150 : 150",
        "ratio 2.94 : 1 1 : 1",
        "desirable_weight 1.0 1.0",
        "undesirable_weight 2.94 1.0",
        "effective ratio 746 : 746.76 ≈ 1 : 1 150 : 150 ≈ 1 : 1",
        "order natural natural",
        "longest run, T / F 40 / 14 8 / 11",
        "AUC of length for label 0.81 0.51",
        "exact duplicates 19 0",
    ):
        assert row in rows


def test_json_of_one_file_and_of_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write_jsonl(tmp_path / "data.jsonl", plain_records(20)))
    assert main([file, "--json", "--batch_size", "4"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one == report_of_source(file, batch_size=4).to_dict()
    assert main([file, file, "--json", "--batch_size", "4"]) == 0
    assert json.loads(capsys.readouterr().out) == [one, one]


def test_a_tokenizer_and_a_template_from_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write_jsonl(tmp_path / "data.jsonl", chat_records(20)))
    directory = str(tmp_path / "tokenizer")
    make_tokenizer().save_pretrained(directory)
    arguments = [file, "--tokenizer", directory, "--max_length", "30", "--json"]
    assert main(arguments) == 1
    assert "has no chat template" in (error := capsys.readouterr().err)
    assert "--chat_template" in error
    assert "--data." not in error
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}", encoding="utf-8")
    assert main([*arguments, "--chat_template", str(template)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokenizer"], found["lengths"]["unit"]) == (directory, "tokens")
    assert found["lengths"]["truncation"]["max_length"] == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: FILE"),
        (["x.jsonl", "--batchsize", "4"], "unrecognized arguments: --batchsize 4"),
        (["x.jsonl", "--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["x.jsonl", "--batch_size", "four"], "invalid int value: 'four'"),
        (["x.jsonl", "--max_length", "1"], "--max_length must be at least 2, got 1"),
        (["x.jsonl", "--max_length", "9"], "--max_length needs --tokenizer DIR"),
        (["x.jsonl", "--chat_template", "t"], "--chat_template needs --tokenizer DIR"),
    ],
)
def test_wrong_usage_exits_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "usage: python -m kto_lightning inspect" in error


def test_unreadable_input_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_jsonl(tmp_path / "data.jsonl", plain_records(2)))
    for arguments, message in (
        ([str(tmp_path / "missing.jsonl")], "error: there is no file"),
        ([file, "--tokenizer", str(tmp_path)], "has no tokenizer that loads"),
    ):
        assert main(arguments) == 1
        captured = capsys.readouterr()
        assert message in captured.err
        assert "Traceback" not in captured.err
        assert captured.out == ""


def test_help_and_usage_errors_need_no_heavy_imports() -> None:
    program = (
        "import sys; from kto_lightning.cli.inspect import main\n"
        "status = main(['--help']), main([])\n"
        "heavy = {'torch', 'datasets', 'transformers', 'numpy', 'rich'} & set(sys.modules)\n"
        "sys.exit(0 if status == (0, 2) and not heavy else 1)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m kto_lightning inspect" in done.stdout


def test_the_exit_status_without_a_usable_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = str(write_jsonl(tmp_path / "good.jsonl", plain_records(4)))
    stars = [record | {"label": 1 + 4 * (i % 2)} for i, record in enumerate(plain_records(4))]
    bad = str(write_jsonl(tmp_path / "bad.jsonl", stars))
    assert main([good]) == 0
    assert main([good, bad]) == main([bad, "--json"]) == 1
    printed = capsys.readouterr()
    assert "in a column with the numbers 1, 5" in printed.out
    assert printed.err == f"error: {bad}: no usable record. See what is said above.\n" * 2


def test_long_names_of_columns_are_shortened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "k" * 100_000
    train = write_jsonl(tmp_path / "train.jsonl", [r | {name: 1} for r in plain_records(8)])
    assert main([str(train)]) == 0
    assert 50 < capsys.readouterr().out.count("k") < 200
    assert main([str(train), "--json"]) == 0
    assert name in {c["name"] for c in json.loads(capsys.readouterr().out)["columns"]}
