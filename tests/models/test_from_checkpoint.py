"""The policy of a checkpoint is exported without its base where the checkpoint has all of it."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from kto_lightning.errors import ConfigError
from kto_lightning.models.export import save_policy, save_weights
from kto_lightning.models.from_checkpoint import load_policy_from_checkpoint, read_values
from kto_lightning.models.loading import load_model
from kto_lightning.models.lora import LoRA
from kto_lightning.models.policy import Policy
from kto_lightning.models.weights import drop_frozen
from kto_lightning.sharded_checkpoint import read_header, write_directory
from tests.models.test_merge import ORIGIN
from tests.support.factories import make_tokenizer, save_adapter, save_model
from tests.support.image_text import save_image_text


def trained(policy: Path, lora: LoRA | None = None, dtype: str = "float32") -> Policy:
    """A policy all of whose trained weights have changed."""
    loaded = load_model(str(policy), lora=lora, dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    for parameter in loaded.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return Policy(loaded.model, route="padded")


def checkpoint_of(policy: Policy, name: Path, lora: LoRA | None = None, dtype: str | None = None):
    whole = nn.ModuleDict({"policy": policy})
    state = drop_frozen(whole.state_dict(), whole)
    settings = lora.settings() if lora else None
    return {"state_dict": state, "kto": {"policy": str(name), "dtype": dtype, "lora": settings}}


def assert_exports(checkpoint: dict[str, Any], policy: Policy, output: Path, kind: str) -> Policy:
    """The export of a checkpoint is that of the policy, file by file; returns what was built."""
    tokenizer = make_tokenizer()
    built = load_policy_from_checkpoint(checkpoint, trust_remote_code=False)
    read = partial(read_values, checkpoint)
    save_weights(built, tokenizer, output / "exported", origin=ORIGIN, read=read)
    save_policy(policy, tokenizer, output, origin=ORIGIN)
    files = {path.name for path in (output / kind).iterdir()}
    assert {path.name for path in (output / "exported").iterdir()} == files
    for name in files:
        mine, theirs = output / "exported" / name, output / kind / name
        if name.endswith(".safetensors"):
            found, expected = load_file(mine), load_file(theirs)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)
        else:
            assert mine.read_bytes() == theirs.read_bytes(), name
    return built


def on_meta(policy: Policy) -> set[bool]:
    """Whether the base's parameters are on the device `meta`."""
    named = policy.causal_lm.named_parameters()
    return {parameter.is_meta for name, parameter in named if "lora_" not in name}


@pytest.mark.parametrize("architecture", ["qwen2", "qwen2_moe"])
def test_a_model_is_exported_without_its_base(architecture: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", architecture, make_tokenizer())
    policy = trained(base, dtype="bfloat16")
    checkpoint = checkpoint_of(policy, base, dtype="bfloat16")
    built = assert_exports(checkpoint, policy, tmp_path, "model")
    assert on_meta(built) == {True}


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True, "modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}],
)
def test_an_adapter_is_exported_without_its_base(settings: Any, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama", make_tokenizer())
    lora = LoRA(r=2, **settings)
    policy = trained(base, lora)
    built = assert_exports(checkpoint_of(policy, base, lora), policy, tmp_path, "adapter")
    assert on_meta(built) == {True}


def test_an_adapter_leaves_out_a_vision_tower_also_without_values(tmp_path: Path) -> None:
    base = save_image_text(tmp_path / "base", "llava")
    lora = LoRA(r=2)
    policy = trained(base, lora)
    built = assert_exports(checkpoint_of(policy, base, lora), policy, tmp_path, "adapter")
    assert on_meta(built) == {True}


def test_a_given_adapter_is_exported_without_its_base(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "qwen2", make_tokenizer())
    adapter = save_adapter(tmp_path / "given", base)
    policy = trained(adapter)
    built = assert_exports(checkpoint_of(policy, adapter), policy, tmp_path, "adapter")
    assert on_meta(built) == {True}


def test_frozen_weights_are_those_of_the_base(tmp_path: Path) -> None:
    base = save_image_text(tmp_path / "base", "llava")
    policy = trained(base)
    built = assert_exports(checkpoint_of(policy, base), policy, tmp_path, "model")
    assert on_meta(built) == {False}


def test_a_layer_without_a_gradient_needs_the_base(tmp_path: Path) -> None:
    """Mamba's mixer reads the weight of `dt_proj`, whose adapter is never trained."""
    base = save_model(tmp_path / "base", "mamba", make_tokenizer())
    lora = LoRA(r=2, target_modules=["dt_proj", "in_proj"])
    checkpoint = checkpoint_of(trained(base, lora), base, lora)
    assert not any("dt_proj" in name for name in checkpoint["state_dict"])
    built = load_policy_from_checkpoint(checkpoint, trust_remote_code=False)
    assert on_meta(built) == {False}


def test_values_of_a_directory_are_read_from_its_files(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "qwen2", make_tokenizer())
    policy = trained(base)
    checkpoint = checkpoint_of(policy, base)
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        state = {n: distribute_tensor(v, mesh) for n, v in checkpoint["state_dict"].items()}
        write_directory(checkpoint | {"state_dict": state}, tmp_path / "step=1.ckpt")
    finally:
        torch.distributed.destroy_process_group()
    header = read_header(tmp_path / "step=1.ckpt")
    built = assert_exports(header, policy, tmp_path, "model")
    assert on_meta(built) == {True}


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "qwen2", make_tokenizer())
    other = save_model(tmp_path / "other", "llama", make_tokenizer())
    checkpoint = checkpoint_of(trained(base), other)
    with pytest.raises(ConfigError, match="does not hold the weights of this policy"):
        load_policy_from_checkpoint(checkpoint, trust_remote_code=False)
