"""Merged models have their adapter's logits, also with tied weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from kto_lightning.models.export import save_policy
from kto_lightning.models.loading import load_model
from kto_lightning.models.lora import LoRA
from kto_lightning.models.lora_layers import expected_warnings_ignored
from kto_lightning.models.merging import merge_obstacle
from kto_lightning.models.routes.choose import make_policy
from tests.support.factories import make_model, make_tokenizer, save_model
from tests.support.plain_forwards import Float64, float64_copy
from tests.support.tolerances import assert_errs_like_plain

ORIGIN = {
    "policy": "base",
    "reference": "base",
    "beta": 0.1,
    "loss": "kto",
    "step": 1,
    "results": {},
    "data": {
        "train": "records.jsonl",
        "validation": None,
        "desirable": 1,
        "undesirable": 1,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
    },
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "targets",
    [
        *(["lm_head"], ["lm_head", "q_proj"], ["embed_tokens"], ["lm_head", "embed_tokens"]),
        *(["q_proj"], "all-linear"),
    ],
)
def test_merged_logits_equal_the_adapters(tmp_path, targets, tied):
    tokenizer = make_tokenizer()
    base = save_model(tmp_path / "base", "qwen2", tokenizer, tie_word_embeddings=tied)
    loaded = load_model(str(base), lora=LoRA(r=2, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in loaded.model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    exact, another = float64_copy(loaded.model), copy.deepcopy(loaded.model)
    policy, _ = make_policy(loaded.model)
    ids = torch.randint(3, 300, (1, 12), generator=generator)
    with torch.no_grad(), policy.use_original_attention():
        adapted = policy.model(input_ids=ids).logits
    save_policy(policy, tokenizer, tmp_path / "out", origin=ORIGIN)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    with torch.no_grad(), Float64():
        truth = exact(input_ids=ids).logits
    # Merging rounds the weights, peft's merging too, which is wrong where a tied one is adapted.
    maybe_tied = not {"lm_head", "embed_tokens"}.isdisjoint(targets)
    with torch.no_grad():
        expected = adapted if maybe_tied else another.merge_and_unload()(input_ids=ids).logits
    assert_errs_like_plain(merged, expected, truth)
    assert not torch.allclose(plain, adapted, atol=1e-2)


def adapted(model, **settings):
    """A model with an adapter far from zero."""
    settings = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False} | settings
    with expected_warnings_ignored():
        return get_peft_model(model.train(), LoraConfig(task_type="CAUSAL_LM", **settings))


@pytest.mark.parametrize("architecture", ["zamba", "zamba2"])
def test_adapters_on_one_shared_block_are_exported_and_not_merged(tmp_path, architecture):
    tokenizer = make_tokenizer()
    base = save_model(tmp_path / "base", architecture, tokenizer)
    model = adapted(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    policy, _ = make_policy(model)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), policy.use_original_attention():
        expected = policy.model(input_ids=ids).logits
    obstacle = save_policy(policy, tokenizer, tmp_path / "out", origin=ORIGIN)
    shared = "shared_transf" if architecture == "zamba" else "shared_transformer"
    assert f"model.layers.1.{shared}" in obstacle
    assert f"model.layers.3.{shared}" in obstacle
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter"]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad(), expected_warnings_ignored():
        found = PeftModel.from_pretrained(plain, tmp_path / "out" / "adapter")(ids).logits
    assert_close(found, expected, rtol=1e-4, atol=2e-4)


def assert_merged_is_equal(model: Any, tokenizer: Any, output: Path) -> None:
    """Export an adapted model, and compare the merged one with it."""
    policy, _ = make_policy(model)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), policy.use_original_attention():
        expected = policy.model(input_ids=ids).logits
    assert save_policy(policy, tokenizer, output, origin=ORIGIN) is None
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(output / "model")(ids).logits
    assert_close(merged, expected, rtol=1e-4, atol=2e-4)


def test_what_is_not_shared_is_merged_beside_a_shared_block(tmp_path):
    tokenizer = make_tokenizer()
    base = save_model(tmp_path / "base", "zamba2", tokenizer)
    model = adapted(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), target_modules=["in_proj"]
    )
    assert_merged_is_equal(model, tokenizer, tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_modules_that_are_trained_whole_replace_the_base_and_not_what_is_tied_to_it(
    tmp_path, saved, tied
):
    tokenizer = make_tokenizer()
    base = save_model(tmp_path / "base", "qwen2", tokenizer, tie_word_embeddings=tied)
    model = adapted(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), modules_to_save=[saved]
    )
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    assert_merged_is_equal(model, tokenizer, tmp_path / "out")


def test_a_head_tied_beside_a_shared_block_is_not_untied(tmp_path):
    """The config has one switch for both: what is untied would be loaded untied everywhere."""
    tokenizer = make_tokenizer()
    base = save_model(tmp_path / "base", "zamba2", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert "lm_head" in merge_obstacle(adapted(model, target_modules=["lm_head"]))


def test_a_layer_shared_by_two_parents_and_adapted_in_one_is_not_merged():
    model = make_model("llama", vocab_size=97)
    layers = model.model.layers
    layers[1].mlp.up_proj = layers[0].mlp.up_proj
    obstacle = merge_obstacle(adapted(model, target_modules=["up_proj"]))
    assert "model.layers.0.mlp.up_proj and model.layers.1.mlp.up_proj" in obstacle
    # A whole block that runs twice has one adapter.
    another = make_model("llama", vocab_size=97)
    another.model.layers[1] = another.model.layers[0]
    assert merge_obstacle(adapted(another, target_modules=["up_proj"])) is None


def test_a_bias_for_a_layer_without_one_is_not_merged():
    model = make_model("llama", vocab_size=97)
    assert "bias" in merge_obstacle(adapted(model, lora_bias=True))
