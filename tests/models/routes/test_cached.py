"""The cached route: log-probs and every gradient against separate plain forwards, and its cost."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from kto_lightning.models.architecture import decoder
from kto_lightning.models.packed_run import CHECKPOINTING
from kto_lightning.models.policy import Policy
from kto_lightning.models.routes.cached import CachedRunner
from kto_lightning.models.routes.choose import make_policy
from kto_lightning.models.routes.runner import RouteName
from tests.support.factories import add_adapter, make_model
from tests.support.plain_forwards import Plain, make_triples, pack_triples

VOCABULARY = 97
# (x, y, y'): around the windows, chunks and convolutions of 16 and 4 tokens, and nothing at all.
LENGTHS = [(20, 9, 20), (1, 20, 3), (24, 1, 17), (18, 0, 4), (3, 2, 0), (2, 17, 1), (0, 6, 5)]
TRIPLES = make_triples(LENGTHS, vocab_size=VOCABULARY)
WEIGHTS = torch.linspace(-1.0, 1.5, len(LENGTHS))

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {},
    "lfm2": {},
    "falcon_h1": {},
    # Sliding windows; caps that neither cuts off, as float64 tells sides of a corner apart.
    "gemma2": {"attn_logit_softcapping": None},
    # Chunks that begin with the sequence, after its padding.
    "llama4_text": {},
    # No attention, and padding that is not zero after the first projection.
    "mamba2": {"use_bias": True},
    # Positions that are counted from the mask.
    "bloom": {},
}


def model_of(architecture: str) -> Any:
    return make_model(architecture, vocab_size=VOCABULARY, **FAMILIES.get(architecture, {}))


def calls_of(policy: Policy) -> list[torch.Tensor]:
    """The token ids of each call of the policy's decoder from now on."""
    calls: list[torch.Tensor] = []
    decoder(policy.causal_lm).register_forward_pre_hook(
        lambda _module, _args, kwargs: calls.append(kwargs["input_ids"]), with_kwargs=True
    )
    return calls


@pytest.mark.parametrize("architecture", FAMILIES)
def test_log_probs_and_gradients_are_those_of_plain_forwards(architecture):
    policy = Policy(model_of(architecture).train(), route="cached")
    batch, plain = pack_triples(TRIPLES), Plain(model_of(architecture), TRIPLES)
    logps = policy(batch)
    plain.assert_logps(logps)
    assert not logps.mismatched.requires_grad
    with torch.no_grad():
        assert torch.equal(policy(batch, mismatched=False).matched, logps.matched)
        assert torch.equal(policy(batch, matched=False).mismatched, logps.mismatched)
    (logps.matched * WEIGHTS).sum().backward()
    plain.assert_gradients(policy.model, WEIGHTS)


@pytest.mark.parametrize("architecture", ["qwen3_5_text", "gemma2", "mamba2"])
def test_recomputed_layers_find_the_prompts(architecture):
    model = model_of(architecture).train()
    model.gradient_checkpointing_enable(CHECKPOINTING)
    policy, plain = Policy(model, route="cached"), Plain(model_of(architecture), TRIPLES)
    logps = policy(pack_triples(TRIPLES))
    plain.assert_logps(logps)
    (logps.matched * WEIGHTS).sum().backward()
    plain.assert_gradients(policy.model, WEIGHTS)


def test_an_adapter_and_the_model_without_it():
    targets = {"target_modules": ["in_proj", "q_proj", "w1"]}
    adapted = add_adapter(model_of("lfm2"), **targets).train()
    policy = Policy(adapted, route="cached")
    logps = policy(pack_triples(TRIPLES))
    plain = Plain(add_adapter(model_of("lfm2"), **targets), TRIPLES)
    plain.assert_logps(logps)
    (logps.matched * WEIGHTS).sum().backward()
    plain.assert_gradients(policy.model, WEIGHTS)
    with torch.no_grad(), adapted.disable_adapter():
        Plain(model_of("lfm2"), TRIPLES).assert_logps(policy(pack_triples(TRIPLES)))


def test_two_micro_batches_before_backward():
    policy = Policy(model_of("qwen3_5_text").train(), route="cached")
    halves = (TRIPLES[:3], TRIPLES[3:])
    logps = torch.cat([policy(pack_triples(half)).matched for half in halves])
    (logps * WEIGHTS).sum().backward()
    plain = Plain(model_of("qwen3_5_text"), TRIPLES)
    plain.assert_gradients(policy.model, WEIGHTS)


def test_the_auxiliary_loss_is_that_of_padded_rows():
    losses, routers = [], []
    for route in ("cached", "padded"):
        policy = Policy(model_of("gpt_oss"), route=route)
        batch = pack_triples(TRIPLES, shares_prompts=policy.shares_prompts)
        losses.append(policy(batch, mismatched=False).auxiliary_loss)
        losses[-1].backward()
        routers.append(policy.causal_lm.model.layers[0].mlp.router.weight.grad)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*routers)


def test_whole_sequences_where_a_batch_does_not_share_prompts():
    policy = Policy(model_of("falcon_h1"), route="cached")
    logps = policy(pack_triples(TRIPLES, shares_prompts=False))
    Plain(model_of("falcon_h1"), TRIPLES).assert_logps(logps)


@pytest.mark.parametrize("lengths", [LENGTHS, [(5, 0, 0), (2, 0, 0)], [(0, 0, 0)]])
def test_one_call_each_where_every_rank_must_call_equally_often(lengths):
    policy = Policy(model_of("qwen3_5_text"), route="cached")
    policy._runner = CachedRunner(policy.causal_lm, single_group=True)
    calls, triples = calls_of(policy), make_triples(lengths, vocab_size=VOCABULARY)
    logps = policy(pack_triples(triples))
    assert len(calls) == 3
    Plain(model_of("qwen3_5_text"), triples).assert_logps(logps)
    logps.matched.sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())


@pytest.mark.parametrize(("route", "times"), [("cached", 1), ("padded", 2)])
def test_little_of_the_tokens_is_padding(route: RouteName, times: int):
    random = np.random.default_rng(0)
    lengths = random.lognormal(3, 1, (24, 3)).astype(int) + 2
    policy = Policy(model_of("qwen3_5_text"), route=route)
    calls, triples = calls_of(policy), make_triples(lengths.tolist(), vocab_size=VOCABULARY)
    with torch.no_grad():
        policy(pack_triples(triples, shares_prompts=policy.shares_prompts))
    prompts, *completions = lengths.sum(axis=0)
    num_tokens = times * prompts + sum(completions)
    assert num_tokens <= sum(call.numel() for call in calls) <= 1.1 * num_tokens


def test_autocast_to_bfloat16():
    policy = Policy(model_of("qwen3_5_text").train(), route="cached")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = policy(pack_triples(TRIPLES))
    logps.matched.sum().backward()
    plain = Plain(model_of("qwen3_5_text"), TRIPLES)
    for side in ("matched", "mismatched"):
        torch.testing.assert_close(
            getattr(logps, side), plain.truth[side].float(), rtol=0.05, atol=0.05
        )
    assert all(parameter.grad.isfinite().all() for parameter in policy.parameters())


def test_the_cache_by_its_name_in_newer_transformers():
    """From 5.24 on it is `cache`, not `past_key_values`."""
    policy, plain = Policy(model_of("lfm2"), route="padded"), Plain(model_of("lfm2"), TRIPLES)
    model = decoder(policy.causal_lm)
    forward = model.forward

    def renamed(input_ids, attention_mask, position_ids, use_cache, cache):
        return forward(
            input_ids, attention_mask, position_ids, past_key_values=cache, use_cache=use_cache
        )

    if "cache" not in inspect.signature(forward).parameters:
        model.forward = renamed
    policy.use_route("cached")
    plain.assert_logps(policy(pack_triples(TRIPLES)))


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("deepseek_v4", "it has cache layers of its own (DeepseekV4HCACache)"),
        ("openai-gpt", "its forward takes no cache"),
    ],
)
def test_models_that_keep_their_prompts_otherwise_take_another_route(architecture, reason):
    policy, obstacles = make_policy(model_of(architecture))
    assert policy.route == "padded"
    assert obstacles["cached"] == reason
