"""A merged model says what its adapter said, also where the head shares the embeddings' weight."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from kto_lightning.models.export import save_policy
from kto_lightning.models.loading import LoRA, load_model
from kto_lightning.models.packing_probe import make_policy
from tests.support.factories import make_tokenizer, save_model

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
def test_merged_equals_adapter(tmp_path, targets, tied):
    tokenizer = make_tokenizer()
    base = save_model(tmp_path / "base", "qwen2", tokenizer, tie_word_embeddings=tied)
    loaded = load_model(str(base), lora=LoRA(r=2, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in loaded.model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    policy, _ = make_policy(loaded.model)
    ids = torch.randint(3, 300, (1, 12), generator=generator)
    with torch.no_grad(), policy.own_attention_restored():
        adapted = policy.model(input_ids=ids).logits
    save_policy(policy, tokenizer, tmp_path / "out", origin=ORIGIN)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, adapted, atol=1e-2)
