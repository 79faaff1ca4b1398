"""Weights that are saved unit by unit are those that `save_pretrained` writes of a whole model."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kto_lightning.models import safetensors_files
from kto_lightning.models.export import save_policy
from kto_lightning.models.loading import load_causal_lm, load_model
from kto_lightning.models.lora import LoRA
from kto_lightning.models.lora_layers import expected_warnings_ignored
from kto_lightning.models.policy import Policy
from kto_lightning.models.saved_weights import saved_weights
from tests.models.test_merge import ORIGIN
from tests.support.factories import make_tokenizer, save_model
from tests.support.image_text import make_image_text

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2_moe": {},
    "gemma2": {},
    "gpt2": {},
    "mamba": {},
}


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_files, "MAX_FILE_SIZE", 40_000)


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of the files of a directory, each in one file."""
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        loaded = load_file(file)
        assert found.keys().isdisjoint(loaded)
        found |= loaded
    return found


def assert_same_model(found: Path, expected: Path) -> None:
    """Both directories have the same tensors, bit for bit, and the same configs."""
    mine, theirs = tensors(found), tensors(expected)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype, name
        assert torch.equal(mine[name], value), name
    for name in ("config.json", "generation_config.json"):
        assert (found / name).read_text() == (expected / name).read_text()


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("architecture", FAMILIES)
def test_several_files_hold_what_save_pretrained_writes(architecture: str, tmp_path: Path):
    tokenizer = make_tokenizer()
    base = save_model(tmp_path / "base", architecture, tokenizer, **FAMILIES[architecture])
    model = load_causal_lm(str(base))
    model.save_pretrained(tmp_path / "whole")
    save_policy(Policy(model, route="padded"), tokenizer, tmp_path / "out", origin=ORIGIN)
    out = tmp_path / "out" / "model"
    assert_same_model(out, tmp_path / "whole")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    written = tensors(out)
    assert index["metadata"] == {
        "total_parameters": model.num_parameters(),
        "total_size": sum(value.nbytes for value in written.values()),
    }
    assert index["weight_map"].keys() == written.keys()
    assert len(set(index["weight_map"].values())) > 2
    opened = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(opened[name], value) for name, value in model.state_dict().items())


@pytest.mark.usefixtures("small_files")
def test_an_image_text_model_is_saved_whole(tmp_path: Path):
    model = make_image_text("mistral3", vocab_size=512)
    model.save_pretrained(tmp_path / "whole")
    save_policy(Policy(model, route="padded"), make_tokenizer(), tmp_path / "out", origin=ORIGIN)
    assert_same_model(tmp_path / "out" / "model", tmp_path / "whole")


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize(
    ("architecture", "dtype", "settings"),
    [
        ("llama", torch.float32, {"use_dora": True, "modules_to_save": ["lm_head"]}),
        ("llama", torch.bfloat16, {"target_modules": ["q_proj", "lm_head"]}),
        ("qwen2", torch.bfloat16, {}),
        ("qwen2_moe", torch.float32, {"target_parameters": ["experts.gate_up_proj"]}),
    ],
    ids=["dora and a module trained whole", "head in bfloat16", "tied in bfloat16", "experts"],
)
def test_layers_are_merged_as_peft_merges_the_model(
    architecture: str, dtype: torch.dtype, settings: dict[str, Any], tmp_path: Path
):
    tokenizer = make_tokenizer()
    base = save_model(tmp_path / "base", architecture, tokenizer)
    loaded = load_model(str(base), dtype=dtype, lora=LoRA(r=2, **settings)).model
    generator = torch.Generator().manual_seed(0)
    for parameter in loaded.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    whole: Any = copy.deepcopy(loaded).float()
    with expected_warnings_ignored():
        whole.merge_and_unload().save_pretrained(tmp_path / "whole")
    policy = Policy(loaded, route="padded")
    assert save_policy(policy, tokenizer, tmp_path / "out", origin=ORIGIN) is None
    assert_same_model(tmp_path / "out" / "model", tmp_path / "whole")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in before.items())


def test_a_conversion_over_several_layers_makes_one_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = load_causal_lm(str(save_model(tmp_path, "llama", make_tokenizer())))
    assert len(saved_weights(model).units) == 5  # two layers, embeddings, norm, head

    def stack(_: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        norms = [name for name in state if name.endswith("input_layernorm.weight")]
        stacked = {"norms": torch.stack([state[name] for name in norms])} if norms else {}
        return {name: state[name] for name in state if name not in norms} | stacked

    convert: Callable[..., Any] = stack
    monkeypatch.setattr("kto_lightning.models.saved_weights.revert_weight_conversion", convert)
    weights = saved_weights(model)
    (unit,) = weights.units
    values = unit.convert({name: tensor.detach() for name, tensor in unit.tensors.items()})
    assert values["norms"].shape == (2, 32)
    assert weights.tensors.keys() == values.keys()
