"""Models with a table of learned positions."""

from pathlib import Path

import pytest

from kto_lightning.errors import ConfigError
from kto_lightning.models.architecture import check_positions, num_positions
from tests.support.cli import fit, rows, run_cli, small_model
from tests.support.factories import make_model, write_jsonl


@pytest.mark.parametrize(("architecture", "positions"), [("gpt2", 2048), ("llama", None)])
def test_number_of_positions(architecture: str, positions: int | None):
    assert num_positions(make_model(architecture, vocab_size=100)) == positions


def test_sequences_longer_than_a_causal_window_are_rejected():
    model = make_model("doge", vocab_size=100, keep_window_size=32)
    check_positions(model, "doge", 32)
    for longest in (33, None):
        with pytest.raises(ConfigError, match=r"32 tokens only.* --data\.max_length 32\."):
            check_positions(model, "doge", longest)


def test_sequences_longer_than_the_table_are_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    policy = small_model(tmp_path / "policy", "gpt2", n_positions=64)
    records = [
        {"prompt": f"Number {i}.", "completion": " the" * (70 + i), "label": bool(i % 2)}
        for i in range(8)
    ]
    train = write_jsonl(tmp_path / "train.jsonl", records)
    fit(policy, train, tmp_path / "run", "--trainer.max_steps", 1, status=2)
    assert "has 64 positions, fewer than sequences of up to" in capsys.readouterr().err
    fit(policy, train, tmp_path / "run", "--data.max_length", 65, status=2)
    assert "Set --data.max_length 64." in capsys.readouterr().err
    stream = ("--data.streaming", "true", "--data.max_length", "null")
    weights = ("--model.desirable_weight", 1, "--model.undesirable_weight", 1)
    fit(policy, train, tmp_path / "run", *stream, *weights, status=2)
    assert "sequences of any length" in capsys.readouterr().err
    output = fit(policy, train, tmp_path / "run", "--data.max_length", 64)
    assert len(rows(output)) == 2
    asked = ("--model.policy", policy, "--data.predict", train)
    assert run_cli("predict", *asked, "--trainer.accelerator", "cpu") == 2
    assert "Set --data.max_length 64." in capsys.readouterr().err
