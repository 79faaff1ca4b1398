"""The policy against separate plain forwards: log-probs and every gradient, per architecture."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig

import kto_lightning.models.policy
import kto_lightning.models.routes.packed
from kto_lightning.batches.types import PackedBatch
from kto_lightning.models.architecture import auxiliary_coefficient, logit_scale
from kto_lightning.models.packed_run import CHECKPOINTING, PromptStore
from kto_lightning.models.policy import Policy, sum_per_owner
from kto_lightning.models.routes.runner import RouteName
from tests.support.factories import ARCHITECTURES, add_adapter, make_model
from tests.support.plain_forwards import (
    Float64,
    Plain,
    Triple,
    float64_copy,
    gradients,
    make_triples,
    pack_triples,
    plain_logps,
    true_logps,
)
from tests.support.tolerances import assert_errs_like_plain, assert_gradients_err_like_plain

VOCABULARY = 97
PADDED = ("bloom", "mamba", "falcon")
PACKED = tuple(name for name in ARCHITECTURES if name not in PADDED)
# Sliding windows are 16 tokens.
LENGTHS = [(7, 9, 5), (1, 20, 3), (24, 1, 17), (11, 6, 30)]


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[PromptStore]:
    """The stores that policies make in the test."""
    made: list[PromptStore] = []

    def recording(**arguments: Any) -> PromptStore:
        made.append(PromptStore(**arguments))
        return made[-1]

    monkeypatch.setattr(kto_lightning.models.routes.packed, "PromptStore", recording)
    return made


def triples_of(lengths: list[tuple[int, int, int]] = LENGTHS) -> list[Triple]:
    return make_triples(lengths, vocab_size=VOCABULARY)


def model_of(architecture: str, **overrides: Any) -> Any:
    return make_model(architecture, vocab_size=VOCABULARY, **overrides)


def with_checkpointing(model: Any) -> Any:
    model.gradient_checkpointing_enable(CHECKPOINTING)
    return model.train()


def weights_for(batch: PackedBatch) -> Tensor:
    return torch.linspace(-1.0, 1.5, len(batch))


def assert_like_plain(policy: Policy, model: Any, triples: list[Triple], **options: Any) -> None:
    """Both log-probs, and the gradient of a weighted sum of the matched ones."""
    batch, plain = pack_triples(triples, **options), Plain(model, triples)
    logps = policy(batch)
    plain.assert_logps(logps)
    assert not logps.mismatched.requires_grad
    (logps.matched * weights_for(batch)).sum().backward()
    plain.assert_gradients(policy.model, weights_for(batch))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("architecture", PACKED)
def test_packed_equals_separate_forwards(
    architecture: str, checkpointing: bool, stores: list[PromptStore]
) -> None:
    model, plain = model_of(architecture), model_of(architecture)
    policy = Policy(with_checkpointing(model) if checkpointing else model)
    assert_like_plain(policy, plain, triples_of())
    assert len(stores) == 1
    assert (stores[0].rows is not None) is checkpointing
    assert not stores[0].layers  # backward has stored nothing again


@pytest.mark.parametrize("architecture", PADDED)
def test_padded_equals_separate_forwards(architecture: str) -> None:
    policy = Policy(model_of(architecture), route="padded")
    assert_like_plain(policy, model_of(architecture), triples_of(), shares_prompts=False)


@pytest.mark.parametrize("architecture", ["mistral", "qwen2_moe"])
def test_padded_equals_packed_where_both_are_possible(architecture: str) -> None:
    policy = Policy(model_of(architecture))
    assert policy.causal_lm.config._attn_implementation == "kto_packed"
    policy.use_route("padded")
    assert_like_plain(policy, model_of(architecture), triples_of(), shares_prompts=False)


# A dozen scored tokens where the edge allows it: what two or three err is a matter of luck.
EDGE_CASES = {
    "a batch of one": [(4, 14, 6)],
    "an empty prompt": [(0, 9, 4), (3, 8, 2)],
    "only empty prompts": [(0, 9, 4), (0, 1, 1), (0, 8, 3)],
    "completions of one token": [(3 + i, 1, 1) for i in range(12)],
    "an empty y'": [(4, 9, 0), (3, 7, 6)],
    "no y' at all": [(4, 9, 0), (3, 7, 0)],
    "an empty y": [(4, 0, 3), (3, 14, 6)],
    "neither": [(4, 0, 0), (3, 14, 6)],
    "only y": [(0, 9, 0), (3, 8, 2)],
    "only y in all": [(0, 9, 0), (0, 8, 0)],
}


@pytest.mark.parametrize("route", ["packed", "padded"])
@pytest.mark.parametrize("lengths", EDGE_CASES.values(), ids=EDGE_CASES)
def test_empty_and_short_sequences(lengths: list[tuple[int, int, int]], route: RouteName) -> None:
    policy = Policy(model_of("mistral"), route=route)
    assert_like_plain(
        policy, model_of("mistral"), triples_of(lengths), shares_prompts=policy.shares_prompts
    )


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2_moe"])
@pytest.mark.parametrize("lengths", [[(4, 5, 0)], [(0, 3, 4), (0, 1, 1)], [(0, 3, 0)]])
def test_runs_without_tokens(architecture: str, lengths: list[tuple[int, int, int]]) -> None:
    # They run all the same: under FSDP2 every rank has to.
    policy, triples = Policy(model_of(architecture)), triples_of(lengths)
    plain = Plain(model_of(architecture), triples)
    plain.assert_logps(policy(pack_triples(triples), matched=False), "mismatched")


@pytest.mark.parametrize("shares_prompts", [True, False], ids=["shared", "whole"])
@pytest.mark.parametrize("architecture", ["qwen2", "mistral"])
def test_log_probs_do_not_depend_on_which_others_are_asked_for(
    architecture: str, shares_prompts: bool, stores: list[PromptStore]
) -> None:
    policy, triples = Policy(model_of(architecture)), triples_of()
    batch = pack_triples(triples, shares_prompts=shares_prompts)
    plain = Plain(model_of(architecture), triples)
    plain.assert_logps(policy(batch, mismatched=False), "matched")
    plain.assert_logps(policy(batch, matched=False), "mismatched")
    with torch.no_grad():
        without_gradient = policy(batch)
        plain.assert_logps(without_gradient)
        assert not without_gradient.matched.requires_grad
        plain.assert_logps(policy(batch, matched=False), "mismatched")
    batch.mismatched = None
    plain.assert_logps(policy(batch), "matched")
    assert len(stores) == (3 if shares_prompts else 0)
    assert not any(store.layers for store in stores)


def test_autocast_is_as_accurate_as_for_the_plain_forward() -> None:
    triples = triples_of()
    policy, plain = Policy(model_of("llama")), model_of("llama")
    truth = true_logps(float64_copy(plain), triples)
    with torch.autocast("cpu", torch.bfloat16):
        found = policy(pack_triples(triples))
        expected = plain_logps(plain, triples)
    assert found.matched.dtype == torch.float32
    # The error of plain bfloat16, whose bits packing cannot reproduce.
    sides = (torch.cat(side) for side in ((found.matched, found.mismatched), expected, truth))
    assert_errs_like_plain(*sides, eps=torch.finfo(torch.bfloat16).eps)


TARGETS = {
    "all-linear": "all-linear",
    "with the head": ["q_proj", "down_proj", "lm_head"],
    "the head alone": ["lm_head"],
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])  # a tied head and one of its own
def test_adapters_enabled_and_disabled(
    architecture: str, targets: str | list[str], checkpointing: bool
) -> None:
    model, plain = (add_adapter(model_of(architecture), target_modules=targets) for _ in range(2))
    if checkpointing:
        with_checkpointing(model)
    policy, triples = Policy(model), triples_of()
    before, _ = plain_logps(plain, triples)
    with model.disable_adapter(), torch.no_grad():
        off = policy(pack_triples(triples))
    without = Plain(model_of(architecture), triples)
    without.assert_logps(off)
    assert (before - without.logps["matched"]).abs().max() > 0.1
    assert_like_plain(policy, plain, triples)


def test_a_reference_pass_before_backward_does_not_change_the_gradient() -> None:
    model, plain = (add_adapter(model_of("llama")) for _ in range(2))
    policy, triples = Policy(with_checkpointing(model)), triples_of()
    batch = pack_triples(triples)
    logps = policy(batch)
    with model.disable_adapter(), torch.no_grad():
        policy(batch)
    (logps.matched * weights_for(batch)).sum().backward()
    Plain(plain, triples).assert_gradients(model, weights_for(batch))


def test_a_float32_adapter_on_a_bfloat16_head_is_not_rounded() -> None:
    model = add_adapter(model_of("llama").bfloat16(), target_modules=["lm_head"])
    head = model.get_base_model().lm_head
    policy, batch = Policy(model), pack_triples(triples_of())
    before = policy(batch, mismatched=False).matched
    before.sum().backward()
    assert head.lora_A.default.weight.grad.dtype == torch.float32
    with torch.no_grad():
        head.lora_B.default.weight *= 1 + 1e-4  # far below bfloat16's precision
    after = policy(batch, mismatched=False).matched
    expected = 1e-4 * (head.lora_B.default.weight.grad * head.lora_B.default.weight).sum()
    torch.testing.assert_close((after - before).sum(), expected, rtol=0.05, atol=0.0)


def test_a_new_adapter_on_a_bfloat16_head_changes_no_log_prob() -> None:
    settings = LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(model_of("llama").bfloat16(), settings)
    policy, batch = Policy(model), pack_triples(triples_of())
    with torch.no_grad():
        on = policy(batch)
        with model.disable_adapter():
            off = policy(batch)
    assert torch.equal(on.matched, off.matched)
    assert torch.equal(on.mismatched, off.mismatched)


def with_bias(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    model.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY, generator=generator))
    return model


@pytest.mark.parametrize(
    ("architecture", "overrides", "change"),
    [
        ("cohere", {"logit_scale": 3.0}, copy.copy),
        ("granite", {"logits_scaling": 0.25}, copy.copy),
        ("gemma2", {"final_logit_softcapping": 1.0}, copy.copy),
        ("llama", {}, with_bias),
    ],
    ids=["logit_scale", "logits_scaling", "softcap", "bias"],
)
def test_scale_softcap_and_bias_of_the_head(
    architecture: str,
    overrides: dict[str, Any],
    change: Callable[[Any], Any],
) -> None:
    policy = Policy(change(model_of(architecture, **overrides)))
    plain = change(model_of(architecture, **overrides))
    assert_like_plain(policy, plain, triples_of())
    before = plain_logps(model_of(architecture), triples_of())[0]
    assert (plain_logps(plain, triples_of())[0] - before).abs().max() > 0.1


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({}, 1.0),
        ({"logit_scale": 0.25}, 0.25),
        ({"logits_scaling": 4.0}, 0.25),
        ({"logits_scaling": 4.0, "model_type": "hyperclovax"}, 4.0),
        ({"lm_head_multiplier": 0.5}, 0.5),
    ],
)
def test_logit_scale_under_the_name_of_each_family(settings: dict[str, Any], factor: float) -> None:
    config = LlamaConfig()
    for name, value in settings.items():
        setattr(config, name, value)
    assert logit_scale(config) == factor


@pytest.mark.parametrize(
    ("architecture", "route"), [("qwen2_moe", "packed"), ("gpt_oss", "padded")]
)
def test_the_auxiliary_loss_equals_that_of_the_plain_padded_batch(
    architecture: str, route: RouteName
) -> None:
    overrides = {"router_aux_loss_coef": 0.5}
    policy = Policy(model_of(architecture, **overrides), route=route)
    plain = model_of(architecture, **overrides)
    triples = triples_of()
    logps = policy(pack_triples(triples, shares_prompts=policy.shares_prompts))
    rows = [torch.tensor([*t.prompt_ids, *t.completion_ids]) for t in triples]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    exact = float64_copy(plain)
    # What TRL adds to its loss, before the coefficient.
    expected = plain(ids, attention_mask=mask, output_router_logits=True).aux_loss
    with Float64():
        truth = exact(ids, attention_mask=mask, output_router_logits=True).aux_loss
    assert_errs_like_plain(logps.auxiliary_loss, expected, truth)
    for loss in (logps.auxiliary_loss, expected, truth):
        loss.backward()
    models = (policy.model, plain, exact)
    assert_gradients_err_like_plain(*(gradients(model) for model in models))
    assert auxiliary_coefficient(plain) == 0.5
    assert (
        policy(
            pack_triples(triples, shares_prompts=policy.shares_prompts), matched=False
        ).auxiliary_loss
        is None
    )


def test_without_a_coefficient_there_is_no_auxiliary_loss() -> None:
    policy = Policy(model_of("qwen2_moe", router_aux_loss_coef=0.0))
    assert policy(pack_triples(triples_of())).auxiliary_loss is None
    assert Policy(model_of("llama"))(pack_triples(triples_of())).auxiliary_loss is None


@pytest.mark.parametrize("route", ["packed", "padded"])
def test_the_head_runs_on_the_scored_rows_alone(
    route: RouteName, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows = []
    head = kto_lightning.models.policy.linear_logps

    def counting(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
        num_rows.append(len(hidden))
        assert len(targets) == len(hidden)
        return head(hidden, weight, targets, **options)

    monkeypatch.setattr(kto_lightning.models.policy, "linear_logps", counting)
    monkeypatch.setattr(nn.Linear, "forward", _refusing_vocabulary(nn.Linear.forward))
    policy = Policy(model_of("llama"), route=route)
    lengths = [(7, 9, 5), (0, 4, 3), (5, 2, 0)]
    batch = pack_triples(triples_of(lengths), shares_prompts=policy.shares_prompts)
    policy(batch)
    policy(batch, matched=False)
    assert num_rows == [9 + 3 + 2, 5 + 2, 5 + 2]


def _refusing_vocabulary(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def checked(self: nn.Linear, hidden: Tensor) -> Tensor:
        assert self.out_features != VOCABULARY, "the model's own head was run"
        return forward(self, hidden)

    return checked


def test_generation_after_training_equals_that_of_the_plain_model() -> None:
    model = with_checkpointing(model_of("qwen2"))
    policy, batch = Policy(model), pack_triples(triples_of())
    policy(batch).matched.sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    plain = model_of("qwen2")
    plain.load_state_dict(model.state_dict())

    prompts = torch.randint(3, VOCABULARY, (2, 9))
    mask = torch.ones_like(prompts)
    prompts[0, :4] = mask[0, :4] = 0  # padded on the left
    how = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    with policy.use_original_attention() as restored:
        assert not restored.training
        generated = restored.generate(prompts, **how)
    assert torch.equal(generated, plain.generate(prompts, **how))
    alone = plain.generate(prompts[:1, 4:], **(how | {"attention_mask": mask[:1, 4:]}))
    assert torch.equal(generated[0, 4 : 4 + alone.shape[1]], alone[0])
    assert model.training
    Plain(plain, triples_of()).assert_logps(policy(batch))


def test_packed_attention_is_restored_after_an_error() -> None:
    policy = Policy(model_of("qwen2"))

    def fail() -> None:
        with policy.use_original_attention() as restored:
            assert restored.config._attn_implementation == policy.original_attention
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    triples = triples_of()
    Plain(model_of("qwen2"), triples).assert_logps(policy(pack_triples(triples)))


def test_tokens_are_summed_per_owner() -> None:
    logps = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    owners = torch.tensor([0, 2, 2, 2])
    sums = sum_per_owner(logps, owners, [3, 0, 5, 1])
    assert sums.tolist() == [1.0, 0.0, 14.0, 0.0]
    (sums * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [1.0, 100.0, 100.0, 100.0]
    assert sum_per_owner(logps[:0], owners[:0], [0, 0]).tolist() == [0.0, 0.0]


def test_an_empty_prompt_leaves_the_first_token_unscored() -> None:
    (triple,) = triples_of([(0, 7, 7)])
    ids, found = triple.completion_ids, Policy(model_of("llama"))(pack_triples([triple]))
    shorter = replace(triple, prompt_ids=ids[:1], completion_ids=ids[1:])
    plain = Plain(model_of("llama"), [shorter])
    assert_errs_like_plain(found.matched, plain.logps["matched"], plain.truth["matched"])
