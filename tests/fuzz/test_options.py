"""Odd values of valid options, on the command line, in a settings file and in the environment."""

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kto_lightning.cli.settings_file import load_yaml
from kto_lightning.errors import ConfigError
from kto_lightning.strict_yaml import RefusedYAML
from tests.support.fuzz import ODD_VALUES, deep, fuzz, mutated_bytes, run_within_bounds

COUNTS = (
    *("data.batch_size", "data.max_tokens", "data.max_length", "data.pairing_seed"),
    *("data.buffer_size", "data.num_workers", "data.preprocessing_workers", "seed_everything"),
    *("checkpoint.every_n_steps", "report.generate", "report.max_new_tokens", "model.lora.r"),
    *("model.follow.every_n_steps", "trainer.max_steps", "trainer.max_epochs", "trainer.devices"),
    *("trainer.num_nodes", "trainer.limit_train_batches", "trainer.val_check_interval"),
)
NUMBERS = (
    *("model.beta", "model.learning_rate", "model.weight_decay", "model.warmup_ratio"),
    *("model.gradient_clip_norm", "model.desirable_weight", "model.undesirable_weight"),
    *("model.lora.alpha", "model.lora.dropout", "model.follow.alpha", "data.validation"),
)
CHOICES = (
    *("model.loss", "model.optimizer", "model.lr_schedule", "model.dtype", "model.quantization"),
    *("model.non_finite", "data.truncation", "data.pairing", "data.shuffle", "data.streaming"),
    *("trainer.precision", "trainer.strategy", "trainer.accelerator", "trainer.profiler"),
    *("trainer.callbacks", "trainer.logger", "trainer.plugins", "trainer.max_time"),
)
PATHS = (
    *("model.policy", "model.reference", "model.reference_cache", "data.train"),
    *("data.tokenizer", "data.chat_template", "ckpt_path", "output_dir", "config"),
)
GROUPS = ("model", "data", "trainer", "checkpoint", "report", "model.lora", "model.follow")
KEYS = st.sampled_from((*COUNTS, *NUMBERS, *CHOICES, *PATHS, *GROUPS))
ODD_WORDS = st.sampled_from(
    (
        *("", "-", "--", "true", "null", "nan", ".inf", "-.inf", "1e400", "1e3", "0x10", "1_000"),
        *("9" * 20, "-" + "9" * 20, "9" * 5000, "1.5", "-1", "0", "٣", "[1]", "{a: 1}", "[", "{"),
        *("&a [*a]", "*a", "!!python/object/apply:os.system [exit]", "os.system", "CSVLogger"),
        *("{class_path: os.system, init_args: {command: exit}}", "EarlyStopping", "~", "~nobody"),
        *("[" * 1000, "- " * 1000, "{a: " * 1000, "x" * 5000, "?", "a: b", "\x1b[31m", "\u202e"),
        *("../..", "/dev/zero", "/proc/self/mem", "owner/name", "last", "auto", "cpu", "4bit"),
    )
)
NOWHERE = {"model": {"policy": "no/such/model"}, "data": {"train": "no/such/file.jsonl"}}


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where relative paths, such as the default of `--output_dir`, end."""
    monkeypatch.chdir(tmp_path)


def arguments(settings: dict[str, Any]) -> list[str]:
    """`fit` of a model and of data that do not exist, with more options."""
    required = ["--model.policy=no/such/model", "--data.train=no/such/file.jsonl"]
    return ["fit", *required, *(f"--{key}={value}" for key, value in settings.items())]


@fuzz(15)
@given(options=st.dictionaries(KEYS, ODD_WORDS | st.text(max_size=20), min_size=1, max_size=3))
def test_odd_options_end_in_a_message(options: dict[str, str]) -> None:
    run_within_bounds(*arguments(options), names=(*options, "no/such"))


@fuzz(8)
@given(key=KEYS, value=ODD_VALUES | st.just(deep(60)), other=KEYS)
def test_odd_values_in_a_settings_file_end_in_a_message(key: str, value: Any, other: str) -> None:
    content: dict[str, Any] = json.loads(json.dumps(NOWHERE))
    *groups, name = key.split(".")
    place = content
    for group in groups:
        place = place.setdefault(group, {})
    place[name] = value
    Path("settings.yaml").write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")
    run_within_bounds("fit", "--config", "settings.yaml", names=("settings.yaml", key, "no/such"))


@fuzz(6)
@given(data=st.data())
def test_damaged_settings_files_end_in_a_message(data: st.DataObject) -> None:
    content = yaml.safe_dump(NOWHERE | {"seed_everything": 1, "trainer": {"max_steps": 1}})
    Path("settings.yaml").write_bytes(data.draw(mutated_bytes(content.encode())))
    run_within_bounds("fit", "--config", "settings.yaml")


@fuzz(6)
@given(key=KEYS, value=ODD_WORDS)
def test_odd_environment_variables_end_in_a_message(key: str, value: str) -> None:
    name = f"KTO_FIT__{key.upper().replace('.', '__')}"
    with patch.dict(os.environ, {name: value}):
        run_within_bounds(*arguments({}), names=(key, name, "no/such"))


@fuzz(200)
@given(text=st.text(alphabet="[]{}:,-?&*!|>'\"#%@ab1.\n ~", max_size=80))
def test_yaml_is_loaded_or_refused(text: str) -> None:
    try:
        load_yaml(text)
    except (yaml.YAMLError, ConfigError):
        return


def test_nesting_is_refused_before_it_is_loaded() -> None:
    for text in ("[" * 10**6, "- " * 10**6, "{a: " * 10**5, "&a [*a]", "x: &x {y: *x}"):
        with pytest.raises(RefusedYAML):
            load_yaml(text)
