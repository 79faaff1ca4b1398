"""Loading of models and adapters: trainable parameters, dropout, and errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from kto_lightning.errors import ConfigError, ModelError
from kto_lightning.models.loading import load_causal_lm, load_model, vocabulary_size
from kto_lightning.models.lora import LoRA
from kto_lightning.models.randomness import disable_dropout
from kto_lightning.models.tokenizer import load_tokenizer
from tests.support.factories import make_model, make_tokenizer, save_adapter, save_model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", "llama", make_tokenizer())


def test_all_weights_are_trainable_and_the_model_in_training_mode(directory: Path) -> None:
    loaded = load_model(str(directory))
    assert loaded.adapter is None
    assert loaded.model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.model.parameters())


def test_a_new_adapter_is_float32_on_a_base_in_bfloat16(directory: Path) -> None:
    loaded = load_model(str(directory), dtype=torch.bfloat16, lora=LoRA(r=2, dropout=0.25))
    assert loaded.adapter == "new"
    for name, parameter in loaded.model.named_parameters():
        assert parameter.requires_grad is ("lora_" in name)
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
    rates = {m.p for m in loaded.model.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25}


def test_an_adapter_directory_uses_its_bases_tokenizer(directory: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", directory)
    assert load_model(str(adapter)).adapter == "given"
    assert len(load_tokenizer(str(adapter))) == len(load_tokenizer(str(directory)))
    assert vocabulary_size(str(adapter)) == vocabulary_size(str(directory))
    with pytest.raises(ConfigError, match=r"--model\.lora adds an adapter, but .* is an adapter"):
        load_model(str(adapter), lora=LoRA())


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        # Rates of dropout modules, of attention functions and of functional dropouts.
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("llama", {"attention_dropout": 0.5}),
        ("bloom", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
    ],
)
def test_every_dropout_is_disabled(architecture: str, settings: dict[str, Any]) -> None:
    check_dropout_is_disabled(make_model(architecture, vocab_size=50, **settings))


def test_functional_dropout_is_disabled() -> None:
    config = AutoConfig.for_model(
        "opt",
        vocab_size=50,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        dropout=0.5,
        attention_dropout=0.5,
        layerdrop=0.5,
    )
    check_dropout_is_disabled(AutoModelForCausalLM.from_config(config))


def check_dropout_is_disabled(model: Any) -> None:
    ids = torch.randint(3, 50, (1, 12))
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    expected = model.eval()(ids).logits
    torch.testing.assert_close(model.train()(ids).logits, expected)


def test_missing_weights_are_rejected(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    removed = next(name for name in weights if name.endswith("gate_proj.weight"))
    del weights[removed]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"lack 1 of the weights .*{removed}"):
        load_causal_lm(str(directory))


def test_damaged_weights_are_rejected(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ModelError, match="weights are damaged"):
        load_causal_lm(str(directory))


def test_pickled_weights_are_rejected(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickles only"):
        load_causal_lm(str(directory))


def test_adapters_of_virtual_tokens_are_rejected(directory: Path, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = AutoModelForCausalLM.from_pretrained(directory)
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match="a prompt-learning adapter"):
        load_model(str(tmp_path / "adapter"))


def test_directories_without_a_model_are_rejected(tmp_path: Path) -> None:
    for name, message in (
        (str(tmp_path), "has no config.json"),
        (str(tmp_path / "nothing" / "here" / "at" / "all"), "there is no directory"),
    ):
        with pytest.raises(ModelError, match=message):
            load_causal_lm(name)
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelError, match="is a file"):
        load_causal_lm(str(file))


def test_damaged_adapters_are_rejected(directory: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", directory)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"r": 3}))
    with pytest.raises(ModelError, match="does not fit its base"):
        load_model(str(adapter))
    nameless = settings | {"base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(json.dumps(nameless))
    with pytest.raises(ModelError, match="names no base_model_name_or_path"):
        load_model(str(adapter))
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(str(adapter))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"--model\.lora\.r must be at least 1, got 0"),
        ({"alpha": 0.0}, r"--model\.lora\.alpha must be a number above 0, got 0"),
        ({"alpha": float("nan")}, r"--model\.lora\.alpha"),
        ({"dropout": 1.0}, r"--model\.lora\.dropout must be at least 0 and below 1, got 1"),
    ],
)
def test_invalid_lora_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRA(**settings)


def test_unknown_target_modules_are_rejected(directory: Path) -> None:
    with pytest.raises(ModelError, match=r"--model\.lora\.target_modules"):
        load_model(str(directory), lora=LoRA(target_modules=["no_such_layer"]))
