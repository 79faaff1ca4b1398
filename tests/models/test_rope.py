"""RoPE that depends on the length of the sequence, against separate forwards of fresh models."""

import copy
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kto_lightning.models.attention import UnsupportedAttentionError
from kto_lightning.models.packed_run import CHECKPOINTING
from kto_lightning.models.policy import Policy
from kto_lightning.models.reference import FrozenReference
from kto_lightning.models.rope import RopeLimits, SequenceLengths, limits_of, rotating
from kto_lightning.models.routes.choose import RouteNeeds, make_policy
from kto_lightning.models.routes.probe import long_example
from kto_lightning.models.routes.runner import ROUTES, RouteName
from kto_lightning.models.routes.unsharing import unshare_prompts
from tests.support.factories import make_model, random_model
from tests.support.plain_forwards import Plain, Triple, make_triples, pack_triples

VOCABULARY = 97
# On both sides of 24 and 32 tokens, longer and shorter by turns; y and y' of some on two sides.
LENGTHS = [(12, 5, 7), (9, 30, 11), (10, 6, 33), (26, 9, 4), (20, 4, 5), (0, 14, 3), (30, 0, 2)]
SHARED = [(12, 5, 7), (26, 9, 9), (34, 1, 1), (10, 4, 6), (0, 40, 40), (40, 6, 6)]
"""Those of which x with y and x with y' have the same frequencies."""

LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 24,
}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "phi3",
        {
            "rope_parameters": LONGROPE,
            "max_position_embeddings": 96,
            "original_max_position_embeddings": 24,
        },
    ),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 24}),
    "long_mscale": (
        "phimoe",
        {
            "rope_parameters": LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.5},
            "max_position_embeddings": 96,
        },
    ),
    "by layer type": (
        "gemma3_text",
        {
            "rope_parameters": {
                "sliding_attention": LONGROPE,
                "full_attention": DYNAMIC,
            },
            "max_position_embeddings": 32,
        },
    ),
}

MOSHI: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rope_parameters": DYNAMIC,
    "max_position_embeddings": 24,
    "audio_encoder_config": {"model_type": "mimi"},
}


def model_of(case: str) -> Any:
    architecture, settings = CASES[case]
    return make_model(architecture, vocab_size=VOCABULARY, **settings)


def ropes_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "rope_type")]


def triples_of(lengths: list[tuple[int, int, int]] = LENGTHS) -> list[Triple]:
    return make_triples(lengths, vocab_size=VOCABULARY)


class FreshForEachCall:
    """A model of which every call is the first: its RoPE forgets the earlier ones."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.states = [(rope, _state(rope)) for rope in ropes_of(model)]
        self.named_parameters = model.named_parameters
        self.set_experts_implementation = model.set_experts_implementation

    def __call__(self, **inputs: Any) -> Any:
        for module, state in self.states:
            vars(module).clear()
            vars(module).update(copy.copy(state) | {"_buffers": copy.copy(state["_buffers"])})
        return self.model(**inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FreshForEachCall":
        return FreshForEachCall(copy.deepcopy(self.model, memo))

    def double(self) -> "FreshForEachCall":
        return FreshForEachCall(self.model.double())


def _state(module: Any) -> dict[str, Any]:
    buffers = {name: buffer.clone() for name, buffer in module._buffers.items()}
    return vars(module) | {"_buffers": buffers}


def plain_of(case: str, triples: list[Triple]) -> Plain:
    return Plain(FreshForEachCall(model_of(case)), triples)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", CASES)
def test_neighbours_and_earlier_calls_change_nothing(case: str, route: RouteName) -> None:
    triples = triples_of()
    policy, plain = Policy(model_of(case), route=route), plain_of(case, triples)
    batch = pack_triples(triples, shares_prompts=policy.shares_prompts)
    policy(pack_triples(triples_of([(70, 8, 9)]), shares_prompts=policy.shares_prompts))
    plain.assert_logps(policy(batch, matched=False), "mismatched")
    logps = policy(batch)
    plain.assert_logps(logps)
    weights = torch.linspace(-1.0, 1.5, len(triples))
    (logps.matched * weights).sum().backward()
    plain.assert_gradients(policy.model, weights)


@pytest.mark.parametrize("lengths", [LENGTHS, SHARED], ids=["own", "shared"])
@pytest.mark.parametrize("case", ["longrope", "dynamic"])
def test_activation_checkpointing(case: str, lengths: list[tuple[int, int, int]]) -> None:
    triples, model = triples_of(lengths), model_of(case)
    model.gradient_checkpointing_enable(CHECKPOINTING)
    policy, plain = Policy(model.train()), plain_of(case, triples)
    logps = policy(pack_triples(triples))
    plain.assert_logps(logps)
    weights = torch.linspace(-1.0, 1.5, len(triples))
    (logps.matched * weights).sum().backward()
    plain.assert_gradients(policy.model, weights)


def test_rope_within_checkpointed_layers() -> None:
    config = AutoConfig.for_model("moshi", **MOSHI)
    plain, model = (random_model(AutoModelForCausalLM, config, 0) for _ in range(2))
    assert len(ropes_of(model)) == 2
    model.gradient_checkpointing_enable(CHECKPOINTING)
    policy, triples = Policy(model.train(), route="padded"), triples_of()
    logps = policy(pack_triples(triples, shares_prompts=False))
    weights = torch.linspace(-1.0, 1.5, len(triples))
    (logps.matched * weights).sum().backward()
    expected = Plain(FreshForEachCall(plain), triples)
    expected.assert_logps(logps)
    expected.assert_gradients(policy.model, weights)


@pytest.mark.parametrize("case", CASES)
def test_prompts_are_shared_where_their_frequencies_are_the_same(case: str) -> None:
    limits = limits_of(model_of(case))
    shared = {lengths: limits.lets_share(pack_triples(triples_of([lengths]))) for lengths in SHARED}
    assert all(shared.values()), shared
    assert not limits.lets_share(pack_triples(triples_of(LENGTHS)))


@pytest.mark.parametrize("scored", ["both", "y'"])
@pytest.mark.parametrize("route", ["packed", "cached"])
def test_sharded_ranks_stay_in_step_where_only_some_share(route: RouteName, scored: str) -> None:
    policy, calls = Policy(model_of("longrope"), route=route, single_group=True), []
    policy.causal_lm.model.register_forward_pre_hook(lambda *_: calls.append(1))
    counts = set()
    for lengths in (LENGTHS, SHARED, SHARED[:1]):
        policy(pack_triples(triples_of(lengths)), matched=scored == "both")
        counts.add(len(calls))
        calls.clear()
    assert len(counts) == 1


def test_prompts_are_always_shared_under_constant_frequencies() -> None:
    model = make_model("llama", vocab_size=VOCABULARY)
    limits = limits_of(model)
    assert not limits
    assert limits.lets_share(pack_triples(triples_of()))
    assert not any(module._forward_hooks for module in Policy(model).modules())


def test_lengths_with_the_same_frequencies_have_one_representative() -> None:
    lengths = np.arange(1, 13)
    steps = RopeLimits(steps=frozenset({3, 8}))
    assert steps.representatives(lengths).tolist() == [0] * 3 + [4] * 5 + [9] * 4
    growing = RopeLimits(grows_above=frozenset({8})) | RopeLimits(steps=frozenset({3}))
    assert growing.representatives(lengths).tolist() == [0] * 3 + [4] * 5 + [9, 10, 11, 12]


@pytest.mark.parametrize(
    "lengths",
    [LENGTHS, SHARED, [(0, 3, 4), (0, 2, 0), (0, 0, 5)], [(2, 1, 0), (0, 1, 0)], [(3, 0, 1)]],
)
def test_unsharing_makes_the_batch_that_shares_no_prompts(
    lengths: list[tuple[int, int, int]],
) -> None:
    triples = triples_of(lengths)
    found = unshare_prompts(pack_triples(triples))
    expected = pack_triples(triples, shares_prompts=False)
    assert not found.shares_prompts
    assert found.mismatched is not None
    assert expected.mismatched is not None
    assert found.mismatched.lengths == expected.mismatched.lengths
    pairs = [(found.mismatched, expected.mismatched)]
    pairs.append((found.mismatched.scored, expected.mismatched.scored))
    for mine, other in pairs:
        for field in fields(mine):
            if isinstance(getattr(mine, field.name), torch.Tensor):
                torch.testing.assert_close(
                    getattr(mine, field.name), getattr(other, field.name), rtol=0, atol=0
                )


@pytest.mark.parametrize("case", CASES)
def test_the_probe_crosses_the_limits(case: str) -> None:
    model = model_of(case)
    highest = max(limits_of(model).all)
    assert max(x + y for x, y, _ in long_example(model, None)) > highest
    assert not long_example(model, 4)
    _, obstacles = make_policy(model, needs=RouteNeeds(longest=None))
    assert not obstacles


def test_a_copy_of_the_policy_rotates_each_sequence_too() -> None:
    triples = triples_of()
    reference = FrozenReference.copy_of(Policy(model_of("dynamic")))
    plain_of("dynamic", triples).assert_logps(reference.logps(pack_triples(triples)))


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_given_back_as_it_came(case: str) -> None:
    model, given = model_of(case), model_of(case)
    names = list(model.state_dict())
    policy = Policy(model)
    policy(pack_triples(triples_of()))
    assert list(model.state_dict()) == names
    ids = torch.randint(3, VOCABULARY, (2, 40))
    with policy.use_original_attention() as original, torch.no_grad():
        torch.testing.assert_close(original(ids).logits, given(ids).logits)
    assert all(rope._forward_hooks for rope in ropes_of(model))
    policy.set_attention(original=True)
    for rope in ropes_of(model):
        assert not rope._forward_hooks
        assert not rope._forward_hooks_with_kwargs


def test_rope_of_other_tokens_than_the_packed_ones_is_refused() -> None:
    model = model_of("dynamic")
    Policy(model)
    compressed = torch.arange(0, 40, 4)[None]
    with (
        rotating(SequenceLengths([30, 40], segments=[30, 10])),
        pytest.raises(UnsupportedAttentionError, match="its RoPE"),
    ):
        model.model.rotary_emb(torch.zeros(1), compressed)
