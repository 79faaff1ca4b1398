"""Merged models have their adapter's logits, also with tied weights."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from kto_lightning.models.export import save_policy
from kto_lightning.models.loading import LoRA, load_model
from kto_lightning.models.packing_probe import make_policy
from tests.support.factories import make_tokenizer, save_model
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
    "targets", [["lm_head"], ["lm_head", "q_proj"], ["embed_tokens"], ["q_proj"], "all-linear"]
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
