"""Paths on the command line: `~` in each of them, and chat templates by file or name."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.support.cli import run_cli, small_data, small_model
from tests.support.factories import chat_records, make_tokenizer, save_model, write_jsonl


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory with a model and data; the working directory is another one."""
    small_model(tmp_path / "home" / "policy")
    small_data(tmp_path / "home" / "train.jsonl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_tilde_is_the_home_directory_in_every_path(home: Path):
    (home / "template.jinja").write_text("{{ messages }}", encoding="utf-8")
    short = ("--trainer.accelerator", "cpu", "--trainer.max_steps", 1)
    models = ("--model.policy", "~/policy", "--model.reference", "~/policy")
    others = ("--model.reference_cache", "~/cache", "--data.tokenizer", "~/policy")
    others += ("--data.chat_template", "~/template.jinja", "--data.train", "~/train.jsonl")
    assert run_cli("fit", *models, *others, *short, "--output_dir", "~/run") == 0
    checkpoint = "~/run/checkpoints/step=1.ckpt"
    held_out = ("--data.validation", "~/train.jsonl", "--ckpt_path", checkpoint)
    assert run_cli("validate", *models, *held_out, *short[:2]) == 0
    rewarded = ("--data.predict", "~/train.jsonl", "--output_dir", "~/rewards")
    assert run_cli("predict", *models, *rewarded, *short[:2]) == 0
    assert run_cli("report", "~/run", "--html", "~/report.html") == 0
    assert run_cli("export", checkpoint, "~/exported") == 0
    inspected = ("--tokenizer", "~/policy", "--chat_template", "~/template.jinja")
    assert run_cli("inspect", "~/train.jsonl", *inspected, "--html", "~/data.html") == 0
    made = {"run", "cache", "rewards", "report.html", "exported", "data.html"}
    assert made <= {path.name for path in home.iterdir()}
    assert list(Path().iterdir()) == []


def test_a_tilde_in_a_settings_file(home: Path):
    settings = {
        "model": {"policy": "~/policy"},
        "data": {"train": "~/train.jsonl"},
        "trainer": {"accelerator": "cpu", "max_steps": 1},
        "output_dir": "~/run",
    }
    (home / "settings.yaml").write_text(json.dumps(settings), encoding="utf-8")
    assert run_cli("fit", "--config", "~/settings.yaml") == 0
    assert (home / "run" / "model").is_dir()
    assert list(Path().iterdir()) == []


def test_a_chat_template_is_a_file_or_one_of_the_tokenizers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    policy = save_model(tmp_path / "policy", "qwen2", make_tokenizer(chat_template="qwen2_5"))
    tokenizer = AutoTokenizer.from_pretrained(policy)
    plain = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer.chat_template = {"default": tokenizer.chat_template, "plain": plain}
    tokenizer.save_pretrained(policy)
    data = write_jsonl(tmp_path / "chat.jsonl", chat_records(8))
    short = ("--trainer.accelerator", "cpu", "--trainer.max_steps", 1)
    command = ("fit", "--model.policy", policy, "--data.train", data, *short)
    named = ("--output_dir", tmp_path / "run", "--data.chat_template", "plain")
    assert run_cli(*command, *named) == 0
    used = AutoTokenizer.from_pretrained(tmp_path / "run" / "model").chat_template
    assert used == plain
    assert run_cli("inspect", data, "--tokenizer", policy, "--chat_template", "plain") == 0
    capsys.readouterr()
    unknown = ("--output_dir", tmp_path / "other", "--data.chat_template", "chatml")
    assert run_cli(*command, *unknown) == 1
    error = capsys.readouterr().err
    assert "--data.chat_template chatml is neither a file, one of the tokenizer's temp" in error
    assert "(default, plain)" in error


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000])
@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "~/train.jsonl", "--tokenizer"),
        ("inspect", "~/train.jsonl", "--tokenizer", "~/policy", "--chat_template"),
        ("inspect", "~/train.jsonl", "--html"),
        ("report",),
        ("demo", "--output_dir"),
    ],
)
def test_a_path_too_long_is_refused(
    command: tuple[str, ...], name: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(*command, name) == 1
    assert name[:20] in capsys.readouterr().err


@pytest.mark.parametrize("name", [".", "/", "..", "a\0b"])
def test_a_page_that_cannot_have_its_name_is_refused(
    name: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("inspect", "~/train.jsonl", "--html", name) == 1
    assert "cannot be written" in capsys.readouterr().err
