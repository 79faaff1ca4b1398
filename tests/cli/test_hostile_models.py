"""Models, adapters and checkpoints that others made: refused with the file, and never run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.cli import fit, run_cli
from tests.support.factories import save_adapter


@pytest.fixture(scope="module")
def checkpoint(policy: Path, train: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = fit(policy, train, tmp_path_factory.mktemp("run"), "--trainer.max_steps", 1)
    return output / "checkpoints" / "step=1.ckpt"


@pytest.fixture(scope="module")
def adapter(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "adapter", policy)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The last message on stderr, which is a line of its own."""
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: "), line
    return line


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_checkpoint(
    checkpoint: Path, path: Path, change: Callable[[dict[str, Any]], Any]
) -> Path:
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import Qwen2Config, Qwen2ForCausalLM
class Config(Qwen2Config):
    model_type = "made_up"
class Model(Qwen2ForCausalLM):
    config_class = Config
"""


def with_code(policy: Path, directory: Path, marker: Path) -> Path:
    """A copy of the model that only code of its own can load."""
    shutil.copytree(policy, directory)
    (directory / "custom.py").write_text(CODE.format(marker=str(marker)))
    classes = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    change_json(directory / "config.json", auto_map=classes, model_type="made_up")
    return directory


def test_only_the_flag_of_export_lets_code_run(
    policy: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "was_run"
    model = with_code(policy, tmp_path / "policy", marker)

    def trust(content: dict[str, Any]) -> None:
        content["kto"] |= {"policy": str(model), "trust_remote_code": True}

    trusting = change_checkpoint(checkpoint, tmp_path / "a.ckpt", trust)
    assert run_cli("export", trusting, tmp_path / "out") == 1
    assert "to export: --trust_remote_code" in error_of(capsys)
    assert not marker.exists()
    assert run_cli("export", trusting, tmp_path / "out", "--trust_remote_code") == 0
    assert marker.exists()


def test_kernels_from_a_hub_are_code(
    policy: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(policy, tmp_path / "model"))
    change_json(model / "config.json", attn_implementation="someone/kernel")
    fit(model, train, tmp_path / "run", status=1)
    assert "config.json: attn_implementation someone/kernel is code" in error_of(capsys)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def write(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(text)


def settings(**changes: Any) -> Callable[[Path], None]:
    return lambda path: change_json(path, **changes)


DAMAGE: list[tuple[str, Callable[[Path], Any]]] = [
    ("config.json", write("")),
    ("config.json", write("[]")),
    ("config.json", write('{"model_type": "nothing"}')),
    ("config.json", write("[" * 100_000)),
    ("config.json", replace_by_pipe),
    ("config.json", replace_by_directory),
    ("config.json", settings(vocab_size="many")),
    ("config.json", settings(vocab_size=10**12)),
    ("config.json", settings(vocab_size=-1)),
    ("config.json", settings(num_hidden_layers=10**9)),
    ("config.json", settings(num_hidden_layers=10**4000)),
    ("config.json", settings(hidden_size=[1])),
    ("config.json", settings(hidden_act="nothing")),
    ("config.json", settings(num_attention_heads=0)),
    ("config.json", settings(rope_parameters={"rope_type": 1})),
    ("config.json", settings(quantization_config={"quant_method": "gptq", "bits": 4})),
    ("config.json", settings(quantization_config="x")),
    ("config.json", settings(transformers_weights="../x.bin")),
    ("config.json", settings(output_attentions=True)),
    ("config.json", settings(num_key_value_heads=3)),
    ("generation_config.json", write("{")),
    ("generation_config.json", replace_by_pipe),
    ("tokenizer.json", write("{")),
    ("tokenizer.json", write('{"version": "1.0", "model": {"type": "nothing"}}')),
    ("tokenizer.json", replace_by_pipe),
    ("tokenizer_config.json", write('"x"')),
    ("tokenizer_config.json", replace_by_directory),
    ("model.safetensors", truncate),
    ("model.safetensors", write("")),
    ("model.safetensors", replace_by_pipe),
    ("model.safetensors", replace_by_directory),
    ("model.safetensors.index.json", write('{"weight_map": {"a": "../../a.safetensors"}}')),
    ("model.safetensors.index.json", write('{"weight_map": {"a": "pytorch_model.bin"}}')),
    ("model.safetensors.index.json", write('{"weight_map": {"a": "missing.safetensors"}}')),
    ("model.safetensors.index.json", write('{"weight_map": 5}')),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_model_is_refused_with_the_file(
    name: str,
    damage: Callable[[Path], Any],
    policy: Path,
    train: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = Path(shutil.copytree(policy, tmp_path / "model"))
    damage(model / name)
    fit(model, train, tmp_path / "run", "--trainer.max_steps", 1, status=1)
    error = error_of(capsys)
    assert str(model) in error
    assert (
        name in error
        or "model_type" in error
        or "tokenizer" in error
        or "loaded" in error
        or "saved" in error
    )


def test_an_adapter_whose_keys_match_nothing_is_refused(
    policy: Path, adapter: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    renamed = Path(shutil.copytree(adapter, tmp_path / "renamed"))
    path = renamed / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({k.replace("model.layers", "model.lm.layers"): v for k, v in weights.items()}, path)
    fit(renamed, train, tmp_path / "run", status=1)
    error = error_of(capsys)
    assert str(renamed) in error
    assert f"{2 * len(weights)} of their weights do not match" in error
    weights.pop(min(weights))
    save_file(weights, path)
    fit(renamed, train, tmp_path / "run", status=1)
    assert "1 of their weights do not match" in error_of(capsys)


def test_the_base_of_an_adapter_can_be_given(
    policy: Path, adapter: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    change_json(moved / "adapter_config.json", base_model_name_or_path="/gone/base")
    one_step = ("--trainer.max_steps", 1)
    fit(moved, train, tmp_path / "run", *one_step, status=1)
    error = error_of(capsys)
    for part in (f"{moved}/adapter_config.json", "/gone/base", "--model.adapter_base DIR"):
        assert part in error
    output = fit(moved, train, tmp_path / "run", *one_step, "--model.adapter_base", policy)
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(policy)
    checkpoint = output / "checkpoints" / "step=1.ckpt"
    assert run_cli("export", checkpoint, tmp_path / "exported") == 0
    fit(policy, train, tmp_path / "full", "--model.adapter_base", policy, status=2)
    assert "--model.adapter_base is for adapter directories" in error_of(capsys)


def test_a_chain_of_adapters_is_refused(
    adapter: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = Path(shutil.copytree(adapter, tmp_path / "second"))
    change_json(second / "adapter_config.json", base_model_name_or_path=str(second))
    fit(second, train, tmp_path / "run", status=1)
    assert "is an adapter itself" in error_of(capsys)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 10**9},
        {"r": "x"},
        {"target_modules": 5},
        {"peft_type": "NOTHING"},
        {"megatron_config": {"a": 1}},
        {"base_model_name_or_path": 5},
        {"lora_alpha": None},
        {"alora_invocation_tokens": [1, 2]},
    ],
)
def test_a_damaged_adapter_is_refused(
    changes: dict[str, Any],
    adapter: Path,
    train: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    change_json(damaged / "adapter_config.json", **changes)
    fit(damaged, train, tmp_path / "run", status=1)
    assert str(damaged) in error_of(capsys)


def test_pickles_beside_other_safetensors_are_refused(
    adapter: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    weights = pickled / "adapter_model.safetensors"
    torch.save(load_file(weights), pickled / "adapter_model.bin")
    weights.rename(pickled / "other.safetensors")
    fit(pickled, train, tmp_path / "run", status=1)
    assert "pickles" in error_of(capsys)


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.pop(name)


def origin(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["kto"].update(changes)


def replaced(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(changes)


@pytest.mark.parametrize(
    "change",
    [
        drop("kto"),
        drop("state_dict"),
        replaced(state_dict={}),
        replaced(state_dict=5),
        replaced(state_dict={"policy.model.lm_head.weight": 5}),
        replaced(kto=5),
        replaced(kto={}),
        origin(policy=None),
        origin(policy="a\0b"),
        origin(policy="x" * 10_000),
        origin(policy="../../.."),
        origin(dtype="float7"),
        origin(lora=[1]),
        origin(lora={"r": 10**30}),
        origin(lora={"nothing": 1}),
        origin(lora={"r": 2, "target_modules": {"a": 1}}),
        origin(data={}),
        origin(data={"tokenizer": 5, "chat_template": None, "train": None}),
        origin(results=torch.ones(2)),
        origin(step=10**5000),
    ],
)
def test_export_refuses_a_hostile_checkpoint(
    change: Callable[[dict[str, Any]], None],
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = change_checkpoint(checkpoint, tmp_path / "a.ckpt", change)
    assert run_cli("export", path, tmp_path / "out") in (1, 2)
    error_of(capsys)


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_a_checkpoint_without_weights_is_refused(
    command: str,
    policy: Path,
    train: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty = change_checkpoint(checkpoint, tmp_path / "a.ckpt", replaced(state_dict={}))
    data = "--data.validation" if command == "validate" else "--data.predict"
    options = ("--model.policy", policy, data, train, "--output_dir", tmp_path / "run")
    assert run_cli(command, *options, "--ckpt_path", empty) == 2
    assert "holds no weights" in error_of(capsys)


def test_a_generation_config_that_cannot_be_saved_does_not_cost_the_run(
    policy: Path, train: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(policy, tmp_path / "model"))
    change_json(model / "generation_config.json", do_sample=False, temperature=0.5)
    output = fit(model, train, tmp_path / "run", "--trainer.max_steps", 1)
    assert (output / "model" / "model.safetensors").exists()


def test_processor_files_travel_with_the_model(policy: Path, train: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(policy, tmp_path / "model"))
    (model / "preprocessor_config.json").write_text('{"size": 224}')
    output = fit(model, train, tmp_path / "run", "--trainer.max_steps", 1)
    assert (output / "model" / "preprocessor_config.json").read_text() == '{"size": 224}'
    exported = tmp_path / "exported"
    assert run_cli("export", output / "checkpoints" / "step=1.ckpt", exported) == 0
    assert (exported / "preprocessor_config.json").exists()
