"""Names of models, the files behind them, and the identity of what they hold."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from kto_lightning.errors import ModelError
from kto_lightning.models.model_files import model_identity
from tests.support.factories import make_tokenizer, save_adapter, save_model


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(path: Path) -> None:
    weights = load_file(path)
    name = min(weights)
    weights[name] = weights[name] + 1
    save_file(weights, path, metadata={"format": "pt"})


def test_the_identity_is_of_the_content(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama", make_tokenizer())
    first = model_identity(str(model))
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    change_json(copy / "config.json", transformers_version="0.0", _name_or_path="elsewhere")
    assert model_identity(str(copy)) == first
    change_weights(copy / "model.safetensors")
    assert model_identity(str(copy)) != first
    change_json(model / "config.json", rms_norm_eps=0.5)
    assert model_identity(str(model)) != first


def test_the_identity_of_an_adapter_has_its_base(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama", make_tokenizer())
    adapter = save_adapter(tmp_path / "adapter", base)
    first = model_identity(str(adapter))
    shutil.move(base, tmp_path / "moved")
    change_json(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "moved"))
    assert model_identity(str(adapter)) == first
    change_json(adapter / "adapter_config.json", lora_alpha=99)
    second = model_identity(str(adapter))
    assert second != first
    change_weights(tmp_path / "moved" / "model.safetensors")
    assert model_identity(str(adapter)) not in {first, second}


def test_files_without_an_identity_are_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama", make_tokenizer())
    (model / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        model_identity(str(model))
    os.mkfifo(model / "pipe.safetensors")
    (model / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"pipe\.safetensors is not a file that can be read"):
        model_identity(str(model))
