"""Packed runs of families whose attention differs from Llama's, against separate plain forwards."""

from typing import Any

import pytest
import torch
from torch import nn

from kto_lightning.models.packed_run import CHECKPOINTING
from kto_lightning.models.routes.choose import make_policy
from tests.support.factories import add_adapter, make_model
from tests.support.plain_forwards import Plain, make_triples, pack_triples

VOCABULARY = 97
LENGTHS = [(7, 9, 5), (1, 20, 3), (24, 1, 17)]  # windows are 16 tokens
FAMILIES = (
    "gemma2",
    "vaultgemma",
    "gpt_oss",
    "granite_swa",
    "granitemoe_swa",
    "mimo_v2_flash",
    "diffllama",
    "hrm_text",
    "stablelm",
    "nemotron",
)


def model_of(family: str) -> Any:
    return make_model(family, vocab_size=VOCABULARY)


def check_step(model: nn.Module, plain: nn.Module) -> None:
    """Both log-probs and all gradients, another run between forward and backward."""
    policy, _ = make_policy(model)
    assert policy.route == "packed"
    triples = make_triples(LENGTHS, vocab_size=VOCABULARY)
    batch, expected = pack_triples(triples), Plain(plain, triples)
    logps = policy(batch)
    with torch.no_grad():
        policy(pack_triples(make_triples([(5, 4, 3)], vocab_size=VOCABULARY, seed=1)))
    expected.assert_logps(logps)
    weights = torch.linspace(-1.0, 1.5, len(batch))
    (logps.matched * weights).sum().backward()
    expected.assert_gradients(policy.model, weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpointed_packed_step_equals_plain_forwards(family: str) -> None:
    model = model_of(family)
    model.gradient_checkpointing_enable(CHECKPOINTING)
    check_step(model.train(), model_of(family))


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "stablelm"])
def test_a_packed_step_of_an_adapter_equals_plain_forwards(family: str) -> None:
    check_step(*(add_adapter(model_of(family)) for _ in range(2)))
