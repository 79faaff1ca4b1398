"""What is random in a model's own forward is off in training, unless dropout is asked for."""

from typing import Any

import pytest
import torch

from kto_lightning.models.loading import take_policy
from kto_lightning.models.lora import LoRA
from kto_lightning.models.packed_run import CHECKPOINTING
from kto_lightning.models.reference import make_reference
from kto_lightning.models.routes.choose import make_policy
from tests.support.factories import make_model
from tests.support.plain_forwards import make_triples, pack_triples

VOCABULARY = 97
LENGTHS = [(7, 9, 5), (1, 20, 3), (11, 6, 30)]
RANDOM: dict[str, dict[str, Any]] = {
    "phimoe": {"input_jitter_noise": 0.1},
    "mixtral": {"router_jitter_noise": 0.1},
    "xglm": {"layerdrop": 0.5, "dropout": 0.3, "attention_dropout": 0.3},
    "gptj": {"attn_pdrop": 0.3, "resid_pdrop": 0.3},
    "falcon": {"attention_dropout": 0.3, "hidden_dropout": 0.3},
    "qwen2": {"attention_dropout": 0.3},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, LoRA(r=2)], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", RANDOM)
def test_policy_and_reference_agree_before_the_first_step(architecture, lora, checkpointing):
    model = make_model(architecture, vocab_size=VOCABULARY, **RANDOM[architecture])
    rates = model.config.to_dict()
    loaded = take_policy(model.train(), lora=lora)
    policy, _ = make_policy(loaded.model)
    reference = make_reference(policy, loaded, name=None, load=lambda _: loaded)
    if checkpointing:
        policy.causal_lm.gradient_checkpointing_enable(CHECKPOINTING)
    policy.train()
    batch = pack_triples(
        make_triples(LENGTHS, vocab_size=VOCABULARY), shares_prompts=policy.shares_prompts
    )
    found, expected = policy(batch), reference.logps(batch)
    assert torch.equal(found.matched, expected.matched)
    assert torch.equal(found.mismatched, expected.mismatched)
    found.matched.sum().backward()  # runs the layers again where they are checkpointed
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)
    again = policy(batch)
    assert torch.equal(again.matched, expected.matched)
    assert {name: model.config.to_dict()[name] for name in RANDOM[architecture]} == {
        name: rates[name] for name in RANDOM[architecture]
    }


@pytest.mark.parametrize("architecture", RANDOM)
def test_it_is_on_where_dropout_is_asked_for(architecture):
    model = make_model(architecture, vocab_size=VOCABULARY, **RANDOM[architecture])
    policy, _ = make_policy(take_policy(model.train(), dropout=True).model, random=True)
    batch = pack_triples(
        make_triples(LENGTHS, vocab_size=VOCABULARY), shares_prompts=policy.shares_prompts
    )
    assert not torch.equal(policy(batch).matched, policy(batch).matched)
    policy.eval()
    assert torch.equal(policy(batch).matched, policy(batch).matched)


def test_an_adapters_own_dropout_stays_on():
    loaded = take_policy(make_model("llama", vocab_size=VOCABULARY), lora=LoRA(r=2, dropout=0.5))
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    policy, _ = make_policy(loaded.model)
    batch = pack_triples(make_triples(LENGTHS, vocab_size=VOCABULARY))
    assert not torch.equal(policy(batch).matched, policy(batch).matched)


def test_layers_checkpoint_their_activations_and_mamba_takes_its_training_kernel():
    policy, _ = make_policy(make_model("mamba", vocab_size=VOCABULARY).train())
    in_training = {type(m).__name__ for m in policy.causal_lm.modules() if m.training}
    assert in_training == {"MambaForCausalLM", "MambaBlock", "MambaMixer"}
