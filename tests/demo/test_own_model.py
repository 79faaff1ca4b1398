"""The demo on one's own model: feedback by the checks, `fit` as a command, before and after."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kto_lightning.demo import own_model, run
from kto_lightning.demo.__main__ import main
from kto_lightning.demo.answers import Answer
from kto_lightning.demo.instructions import HELD_OUT_KINDS
from tests.support.factories import make_tokenizer, save_model
from tests.support.instructions import WRONG, follow


@pytest.fixture(scope="module", params=["qwen2_5", None], ids=["chat", "text"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, with and without a chat template."""
    directory = tmp_path_factory.mktemp("model")
    return save_model(directory, "llama", make_tokenizer(chat_template=request.param))


class Answerer:
    """In place of sampling: a tiny random model follows nothing. Every third answer is good in the
    feedback and before training, two of three after it."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[Any], Any]] = []

    def __call__(self, model: Any, tokenizer: Any, problems: Any, sampling: Any, seed: int) -> Any:
        self.calls.append((list(problems), sampling))
        good = {0, 1} if len(self.calls) == 3 else {0}
        return [
            Answer(problem=each, completion=follow(each) if index % 3 in good else WRONG)
            for index, each in enumerate(problems)
        ]


def test_it_learns_from_the_verdicts_and_tells_both_shares(model, tmp_path, monkeypatch, capsys):
    answerer = Answerer()
    for module in (own_model, run):  # the feedback's answers, and those to held-out instructions
        monkeypatch.setattr(module, "answer", answerer)
    output = tmp_path / "out"
    options = ["--trainer.accelerator", "cpu", "--model.lora.r", "4"]
    assert main(["--model", str(model), "--output_dir", str(output), *options]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    (asked, sampling), (held_out, checked), (again, _) = answerer.calls
    assert held_out == again
    assert not {each.prompt for each in asked} & {each.prompt for each in held_out}
    assert {each.kind for each in held_out} > {*HELD_OUT_KINDS}
    assert (sampling.temperature, checked.temperature) == (0.7, 0.0)

    records = [json.loads(line) for line in (output / "feedback.jsonl").read_text().splitlines()]
    assert [record["label"] for record in records] == [
        answer.is_good for answer in Answerer()(None, None, asked, None, 0)
    ]
    is_chat = (model / "chat_template.jinja").exists()
    assert isinstance(records[0]["prompt"], list) is is_chat

    result = json.loads((output / "demo.json").read_text())
    assert result["before"]["share"] == pytest.approx(1 / 3, abs=0.03)
    assert result["after"]["share"] == pytest.approx(2 / 3, abs=0.03)
    assert result["fit"][-4:] == options
    assert (output / "fit" / "adapter").is_dir()
    before, after = result["before"]["share"], result["after"]["share"]
    assert f"Instructions followed: {before:.1%} before, {after:.1%} after" in printed


def test_a_model_that_follows_nothing_gives_nothing_to_learn_from(model, tmp_path, capsys):
    assert main(["--model", str(model), "--output_dir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "of 192 answers of the model" in error
    assert "at least 16 good and 16 bad ones are needed" in error


def test_a_folder_without_a_model_is_named(tmp_path, capsys):
    assert main(["--model", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert "Traceback" not in error


def test_options_of_fit_need_a_model(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--output_dir", str(tmp_path / "out"), "--model.lora.r", "4"])
    assert ended.value.code == 2
    assert "--model.lora.r 4 (only --model takes fit's)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_model_end_to_end(smollm2, tmp_path):
    command = [sys.executable, "-m", "kto_lightning", "demo", "--model", str(smollm2)]
    command += ["--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out" / "demo.json").read_text())
    # Whether the share rises is a measurement, for benchmarks/real_model.py; that it is told, not.
    assert f"{result['after']['share']:.1%} after" in " ".join(done.stdout.split())
    assert result["before"]["total"] == result["after"]["total"] == 130
