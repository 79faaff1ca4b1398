"""Columns, labels and exports through the command line: the same records, the same run."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.cli import EVERY_STEP, LAST, fit, numbers, run_cli
from tests.support.comparison import assert_runs_equal
from tests.support.factories import plain_records, write_jsonl

MAPPING = (
    *("--data.columns.prompt", "chat.question", "--data.columns.completion", "chat.answer"),
    *("--data.columns.label", "scores.0.value", "--data.columns.weight", "sure"),
    *("--data.labels.at_least", 4, "--data.labels.at_most", 2, "--data.unlabeled", "skip"),
)
STREAM = (
    *("--data.streaming", "true", "--data.shuffle", "false", "--data.buffer_size", 8),
    *("--model.desirable_weight", 1.0, "--model.undesirable_weight", 1.0),
)


def rated(record: dict[str, Any], rating: int) -> dict[str, Any]:
    return {
        "chat": {"question": record["prompt"], "answer": record["completion"]},
        "scores": [{"value": rating}],
        "sure": record.get("weight", 1.0),
    }


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    found = plain_records(16)
    return [record | {"weight": 0.5 + index / 16} for index, record in enumerate(found)]


@pytest.fixture(scope="module")
def ratings(records: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records with ratings, among others that are left out."""
    rows: list[dict[str, Any]] = []
    for record in records:
        rows += [rated(record, 5 if record["label"] else 1), rated(record, 3)]
        rows.append({"chat": {"question": "q"}})
    return write_jsonl(tmp_path_factory.mktemp("ratings") / "ratings.jsonl", rows)


@pytest.fixture(scope="module")
def plain(records: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("plain") / "plain.jsonl", records)


def test_a_mapping_trains_as_the_records_written_by_hand(
    policy: Path, ratings: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapped = fit(policy, ratings, tmp_path / "mapped", *MAPPING)
    printed = " ".join(capsys.readouterr().out.split())
    by_hand = fit(policy, plain, tmp_path / "by_hand")
    assert_runs_equal(mapped, by_hand)

    told = (
        "read as: prompt <- chat.question, completion <- chat.answer, label <- scores.0.value, "
        "weight <- sure",
        "labels: at least 4 good; at most 2 bad",
        "left out: 16 judged neither good nor bad, 16 without a judgement",
    )
    assert all(text in printed for text in told)
    run = json.loads((mapped / "run.json").read_text())
    assert [row[1] for row in run["summary"] if row[0] == "reading"] == list(told)
    settings = yaml.safe_load((mapped / "config.yaml").read_text())["data"]
    assert settings["columns"]["label"] == "scores.0.value"
    assert settings["labels"]["at_least"] == 4.0

    # The settings file of that run, and the same keys written by hand.
    again = ["fit", "--config", mapped / "config.yaml", "--output_dir", tmp_path / "again"]
    assert run_cli(*again) == 0
    assert_runs_equal(tmp_path / "again", by_hand)


def test_a_stream_reads_the_same(policy: Path, ratings: Path, plain: Path, tmp_path: Path) -> None:
    mapped = fit(policy, ratings, tmp_path / "mapped", *MAPPING, *STREAM)
    assert_runs_equal(mapped, fit(policy, plain, tmp_path / "by_hand", *STREAM))
    report = json.loads((mapped / "data_report.json").read_text())
    assert report["left_out"] == {"judged neither good nor bad": 16, "without a judgement": 16}


def test_validation_and_prediction_read_the_same(
    policy: Path, ratings: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for source, options in ((ratings, MAPPING), (plain, ())):
        command = ["validate", "--model.policy", policy, "--data.validation", source]
        assert run_cli(*command, "--trainer.accelerator", "cpu", *options) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    for source, options in ((ratings, MAPPING), (plain, ())):
        command = ["predict", "--model.policy", policy, "--data.predict", source]
        options = (*options, "--output_dir", tmp_path, "--trainer.accelerator", "cpu")
        status = run_cli(*command, *options)
        # A row without an answer cannot be rewarded: it is named.
        assert status == (1 if source == ratings else 0)
    assert f"{ratings}:3: 'completion' is missing" in capsys.readouterr().err


@pytest.mark.parametrize("stream", [(), STREAM])
def test_resuming_with_another_mapping(
    policy: Path, ratings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stream: tuple
) -> None:
    options = (*MAPPING, *stream, *EVERY_STEP)
    output = fit(policy, ratings, tmp_path / "run", *options, "--trainer.max_steps", 2)
    other = (*options, *LAST, "--data.labels.at_least", 3)
    fit(policy, ratings, output, *other, "--trainer.max_steps", 4, status=2)
    error = capsys.readouterr().err
    refusal = "--data.labels.at_least is 3.0 (was 4.0)" if stream else "trained on 16 records"
    assert refusal in error
    fit(policy, ratings, output, *options, *LAST, "--trainer.max_steps", 4)
    assert len(numbers(output)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data.columns.label", "score.0.value"), "The nearest is scores.0.value."),
        (("--data.labels.at_most", 4), "at_most 4 must be below --data.labels.at_least 4"),
        (("--data.labels.good", "[a]", "--data.labels.bad", "[A]"), "Keep one of the two."),
        (("--data.format", "excel"), "--data.format must be one of records, open_webui"),
        (("--data.repeated", "majority", *STREAM), "--data.repeated majority compares all"),
        (
            ("--data.columns.prompts", "a"),
            "--data.columns has no setting 'prompts'. It has prompt,",
        ),
    ],
)
def test_usage_errors(
    policy: Path,
    ratings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple,
    message: str,
) -> None:
    fit(policy, ratings, tmp_path / "run", *MAPPING, *options, status=2)
    assert message in capsys.readouterr().err
