"""Warnings of a run on the terminal: those of its data at the start, those of its steps."""

from pathlib import Path

import pytest

from kto_lightning.callbacks.reporting import DiagnosisWarnings
from tests.support import cli
from tests.support.factories import plain_records, write_jsonl
from tests.support.steps import MIXED, Examples, fit_steps, make_module, step_batch

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")


def test_each_warning_comes_once_per_run_and_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With β = 50 both classes are saturated from the first step on."""
    warnings = DiagnosisWarnings()
    few = Examples([(3, 12), (14, 4), (6, 1), (1, 22)], [True, False, True, False])
    steps = [step_batch(few)] * 25
    for _ in range(2):
        result = fit_steps(make_module(beta=50.0, learning_rate=0.0), *steps, callbacks=[warnings])
        assert max(row["train/gradient_left/desirable"] for row in result.rows) < 0.05
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if line.startswith("warning: ")]
        assert sum("desirable completions have" in line for line in lines) >= 1
        assert len(lines) == len({line.split()[1] for line in lines})
        assert "warning" not in printed.out


def test_a_short_ordinary_run_has_no_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    fit_steps(
        make_module(learning_rate=0.0), *[step_batch(MIXED)] * 60, callbacks=[DiagnosisWarnings()]
    )
    assert "warning: " not in capsys.readouterr().err


def test_the_summary_warns_that_length_predicts_the_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = cli.small_model(tmp_path / "policy")
    records = [
        record | {"completion": " the river" * (12 if i % 2 else 2), "label": bool(i % 2)}
        for i, record in enumerate(plain_records(24))
    ]
    cli.fit(policy, write_jsonl(tmp_path / "long.jsonl", records), tmp_path / "run")
    printed = capsys.readouterr().out.replace("\n", " ")
    assert printed.count("warning: length alone predicts the label (AUC 1.00)") == 1
    cli.fit(policy, cli.small_data(tmp_path / "like.jsonl"), tmp_path / "other")
    assert "length alone" not in capsys.readouterr().out


def test_the_summary_counts_pairs_whose_prompt_was_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = cli.small_model(tmp_path / "policy")
    pairs = [
        {"chosen": f"river {i} the cat sat", "rejected": f"river {i} the dog ran"} for i in range(4)
    ]
    cli.fit(policy, write_jsonl(tmp_path / "pairs.jsonl", pairs), tmp_path / "run")
    printed = capsys.readouterr().out.replace("\n", " ")
    assert printed.count("warning: 4 pairs have no prompt of their own:") == 1
    assert "(pairs.jsonl:1, pairs.jsonl:2, …)" in printed
