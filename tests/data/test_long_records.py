"""Records longer than a forward is to hold are told before the run."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import fit, run_cli
from tests.support.factories import write_jsonl

WORDS = " ".join(["word"] * 30)


def records(num_long: int) -> list[dict[str, Any]]:
    short = [
        {"prompt": f"Number {i}?", "completion": " yes", "label": bool(i % 2)} for i in range(6)
    ]
    long = [
        {"prompt": f"{i}: {WORDS}", "completion": " no", "label": bool(i % 2)}
        for i in range(num_long)
    ]
    return [*short, *long]


def warnings_of(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(("num_long", "said"), [(1, "1 record has"), (2, "2 records have")])
def test_long_records_are_told_with_their_cost(
    num_long: int, said: str, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = write_jsonl(tmp_path / "data.jsonl", records(num_long))
    options = ("--data.max_tokens", 20, "--trainer.max_steps", 1)
    fit(policy, data, tmp_path / "output", *options)
    captured = capsys.readouterr()
    told = warnings_of(captured.out + captured.err)
    assert f"{said} more than --data.max_tokens 20 tokens" in told
    longest = int(told.partition("the longest ")[2].split()[0])
    assert longest > 20
    assert "data.jsonl:7" in told or "data.jsonl:8" in told
    assert f"{longest / 20:.3g} times the activations" in told
    assert f"costs {(longest / 20) ** 2:.3g} times" in told


def test_records_that_are_truncated_are_not(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = write_jsonl(tmp_path / "data.jsonl", records(2))
    options = ("--data.max_tokens", 20, "--data.max_length", 20, "--trainer.max_steps", 1)
    fit(policy, data, tmp_path / "output", *options, "--data.truncation", "keep_end")
    captured = capsys.readouterr()
    assert "--data.max_tokens 20 tokens" not in warnings_of(captured.out + captured.err)


def test_predict_tells_them_without_a_second_completion(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = write_jsonl(tmp_path / "data.jsonl", records(1))
    arguments = ("predict", "--model.policy", policy, "--data.predict", data)
    arguments += ("--data.max_tokens", 20, "--trainer.accelerator", "cpu")
    assert run_cli(*arguments) == 0
    told = warnings_of(capsys.readouterr().err)
    assert "1 record has more than --data.max_tokens 20 tokens" in told
    assert "longer of its two" not in told


@pytest.mark.parametrize(
    ("limit", "said"),
    [("null", "records of any length"), (64, "up to --data.max_length 64 tokens"), (20, None)],
)
def test_a_stream_tells_what_may_come(
    limit: Any, said: str | None, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = write_jsonl(tmp_path / "data.jsonl", records(0))
    options = ("--data.streaming", "true", "--data.max_tokens", 20, "--data.max_length", limit)
    weights = ("--model.desirable_weight", 1.0, "--model.undesirable_weight", 1.0)
    options = (*options, *weights, "--trainer.max_steps", 1, "--data.batch_size", 2)
    fit(policy, data, tmp_path / "output", *options)
    captured = capsys.readouterr()
    told = warnings_of(captured.out + captured.err)
    assert ("may come in the stream" in told) is (said is not None)
    assert said is None or said in told
