"""Adversarial input: files, records, chat templates, model directories and checkpoints."""

import contextlib
import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kto_lightning.data.dataset import load_records
from kto_lightning.data.tokenize import tokenize_records
from kto_lightning.errors import DataError
from kto_lightning.models.tokenizer import load_tokenizer
from tests.data.rows import QUICK, ROWS, check_yields
from tests.support.cli import fit, rows, run_cli
from tests.support.factories import (
    chat_records,
    make_tokenizer,
    plain_records,
    save_model,
    write_jsonl,
)

STREAMED = ("--data.streaming", "true")
STREAMED += ("--model.desirable_weight", 1, "--model.undesirable_weight", 1)
VALID_LINES = "".join(json.dumps(record) + "\n" for record in plain_records(3))


def message(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("error: "), err
    assert "Traceback" not in err
    return err


FILES: dict[str, tuple[bytes, str]] = {
    "compressed": (gzip.compress(VALID_LINES.encode(), mtime=0), "train.jsonl is compressed."),
    "UTF-16": (VALID_LINES.encode("utf-16"), "train.jsonl is UTF-16 text"),
    "NUL": (VALID_LINES.encode() + b"\0\n", "train.jsonl:4: invalid JSON"),
    "an unpaired surrogate": (
        VALID_LINES.encode() + rb'{"prompt": "\ud800", "completion": "b", "label": true}',
        r"train.jsonl:4: the text contains an unpaired surrogate (\ud800)",
    ),
    "deep": (
        VALID_LINES.encode() + b'{"a":' * 50_000,
        "train.jsonl:4: the JSON is nested too deep",
    ),
    "NaN": (
        VALID_LINES.encode() + b'{"prompt": "a", "completion": "b", "label": true, "weight": NaN}',
        "train.jsonl:4: NaN is not JSON",
    ),
    "huge number": (
        VALID_LINES.encode()
        + b'{"prompt": "a", "completion": "b", "label": 1'
        + b"0" * 5000
        + b"}",
        "train.jsonl:4: a number has too many digits",
    ),
    "cut off": (VALID_LINES.encode()[:-20], "train.jsonl:3: invalid JSON"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_not_valid_jsonl(
    name: str, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    content, part = FILES[name]
    (tmp_path / "train.jsonl").write_bytes(content)
    fit(policy, tmp_path / "train.jsonl", tmp_path / "run", status=1)
    assert part in message(capsys)


def _parquet(directory: Path) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = directory / "whole.parquet"
    pq.write_table(pa.Table.from_pylist(plain_records(6)), path)
    return path.read_bytes()


@QUICK
@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
    st.integers(0, 200),
)
def test_a_damaged_parquet_file(tmp_path: Path, changes: list[tuple[int, int]], cut: int):
    content = bytearray(_parquet(tmp_path))
    for place, value in changes:
        content[place % len(content)] = value
    path = tmp_path / "damaged.parquet"
    path.write_bytes(bytes(content[: len(content) - cut]))
    check_yields(path)


CHAT_TOKENIZER = make_tokenizer(chat_template="qwen3")


@QUICK
@given(st.lists(ROWS, min_size=1, max_size=4))
@example([{"prompt": "\ud800", "completion": "", "label": 1}])
@example([{"prompt": "a\0b", "completion": "\x00", "label": True, "weight": 1e-30}])
@example([{"messages": [{"role": "x", "content": "y"}] * 2, "label": 0}])
@example(
    [
        {
            "prompt": [{"role": "user", "content": "a"}],
            "completion": [
                {"role": "assistant", "content": None, "tool_calls": [1e308, {"function": []}]}
            ],
            "label": 1,
        }
    ]
)
@example(
    [
        {
            "prompt": [{"role": "user", "content": "a"}],
            "completion": [
                {"role": "assistant", "content": "", "reasoning_content": {"a": [10**4000]}}
            ],
            "label": 1,
        }
    ]
)
def test_records_are_tokenized_or_refused(tmp_path: Path, rows: list[Any]):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.suppress(DataError):
        examples = tokenize_records(load_records(str(path)), CHAT_TOKENIZER, max_length=64)
        assert len(examples) >= 1


TEMPLATES = {
    "division": "{{ 1 // (messages | length - 2) }}",
    "endless": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "memory": "{{ 'x' * 10 ** 18 }}",
    "unsafe": "{{ messages.__class__.__mro__ }}",
    "syntax": "{% if %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_failing_templates_name_the_record(name: str, tmp_path: Path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    path = write_jsonl(tmp_path / "chat.jsonl", chat_records(4))
    with pytest.raises(DataError, match=r"chat\.jsonl:1: "):
        tokenize_records(load_records(str(path)), tokenizer, max_length=64)


def test_a_tokenizer_without_a_padding_token_trains(train: Path, tmp_path: Path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    policy = save_model(tmp_path / "policy", "qwen2", tokenizer)
    output = fit(policy, train, tmp_path / "run", "--trainer.max_steps", 1)
    assert rows(output)[0]["train/loss"]


def test_plain_text_needs_an_end_of_text_token(
    train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    policy = save_model(tmp_path / "policy", "qwen2", tokenizer)
    fit(policy, train, tmp_path / "run", status=1)
    assert "no end-of-text token" in message(capsys)


CODE = "from pathlib import Path\nPath({marker!r}).touch()\n"
CUSTOM_MODEL = """
from transformers import PretrainedConfig, PreTrainedModel
class Config(PretrainedConfig):
    model_type = "made_up"
class Model(PreTrainedModel):
    config_class = Config
"""


def _with_code(policy: Path, directory: Path, marker: Path, model_type: str) -> Path:
    """A copy of the model with classes of its own, in a module that creates a file when run."""
    shutil.copytree(policy, directory)
    (directory / "custom.py").write_text(CODE.format(marker=str(marker)) + CUSTOM_MODEL)
    classes = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    for name, auto_map in (
        ("config.json", classes),
        ("tokenizer_config.json", {"AutoTokenizer": ["custom.Tokenizer", None]}),
    ):
        settings = json.loads((directory / name).read_text()) | {"auto_map": auto_map}
        if name == "config.json":
            settings["model_type"] = model_type
        (directory / name).write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize(("model_type", "status"), [("made_up", 1), ("qwen2", 0)])
def test_code_in_a_model_directory_is_not_run(
    model_type: str,
    status: int,
    policy: Path,
    train: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """Refused if no class of transformers can load the model; else that class is used."""
    marker = tmp_path / "was_run"
    directory = _with_code(policy, tmp_path / "policy", marker, model_type)
    fit(directory, train, tmp_path / "run", "--trainer.max_steps", 1, status=status)
    if status:
        error = message(capsys)
        assert str(directory) in error
        assert "--model.trust_remote_code true" in error
    assert not marker.exists()


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("command", ["fit", "validate", "export"])
def test_a_checkpoint_that_would_run_code_is_refused(
    command: str, policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    marker, checkpoint = tmp_path / "was_run", tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "kto": Payload(marker)}, checkpoint)
    if command == "export":
        assert run_cli("export", checkpoint, tmp_path / "out") == 1
    else:
        data = "--data.train" if command == "fit" else "--data.validation"
        arguments = ("--model.policy", policy, data, train, "--output_dir", tmp_path / "run")
        assert run_cli(command, *arguments, "--ckpt_path", checkpoint) == 1
    assert str(checkpoint) in message(capsys)
    assert not marker.exists()


def test_a_pickled_adapter_is_refused(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lora = ("--model.lora.r", 2, "--trainer.max_steps", 1)
    adapter = fit(policy, train, tmp_path / "run", *lora) / "adapter"
    (adapter / "adapter_model.safetensors").unlink()
    marker = tmp_path / "was_run"
    torch.save({"weight": Payload(marker)}, adapter / "adapter_model.bin")
    capsys.readouterr()
    fit(adapter, train, tmp_path / "again", status=1)
    error = message(capsys)
    assert str(adapter) in error
    assert "pickles" in error
    assert not marker.exists()


def test_predict_skips_its_own_output_files(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(train.read_bytes())
    command = ("predict", "--model.policy", policy)
    for _ in range(2):
        assert run_cli(*command, "--data.predict", tmp_path / "*.jsonl") == 0
    warning = capsys.readouterr().err
    assert f"skipped {tmp_path / 'a.jsonl'}.rewards.jsonl" in warning
    written = sorted(path.name for path in tmp_path.glob("*.rewards.jsonl"))
    assert written == ["a.jsonl.rewards.jsonl", "b.jsonl.rewards.jsonl"]
    rewards = tmp_path / "a.jsonl.rewards.jsonl"
    assert run_cli(*command, "--data.predict", rewards) == 1
    assert f"{rewards}:1: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_record_of_ten_megabytes_is_trained_on(policy: Path, tmp_path: Path):
    records = plain_records(8)
    records[3]["completion"] = "the river was small " * 500_000
    data = write_jsonl(tmp_path / "train.jsonl", records)
    output = fit(policy, data, tmp_path / "run", "--data.max_length", 64)
    report = json.loads((output / "data_report.json").read_text())
    truncation = report["lengths"]["truncation"]["truncated"]
    assert truncation["desirable"] + truncation["undesirable"] >= 1
    assert len(rows(output)) == 2


def with_extra_token(policy: Path, target: Path) -> Path:
    """A copy of the model whose tokenizer has one token that the model does not embed."""
    shutil.copytree(policy, target)
    tokenizer = load_tokenizer(str(target))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(target)
    return target


def test_tokens_that_the_model_does_not_embed_only_matter_where_they_occur(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bigger = with_extra_token(policy, tmp_path / "policy")
    records = plain_records(8)
    data = write_jsonl(tmp_path / "train.jsonl", records)
    fit(bigger, data, tmp_path / "run", "--trainer.max_steps", 1)
    assert f"the model {bigger} embeds only" in capsys.readouterr().out
    records[4]["completion"] += "<extra>"
    write_jsonl(data, records)
    for options in ((), STREAMED):
        fit(bigger, data, tmp_path / "other", *options, status=1)
        error = message(capsys)
        assert "train.jsonl:5: '<extra>' is token" in error
        assert f"the model {bigger} embeds only" in error


def test_the_reference_must_embed_every_token_too(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    bigger = save_model(tmp_path / "policy", "qwen2", tokenizer)
    records = plain_records(8)
    records[1]["prompt"] += "<extra>"
    data = write_jsonl(tmp_path / "train.jsonl", records)
    fit(bigger, data, tmp_path / "run", "--trainer.max_steps", 1)
    capsys.readouterr()
    fit(bigger, data, tmp_path / "other", "--model.reference", policy, status=1)
    assert "train.jsonl:2: '<extra>' is token" in (error := message(capsys))
    assert f"the model {policy} embeds only" in error


@pytest.mark.parametrize("options", [(), STREAMED])
def test_what_a_template_drops_is_said_before_the_first_step(
    options: tuple, policy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}<|endoftext|>"
    )
    records = chat_records(8)
    for row in records[3:]:
        row["completion"][0]["reasoning"] = "first weigh the apples"
    data = write_jsonl(tmp_path / "train.jsonl", records)
    options = ("--data.chat_template", template, "--trainer.max_steps", 1, *options)
    output = fit(policy, data, tmp_path / "run", *options)
    said = "".join(capfd.readouterr())
    count = "1 completion" if STREAMED[0] in options else "5 completions"
    assert f"drops the reasoning of {count}, first at {data}:4" in said
    if STREAMED[0] not in options:
        report = json.loads((output / "data_report.json").read_text())
        assert [part["count"] for part in report["lost_parts"]] == [5]
        assert "reasoning of 5 completions" in "".join(report["findings"])
        held_out = ("--data.validation", data, "--data.chat_template", template)
        assert run_cli("validate", "--model.policy", policy, *held_out) == 0
        assert "drops the reasoning of 5 completions" in capfd.readouterr().err
