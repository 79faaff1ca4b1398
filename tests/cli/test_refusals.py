"""Bad options, data and models through the command line: a message and an exit status each."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.cli import fit, run_cli
from tests.support.factories import chat_records, make_tokenizer, plain_records, write_jsonl


def copy_of(policy: Path, target: Path) -> Path:
    return Path(shutil.copytree(policy, target))


def message(capsys: pytest.CaptureFixture[str]) -> str:
    """The error on stderr, without a traceback."""
    err = capsys.readouterr().err
    assert err.startswith("error: "), err
    assert "Traceback" not in err
    return err


def records_with(*lines: str) -> str:
    valid = [json.dumps(record) for record in plain_records(3)]
    return "\n".join([*valid, *lines]) + "\n"


BAD_DATA = {
    "no label": (
        records_with('{"prompt": "a", "completion": "b"}'),
        ["1 of 4 records cannot be used", "train.jsonl:4: 'label' is missing", "give it a label"],
    ),
    "null label": (
        records_with('{"prompt": "a", "completion": "b", "label": null}'),
        ["train.jsonl:4: 'label' must be true or false, got null", "Drop the line or give it"],
    ),
    "not JSON": (records_with("{not json"), ["train.jsonl:4: invalid JSON", "Fix or remove it"]),
    "a number": (records_with("7"), ["train.jsonl:4:"]),
    "many": (
        "\n".join(['{"prompt": "a", "completion": "b"}', '{"prompt": "a"}'] * 4) + "\n",
        ["8 of 8 records", "train.jsonl:1:", "train.jsonl:5:", "and 3 more"],
    ),
    "many alike": (
        "\n".join(['{"prompt": "a", "completion": "b"}'] * 9) + "\n",
        ["none of the 9 records", "train.jsonl:1:", "The columns are prompt, completion."],
    ),
    "empty": ("", ["train.jsonl: empty, 0 bytes"]),
    "a single prompt": (
        "\n".join(json.dumps(r | {"prompt": "same"}) for r in plain_records(4)) + "\n",
        ["at least two different prompts; got 4 records", "--model.loss apo_zero_unpaired"],
    ),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_reported_before_the_model_is_loaded(
    name: str, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text, parts = BAD_DATA[name]
    data = tmp_path / "train.jsonl"
    data.write_text(text, encoding="utf-8")
    broken = copy_of(policy, tmp_path / "policy")
    (broken / "model.safetensors").write_bytes(b"would fail if it were read")
    fit(broken, data, tmp_path / "run", status=1)
    error = message(capsys)
    for part in parts:
        assert part in error
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_held_out_records_that_cannot_be_paired_are_refused_before_the_model_is_loaded(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    held_out = write_jsonl(
        tmp_path / "held_out.jsonl", [r | {"prompt": "same"} for r in plain_records(4)]
    )
    broken = copy_of(policy, tmp_path / "policy")
    _garbage(broken)
    fit(broken, train, tmp_path / "run", "--data.validation", held_out, status=1)
    assert "at least two different prompts; got 4 records" in message(capsys)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing*.jsonl", "missing"])
def test_missing_data_files(
    name: str, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fit(policy, tmp_path / name, tmp_path / "run", status=1)
    assert str(tmp_path / name) in message(capsys)


def _without(*names: str):
    def damage(directory: Path) -> None:
        for name in names:
            for path in directory.glob(name):
                path.unlink()

    return damage


def _truncated(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _garbage(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"not weights" * 50)


def _pickled(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, directory / "pytorch_model.bin")


def _bigger_tokenizer(directory: Path) -> None:
    make_tokenizer(chat_template="qwen3").save_pretrained(directory)


def _unknown_type(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "nothing"}')


BAD_MODELS = {
    "no config": (_without("config.json"), ["has no config.json", "save_pretrained"]),
    "no tokenizer": (_without("tokenizer*"), ["no tokenizer", "--data.tokenizer"]),
    "no weights": (_without("*.safetensors"), ["has no weights"]),
    "truncated weights": (_truncated, ["its weights are damaged", "Copy them again"]),
    "garbage for weights": (_garbage, ["its weights are damaged", "Copy them again"]),
    "pickled weights": (_pickled, ["pickles", "safetensors"]),
    "tokenizer too big": (_bigger_tokenizer, ["tokens, but the model", "embeds only"]),
    "unknown architecture": (_unknown_type, ["config.json cannot be used", "nothing"]),
    "broken config": (
        lambda d: (d / "config.json").write_text("{"),
        ["config.json cannot be"],
    ),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{"), ["no tokenizer that"]),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model_directories(
    name: str, policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    damage, parts = BAD_MODELS[name]
    directory = copy_of(policy, tmp_path / "policy")
    damage(directory)
    fit(directory, train, tmp_path / "run", status=1)
    error = message(capsys)
    for part in [str(directory), *parts]:
        assert part in error


@pytest.mark.parametrize("name", ["missing", "owner/missing", "no/such/place", "train.jsonl"])
def test_missing_models(name: str, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fit(train if name == train.name else Path(name), train, tmp_path, status=1)
    assert name in message(capsys)


def test_conversations_without_a_chat_template(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = write_jsonl(tmp_path / "chat.jsonl", chat_records(4))
    fit(policy, data, tmp_path / "run", status=1)
    error = message(capsys)
    assert "no chat template" in error
    assert "--data.chat_template" in error


def refused(*options: Any, command: str = "fit") -> None:
    """Expect exit status 2, before the data and the model, which do not exist, are read."""
    nowhere = ("--model.policy", "no/such/model", "--output_dir", "/no/such/output")
    data = () if command == "predict" else ("--data.train", "no/such/data.jsonl")
    assert run_cli(command, *nowhere, *data, *options) == 2


LORA_SETTINGS = "is no setting of an adapter. Did you mean rank_pattern? It has r, alpha, "


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("model.betta", "model.beta"),
        ("model.learningrate", "model.learning_rate"),
        ("model.bet", "model.beta"),
        ("data.batchsize", "data.batch_size"),
        ("trainer.max_step", "trainer.max_steps"),
        ("checkpoint.every_n_step", "checkpoint.every_n_steps"),
        ("output", "output_dir"),
        ("seed", "seed_everything"),
        ("beta", "model.beta"),
        ("max_steps", "trainer.max_steps"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(
    command: str, wrong: str, nearest: str, capsys: pytest.CaptureFixture[str]
):
    refused(f"--{wrong}", "1", command=command)
    error = message(capsys)
    assert f"there is no option '{wrong}'. Did you mean '--{nearest}'?" in error
    assert len(error.splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model:\n  betta: 1\n", "'model.betta'. Did you mean '--model.beta'?"),
        ("modle:\n  beta: 1\n", "'modle.beta'. Did you mean '--model.beta'?"),
        ("model:\n  lora:\n    rank: 8\n", "--model.lora.rank " + LORA_SETTINGS),
        (
            "model:\n  beta: x\n",
            "--model.beta must be a number, got x.",
        ),
        ("model:\n  dtype: x\n", "--model.dtype must be float32, bfloat16 or null, got x."),
        ("data:\n  batch_size: null\n", "--data.batch_size must be a whole number, got null."),
        ("model: [\n", "is not valid YAML: while parsing a flow"),
        ("just text\n", "Unexpected config: just text\n"),
        ("", "Unexpected config:\n"),
    ],
)
def test_wrong_settings_files(
    text: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = tmp_path / "settings.yaml"
    config.write_text(text, encoding="utf-8")
    refused("--config", config)
    error = message(capsys)
    assert part in error
    if "config:" in part:
        assert f"--config {config} holds no options such as `model: {{beta: 0.2}}`: " in error


def test_a_settings_file_before_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tmp_path / "settings.yaml"
    config.write_text("model:\n  beta: 1\n", encoding="utf-8")
    assert run_cli("--config", config, "fit", "--model.policy", "no/such") == 2
    assert "Write `fit --config FILE`." in message(capsys)


def test_a_missing_settings_file(capsys: pytest.CaptureFixture[str]):
    refused("--config", "no/such.yaml")
    assert "no/such.yaml" in message(capsys)


WRONG_VALUES = {
    ("model.beta", "abc"): "--model.beta must be a number, got abc",
    ("model.beta", "0"): "--model.beta must be a number above 0, got 0",
    ("model.beta", "-1"): "--model.beta must be a number above 0, got -1",
    ("model.beta", "nan"): "--model.beta must be a number, got nan",
    ("model.beta", ".nan"): "--model.beta must be a number above 0, got nan",
    ("model.loss", "dpo"): "--model.loss must be kto or apo_zero_unpaired, got dpo",
    ("model.desirable_weight", "-1"): "--model.desirable_weight must be 'auto' or a positive",
    ("model.undesirable_weight", "0"): "--model.undesirable_weight must be 'auto' or a positive",
    ("model.learning_rate", "-1"): "--model.learning_rate must be at least 0, got -1",
    ("model.optimizer", "adam"): "--model.optimizer must be one of adamw, ",
    ("model.lr_schedule", "step"): "--model.lr_schedule must be one of linear, cosine",
    ("model.warmup_ratio", "2"): "--model.warmup_ratio must be at least 0 and at most 1, got 2",
    ("model.gradient_clip_norm", "0"): "--model.gradient_clip_norm must be a number above 0",
    ("model.dtype", "float16"): "--model.dtype must be float32, bfloat16 or null, got float16",
    ("model.dtype", "bfloat16"): "Add --model.lora",
    ("model.lora.r", "0"): "--model.lora.r must be at least 1, got 0",
    ("model.lora.r", "x"): "--model.lora.r must be a whole number, got x.",
    ("model.lora.rank", "8"): "--model.lora.rank " + LORA_SETTINGS,
    (
        "model.lora",
        "5",
    ): "--model.lora must be LoRA (r, alpha, target_modules, dropout, …) or null, got 5",
    ("data.batch_size", "0"): "--data.batch_size must be at least 1, got 0",
    ("data.batch_size", "2.5"): "--data.batch_size must be a whole number, got 2.5",
    ("data.max_length", "1"): "--data.max_length must be at least 2, got 1",
    ("data.max_tokens", "0"): "--data.max_tokens must be at least 1, got 0",
    ("data.pairing", "random"): "--data.pairing must be distinct_prompts or rotate, got random",
    ("data.pairing_seed", "-1"): "--data.pairing_seed must be at least 0, got -1",
    ("data.truncation", "middle"): "--data.truncation must be keep_start or keep_end",
    ("data.num_workers", "-1"): "--data.num_workers must be at least 0, got -1",
    ("data.preprocessing_workers", "0"): "--data.preprocessing_workers must be at least 1",
    ("checkpoint.every_n_steps", "0"): "--checkpoint.every_n_steps must be at least 1 or null",
    ("seed_everything", "-3"): "--seed_everything must be from 0 to 4294967295, got -3",
    ("seed_everything", "x"): "--seed_everything must be true or false or a whole number",
    ("trainer.max_steps", "0"): "--trainer.max_steps must be at least 1, or -1",
    ("trainer.max_steps", "-5"): "--trainer.max_steps must be at least 1, or -1",
    ("trainer.max_epochs", "0"): "--trainer.max_epochs must be at least 1, or -1",
    ("trainer.max_epochs", "-1"): "Give one of them",
    ("trainer.limit_train_batches", "0"): "leaves nothing to train on",
    ("trainer.gradient_clip_val", "1"): "Use --model.gradient_clip_norm",
    ("trainer.gradient_clip_algorithm", "value"): "Use --model.gradient_clip_norm",
    ("trainer.accumulate_grad_batches", "2"): "Use --data.batch_size",
    ("trainer.fast_dev_run", "true"): "Use --trainer.max_steps 1",
    ("trainer.barebones", "true"): "--trainer.barebones writes no metrics",
    ("trainer.enable_checkpointing", "false"): "--checkpoint.every_n_steps",
    ("trainer.default_root_dir", "elsewhere"): "Use --output_dir",
    ("trainer.overfit_batches", "1"): "Use --trainer.limit_train_batches",
    (
        "trainer.use_distributed_sampler",
        "true",
    ): "would split batches over ranks a second time. Omit it",
    ("trainer.strategy", "nothing"): "--trainer.strategy must be one of auto, ddp, fsdp2",
    ("trainer.accelerator", "nothing"): "--trainer.accelerator must be one of auto, cpu",
    ("trainer.devices", "0"): "--trainer.devices must be at least 1, got 0",
    ("trainer.max_time", "soon"): "DD:HH:MM:SS",
    ("trainer.precision", "half"): "--trainer.precision must be",
    ("trainer.precision", "bf16-true"): "Use bf16-mixed",
    ("trainer.precision", "16-true"): "Use bf16-mixed",
    ("trainer.precision", "16-mixed"): "Use bf16-mixed or 32-true",
    ("trainer.precision", "16"): "Use bf16-mixed or 32-true",
    ("trainer.precision", "64-true"): "Use bf16-mixed or 32-true",
    ("trainer.precision", "transformer-engine"): "Use bf16-mixed or 32-true",
    (
        "trainer.logger",
        "CSVLogger",
    ): "--trainer.logger needs save_dir. Its settings are save_dir, name",
}


ODD_VALUES = {
    (
        "model.lora",
        "true",
    ): "--model.lora must be LoRA (r, alpha, target_modules, dropout, …) or null",
    ("model.lora.alpha", "null"): "--model.lora.alpha must not be null.",
    ("model.lora.target_modules", "[1]"): "--model.lora.target_modules must be a text or a list",
    ("model.follow.n", "2"): "--model.follow has no setting 'n'. It has every_n_steps, alpha.",
    ("model.lora.r.x", "5"): "--model.lora.r must be a whole number, got its setting 'x' alone.",
    ("model", "5"): "--model takes a YAML file with its settings. Or write --model.NAME.",
    ("model.loss", ""): "--model.loss must be kto or apo_zero_unpaired, got ''.",
    ("model.beta", "true"): "--model.beta must be a number, got true.",
    ("data.batch_size", "true"): "--data.batch_size must be a whole number, got true.",
    ("data.batch_size", "1e400"): "--data.batch_size must be a whole number, got 1e400.",
    ("data.validation", "true"): "--data.validation must be a file of records or a fraction",
    ("trainer.strategy", "foo"): "--trainer.strategy must be one of auto, ddp, fsdp2",
    ("trainer.strategy", "null"): "--trainer.strategy must be one of auto, ddp, fsdp2",
    ("trainer.strategy", "os.system"): "--trainer.strategy must be one of auto, ddp, fsdp2",
    ("trainer.strategy", "xla"): "--trainer.strategy must be one of auto, ddp, fsdp2",
    ("trainer.devices", "x"): "--trainer.devices must be auto or a number of processes",
    ("trainer.devices", "-2"): "--trainer.devices must be auto or a number of processes",
    ("trainer.devices", "1.5"): "--trainer.devices must be auto or a number of processes",
    ("trainer.accelerator", "tpu"): "--trainer.accelerator tpu: PyTorch finds no such device",
    ("trainer.callbacks", "nonsense"): "--trainer.callbacks must be a list, Callback or null",
    ("trainer.callbacks", "os.system"): "--trainer.callbacks must be a list, Callback or null",
    ("trainer.callbacks", "EarlyStopping"): "--trainer.callbacks needs monitor. Its settings are",
    ("trainer.callbacks.monitor", "x"): "has no setting 'monitor'. Name a class first.",
    ("trainer.logger", "nonsense"): "--trainer.logger must be Logger, a list, true or false or",
    ("trainer.logger", "[CSVLogger]"): "--trainer.logger needs save_dir.",
    ("trainer.logger.save_dir", "x"): "--trainer.logger must be Logger, a list",
    ("trainer.profiler", "x"): "--trainer.profiler must be one of simple, advanced",
    ("trainer.max_time", "5"): "--trainer.max_time must be a duration as DD:HH:MM:SS, got 5.",
    ("trainer.max_time", "{a: 1}"): "--trainer.max_time is not a duration",
    ("trainer.val_check_interval", "true"): "--trainer.val_check_interval must be a duration",
    ("trainer.limit_val_batches", "1.5"): "--trainer.limit_val_batches must be a share from 0",
    ("trainer.limit_train_batches", ".inf"): "--trainer.limit_train_batches must be a share",
    ("trainer.min_steps", "-1"): "--trainer.min_steps must be at least 0, got -1.",
    ("output_dir", "a\0b"): "--output_dir holds a NUL character",
    ("model.policy", "a\0b"): "--model.policy holds a NUL character",
    ("config", "a\0b"): "--config",
    ("config", "x" * 5000): "…",
    ("model.beta", "[" * 100_000): "--model.beta: line 1: it is nested more than 50 levels deep",
    ("model.lora", "- " * 50_000): "--model.lora: line 1: it is nested more than 50 levels deep",
    ("data.train", "&a [*a]"): "--data.train: line 1: *a stands inside its own &a",
}


@pytest.mark.parametrize(("key", "value"), ODD_VALUES)
def test_an_odd_value_is_answered_in_one_line_with_its_key(
    key: str, value: str, capsys: pytest.CaptureFixture[str]
):
    refused("--trainer.accelerator", "cpu", f"--{key}", value)
    error = message(capsys)
    assert ODD_VALUES[key, value] in error
    assert len(error.splitlines()) <= 2
    assert len(error) < 1500


COUNTS = {
    # option: whether it may be -1
    **dict.fromkeys(("data.batch_size", "data.max_tokens", "data.max_length", "data.buffer_size")),
    **dict.fromkeys(("data.num_workers", "data.preprocessing_workers", "data.pairing_seed")),
    **dict.fromkeys(("checkpoint.every_n_steps", "report.generate", "report.max_new_tokens")),
    **dict.fromkeys(("trainer.max_steps", "trainer.max_epochs"), True),
    **dict.fromkeys(("trainer.min_steps", "trainer.min_epochs", "trainer.devices")),
    **dict.fromkeys(("trainer.num_nodes", "trainer.val_check_interval")),
    **dict.fromkeys(("trainer.limit_train_batches", "trainer.limit_val_batches")),
    **dict.fromkeys(("trainer.check_val_every_n_epoch", "trainer.log_every_n_steps")),
    "trainer.num_sanity_val_steps": True,
    **dict.fromkeys(("trainer.reload_dataloaders_every_n_epochs", "seed_everything")),
    **dict.fromkeys(("model.lora.r", "model.follow.every_n_steps")),
}


@pytest.mark.parametrize("key", COUNTS)
def test_a_count_has_limits(key: str, capsys: pytest.CaptureFixture[str]):
    for value in ("9" * 20, "-" + "9" * 20, *([] if COUNTS[key] else ["-1"])):
        refused("--trainer.accelerator", "cpu", f"--{key}={value}")
        assert f"--{key} must be" in message(capsys)


def test_the_last_of_several_values_is_named(capsys: pytest.CaptureFixture[str]):
    refused("--data.batch_size", "4", "--data.batch_size", "4.5")
    assert "--data.batch_size must be a whole number, got 4.5." in message(capsys)


ODD_FILES = {
    "no text": (b"\xff\xfem\x00", ":1: byte 0 is not UTF-8. Save the file as UTF-8."),
    "latin-1": ('model:\n  policy: "café"'.encode("latin-1"), ":2: byte 21 is not UTF-8."),
    "NUL": (b"model:\n  beta: 0.2\0\n", "is not valid YAML: "),
    "escaped NUL": (b'output_dir: "a\\0b"\n', "--output_dir holds a NUL character"),
    "tag": (b"model: !!python/object/apply:os.system [exit]", "is not valid YAML: could not"),
    "recursive": (b"model: &a [*a]", "line 1: *a stands inside its own &a"),
    "recursive mapping": (b"a:\n  lora: &a {r: *a}", "line 2: *a stands inside its own &a"),
    "deep": (b"[" * 100_000, "nested more than 50 levels deep"),
    "deep in blocks": (b"- " * 100_000, "nested more than 50 levels deep"),
    "bomb": (
        b"a: &a [" + b"x," * 50 + b"]\nb: &b [" + b"*a," * 50 + b"]\nc: [" + b"*b," * 50 + b"]",
        "its aliases stand for more than 100000 values",
    ),
    "twice": (b"model:\n  beta: 1\n  beta: 2\n", "line 3: the key 'beta' is there twice"),
    "a number for a key": (b"1: 2", "Key must be a string, got: 1"),
    "a list for a key": (b"? [a]\n: 1", "is not valid YAML: "),
    "a number for a group": (b"model: 5", "'model' must hold settings, got 5."),
    "a list for a group": (b"model: [1]", "'model' must hold settings, got [1]."),
    "several documents": (b"model: {}\n---\nmodel: {}", "expected a single document"),
    "many digits": (b"data: {batch_size: " + b"9" * 5000 + b"}", "is not valid YAML: it cannot"),
    "another value on the command line": (
        b"output_dir: 1e3",
        "--output_dir must be a text or null",
    ),
    "only a comment": (b"# nothing", "holds no options such as"),
    "large": (b"#" * 2_000_000, "has more than 1048576 bytes"),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_an_odd_settings_file_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    content, part = ODD_FILES[name]
    config = tmp_path / "settings.yaml"
    config.write_bytes(content)
    refused("--config", config)
    error = message(capsys)
    assert part in error
    assert str(config) in error or part.startswith("--output_dir")
    assert len(error) < 1500


def test_a_settings_file_is_utf8_with_or_without_its_mark(tmp_path: Path):
    config = tmp_path / "settings.yaml"
    for encoding in ("utf-8", "utf-8-sig"):
        config.write_bytes('model:\n  policy: "λ"\n  beta: 0.2\n'.encode(encoding))
        assert run_cli("fit", "--config", config, "--data.train", "x", "--print_config") == 0


@pytest.mark.parametrize("kind", ["directory", "pipe", "device", "missing"])
def test_a_settings_file_that_is_none(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = Path("/dev/zero") if kind == "device" else tmp_path / "settings.yaml"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    refused("--config", path)
    assert f"--config {path}" in message(capsys)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("KTO_FIT__MODEL__BETA", "x", "--model.beta must be a number, got x."),
        ("KTO_FIT__MODEL__LORA", "[" * 5000, "KTO_FIT__MODEL__LORA: line 1: it is nested"),
        ("KTO_FIT__DATA__BATCH_SIZE", "9" * 20, "--data.batch_size must be at most 2147483647"),
        ("KTO_FIT__CONFIG", "no", "--config: File does not exist"),
        ("KTO_FIT__MODEL", "5", "--model takes a YAML file"),
    ],
)
def test_an_odd_environment_variable(
    name: str,
    value: str,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv(name, value)
    refused()
    assert part in message(capsys)


@pytest.mark.parametrize(("key", "value"), WRONG_VALUES)
def test_a_wrong_value_is_answered_with_its_key(
    key: str, value: str, capsys: pytest.CaptureFixture[str]
):
    refused(f"--{key}", value)
    assert WRONG_VALUES[key, value] in message(capsys)


@pytest.mark.parametrize("arguments", [["fitt"], ["--unknown"], ["fit", "stray"], ["fit"]])
def test_wrong_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert run_cli(*arguments) == 2
    assert "help: python -m kto_lightning" in message(capsys)


def test_an_unknown_command_is_answered_with_all(capsys: pytest.CaptureFixture[str]):
    assert run_cli("exprt") == 2
    error = message(capsys)
    for command in ("fit", "validate", "predict", "inspect", "report", "export", "parity", "demo"):
        assert command in error


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_a_command_without_a_model(command: str, capsys: pytest.CaptureFixture[str]):
    assert run_cli(command) == 2
    assert "required: --model.policy\n" in message(capsys)


@pytest.mark.parametrize(
    ("command", "key"),
    [("fit", "data.train"), ("validate", "data.validation"), ("predict", "data.predict")],
)
def test_a_command_without_its_data(
    command: str, key: str, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run_cli(command, "--model.policy", policy, "--output_dir", tmp_path) == 2
    assert f"--{key} is needed" in message(capsys)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--data.validation", "1.5"], "a fraction must be between 0 and 1"),
        (["--data.validation", "0.001"], "leaves one side empty"),
        (["--data.pairing", "rotate", "--data.batch_size", "1"], "distinct_prompts"),
        (
            ["--data.validation", "0.2", "--trainer.val_check_interval", "100"],
            "--trainer.check_val_every_n_epoch null",
        ),
    ],
)
def test_options_that_do_not_fit_the_data(
    options: list[str],
    part: str,
    policy: Path,
    train: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    fit(policy, train, tmp_path, *options, status=2)
    assert part in message(capsys)


def test_a_max_length_that_leaves_no_example(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fit(policy, train, tmp_path, "--data.max_length", 3, status=1)
    assert "No example is left of 24 records" in message(capsys)


def test_an_output_that_is_a_file(policy: Path, train: Path, capsys: pytest.CaptureFixture[str]):
    fit(policy, train, train, status=2)
    assert f"--output_dir {train} is a file" in message(capsys)


def test_an_output_that_cannot_be_created(
    policy: Path, train: Path, capsys: pytest.CaptureFixture[str]
):
    fit(policy, train, train / "below", status=1)
    assert str(train) in message(capsys)


@pytest.mark.parametrize("key", ["policy", "reference"])
def test_a_run_does_not_overwrite_its_policy_or_reference(
    key: str, policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy_of(policy, tmp_path / "model")
    options = ("--model.reference", tmp_path / "model") if key == "reference" else ()
    start = policy if key == "reference" else tmp_path / "model"
    fit(start, train, tmp_path, *options, status=2)
    assert f"--model.{key} {tmp_path / 'model'} would be overwritten" in message(capsys)


def test_an_adapter_on_an_adapter(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lora = ("--model.lora.r", 4, "--trainer.max_steps", 1)
    adapter = fit(policy, train, tmp_path / "one", *lora) / "adapter"
    capsys.readouterr()
    fit(adapter, train, tmp_path / "two", *lora, status=2)
    assert "is an adapter already" in message(capsys)


def test_modules_that_a_model_does_not_have(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ("--model.lora.r", 4, "--model.lora.target_modules", "nothing")
    fit(policy, train, tmp_path, *options, status=1)
    assert "--model.lora.target_modules nothing" in message(capsys)


def test_a_module_by_its_name(policy: Path, train: Path, tmp_path: Path):
    options = ("--model.lora.target_modules", "q_proj", "--trainer.max_steps", 1)
    output = fit(policy, train, tmp_path / "run", *options)
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]


def test_an_output_directory_given_as_a_model(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = fit(policy, train, tmp_path / "run", "--trainer.max_steps", 1)
    capsys.readouterr()
    assert run_cli("predict", "--model.policy", output, "--data.predict", train) == 1
    assert f"Give {output / 'model'}.\n" in message(capsys)


def test_a_model_without_a_name(train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run_cli("predict", "--model.policy", "", "--data.predict", train) == 1
    assert "the name of a model is empty" in message(capsys)


def test_a_checkpoint_past_max_epochs(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = fit(policy, train, tmp_path / "run", "--trainer.max_epochs", 2)
    capsys.readouterr()
    fit(policy, train, output, "--ckpt_path", "last", status=2)
    assert "2 epochs are completed in this checkpoint, more than" in message(capsys)


@pytest.mark.parametrize(
    ("monitor", "data", "part"),
    [
        (
            "val/loss",
            (),
            "EarlyStopping monitors val/loss, but there is no validation. Add --data.",
        ),
        ("val/los", ("--data.validation", 0.2), "monitors val/los, which is not one of "),
        ("train/loss", ("--data.validation", 0.2), "monitors train/loss, which is not one of "),
    ],
)
def test_a_callback_that_monitors_an_unavailable_metric(
    monitor: str, data: tuple[Any, ...], part: str, tmp_path: Path, capsys
):
    """Refused before records are read and the model is loaded."""
    absent = tmp_path / "absent"
    stopping = ("--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", monitor)
    fit(absent, absent, tmp_path / "run", *stopping, *data, status=2)
    assert part in message(capsys)


@pytest.mark.parametrize(
    ("name", "settings", "part"),
    [
        ("BatchSizeFinder", (), "cannot change the batch size here. Use --data.batch_size"),
        (
            "GradientAccumulationScheduler",
            ("--trainer.callbacks.scheduling", "{0: 2}"),
            "has nothing to accumulate here. Use --data.batch_size",
        ),
        ("LearningRateFinder", (), "Use --model.learning_rate."),
        ("RichProgressBar", (), "would be a second progress display."),
        (
            "StochasticWeightAveraging",
            ("--trainer.callbacks.swa_lrs", "0.1"),
            "Use WeightAveraging or EMAWeightAveraging.",
        ),
        (
            "ModelPruning",
            ("--trainer.callbacks.pruning_fn", "l1_unstructured"),
            "Prune the exported model.",
        ),
        (
            "EMAWeightAveraging",
            ("--trainer.callbacks.update_starting_at_epoch", "1"),
            "averages at the end of epochs",
        ),
        (
            "EMAWeightAveraging",
            ("--trainer.strategy", "fsdp2"),
            "averages whole models, and this strategy shards them.",
        ),
        ("Timer", (), "cannot be written to config.yaml. Use --trainer.max_time."),
    ],
)
def test_a_callback_that_cannot_work_here(
    name: str, settings: tuple[str, ...], part: str, tmp_path: Path, capsys
):
    """Refused before records are read and the model is loaded."""
    absent = tmp_path / "absent"
    callback = ("--trainer.callbacks", name, *settings)
    fit(absent, absent, tmp_path / "run", *callback, status=2)
    error = message(capsys)
    assert error.startswith(f"error: --trainer.callbacks {name} ")
    assert part in error


def test_an_unknown_environment_variable_is_answered_with_the_nearest(
    policy: Path, train: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KTO_FIT__MODEL__BETTA", "0.2")
    fit(tmp_path / "absent", tmp_path / "absent", tmp_path / "run", status=2)
    error = message(capsys)
    assert (
        "KTO_FIT__MODEL__BETTA sets no option of fit. Did you mean KTO_FIT__MODEL__BETA?" in error
    )
    monkeypatch.delenv("KTO_FIT__MODEL__BETTA")
    monkeypatch.setenv("KTO_FIT__MODEL__BETA", "0.2")
    output = fit(policy, train, tmp_path / "run", "--trainer.max_steps", 1)
    assert "beta: 0.2" in (output / "config.yaml").read_text()


@pytest.mark.parametrize("value", ["abc", "-5", "", "1.5", "9" * 30])
@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_NTASKS"])
def test_an_odd_variable_of_a_launcher_is_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert run_cli("inspect", "none.jsonl") == 2
    assert f"the environment variable {name} must be a whole number" in capsys.readouterr().err
