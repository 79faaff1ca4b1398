"""The data report as an HTML page: charts, several files, escaping."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kto_lightning.cli.inspect import main as inspect_main
from kto_lightning.reports.data import DataReport, report_of_source
from kto_lightning.reports.data.findings import findings_of
from kto_lightning.reports.data.page import data_charts, data_page
from kto_lightning.reports.data.statistics import histogram, shapes_of
from kto_lightning.reports.html import render
from tests.support.factories import chat_records, make_tokenizer, plain_records, write_jsonl
from tests.support.pages import read_page


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def report(path: Path, records: list[dict[str, Any]], **settings: Any) -> DataReport:
    return report_of_source(str(write_jsonl(path, records)), **settings)


def test_a_histogram_counts_every_length_once() -> None:
    lengths, desirable = np.array([0, 1, 5, 100, 100, 3]), np.array([1, 1, 0, 0, 1, 1], dtype=bool)
    found = histogram(lengths, desirable)
    assert (sum(found.desirable), sum(found.undesirable)) == (4, 2)
    assert (found.edges[0], found.edges[-1]) == (1, 101)
    assert found.edges == sorted(set(found.edges))
    assert len(found.desirable) == len(found.edges) - 1
    # 0 and 1 below 2; 100 in the last bin.
    assert (found.desirable[0], found.desirable[-1], found.undesirable[-1]) == (2, 1, 1)
    same = histogram(np.array([7, 7]), np.array([True, False]))
    assert (same.edges, same.desirable, same.undesirable) == ([7, 8], [1], [1])


def test_stretches_cover_the_whole_file() -> None:
    labels = np.arange(1000) < 400
    shapes = shapes_of(np.ones(1000, dtype=int), np.ones(1000, dtype=int), labels, labels)
    assert (sum(shapes.stretch_records), sum(shapes.stretch_desirable)) == (1000, 400)
    assert shapes.stretch_desirable[0] == shapes.stretch_records[0]
    assert shapes.stretch_desirable[-1] == 0
    few = shapes_of(np.ones(3, dtype=int), np.ones(3, dtype=int), labels[:3], labels[:3])
    assert few.stretch_records == [3]


def test_report_json_round_trip(tmp_path: Path) -> None:
    found = report(tmp_path / "a.jsonl", chat_records(40))
    again = DataReport.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    assert [finding.sentence for finding in findings_of(again)] == found.findings
    old = found.to_dict()
    del old["shapes"]
    assert list(data_charts(DataReport.from_dict(old))) == []
    with pytest.raises(ValueError, match="no data report of this version"):
        DataReport.from_dict({"examples": 3})


def test_two_files_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "tokenizer"
    make_tokenizer().save_pretrained(directory)
    files = [str(tmp_path / f"{name}.jsonl") for name in ("one", "two")]
    write_jsonl(Path(files[0]), plain_records(90))
    write_jsonl(Path(files[1]), [r | {"label": True} for r in plain_records(50, seed=1)])
    target = tmp_path / "new" / "data.html"
    options = ["--tokenizer", str(directory), "--max_length", "40", "--html", str(target)]
    assert inspect_main([*files, *options]) == 0
    assert capsys.readouterr().out.endswith(f"\n\npage      {target}\n")
    page = read_page(target.read_text(encoding="utf-8"))
    for words in (
        *("Side by side", "one two", "examples 90 50", "All 50 records are desirable"),
        *("Length of completions", "Length of prompts", "Label order along the file"),
        *("Records truncated by max_length", "Length against label", "What to do."),
    ):
        assert words in page.text
    # Five charts of the first; the second has one label, so no chart of length against label.
    assert page.tags.count("svg") == 9
    assert inspect_main([files[0], "--json", "--html", str(target)]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 90


def test_charts_hold_the_numbers(tmp_path: Path) -> None:
    labels = [True] * 30 + [False] * 10
    records = [
        {"prompt": f"{i}?", "completion": "x" * (10 if label else 100), "label": label}
        for i, label in enumerate(labels)
    ]
    charts = {chart.title: chart for chart in data_charts(report(tmp_path / "a.jsonl", records))}
    assert "Records truncated by max_length" not in charts  # that takes tokens
    order = charts["Label order along the file"]
    assert order.series[0].y.tolist() == [1.0, 1.0, 1.0, 0.75, 0.0]  # eight records each
    assert order.level == ("desirable, whole file", 0.75)
    against = charts["Length against label"].series[0]
    assert against.y.tolist() == [1.0, 0.0]
    good, bad = charts["Length of completions"].series
    assert (good.y[0], good.y[-1], bad.y[0], bad.y[-1]) == (1.0, 0.0, 0.0, 1.0)


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    records = [r | {evil: 1} for r in plain_records(20)] + [{"prompt": evil, "label": evil}]
    path = tmp_path / "<img src=x onerror=alert(1)>.jsonl"
    page = read_page(render(data_page([report(path, records)])))
    assert f"{evil}: number" in page.text
    assert str(path) in page.text


def test_files_with_one_or_no_usable_record(tmp_path: Path) -> None:
    for name, records in (("none", [{"prompt": "q"}]), ("one", plain_records(1))):
        page = read_page(render(data_page([report(tmp_path / f"{name}.jsonl", records)])))
        assert "Records" in page.text


def test_every_finding_has_a_meaning_and_an_action(tmp_path: Path) -> None:
    records = [
        *[{"prompt": "p", "completion": "x" * 90, "label": True}] * 30,
        *[{"prompt": f"{i} ", "completion": "", "label": False} for i in range(9)],
        {"prompt": "p", "completion": "x" * 90, "label": False},
    ]
    found = findings_of(
        report(tmp_path / "a.jsonl", records, tokenizer=make_tokenizer(), max_length=4)
    )
    assert len(found) >= 6
    assert all(one.meaning and one.action for one in found)
