"""The probe finds every model that cannot run packed, and rejects heads that are not linear."""

import re
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from kto_lightning.errors import ModelError
from kto_lightning.models.routes.choose import make_policy
from tests.support.factories import make_model
from tests.support.plain_forwards import Plain, make_triples, pack_triples

VOCABULARY = 97


def model_of(architecture: str, **overrides: Any) -> Any:
    return make_model(architecture, vocab_size=VOCABULARY, **overrides)


def check_policy(model: Any, plain: Any) -> str | None:
    """Check that the policy scores as the plain model does; returns why it is padded."""
    training, attention = model.training, model.config._attn_implementation
    policy, obstacles = make_policy(model)
    reason = obstacles.get("packed")
    assert (policy.route == "packed") is (reason is None)
    assert model.training is training
    assert (model.config._attn_implementation == attention) is (policy.route != "packed")
    triples = make_triples([(7, 9, 5), (11, 6, 30)], vocab_size=VOCABULARY)
    logps = policy(pack_triples(triples, shares_prompts=policy.shares_prompts))
    Plain(plain, triples).assert_logps(logps)
    return reason


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"architecture": "gpt_neox", "use_parallel_residual": False}, None),
        ({"architecture": "qwen2", "use_sliding_window": True, "sliding_window": 4}, None),
    ],
)
def test_settings_decide_and_not_the_architecture(
    overrides: dict[str, Any], reason: str | None
) -> None:
    assert check_policy(model_of(**overrides), model_of(**overrides)) == reason


def other_model(architecture: str, **settings: Any) -> Any:
    """A model of an architecture that the factories do not have."""
    config = AutoConfig.for_model(
        architecture,
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        pad_token_id=0,
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


PHIMOE = {
    "intermediate_size": 32,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "sliding_window": 4,
}
LFM2 = {
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "layer_types": ["conv", "full_attention"],
}


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        ("phimoe", PHIMOE, "it has a sliding window that its layers do not pass on"),
        ("lfm2", LFM2, "it has layers of type conv"),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 16}, None),
    ],
)
def test_unusual_architectures(
    architecture: str, settings: dict[str, Any], reason: str | None
) -> None:
    model, plain = (other_model(architecture, **settings) for _ in range(2))
    assert check_policy(model, plain) == reason


def mixing_neighbours(model: Any) -> Any:
    """Each token also depends on the one before it outside attention, across packed sequences."""

    def mix(layer: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        (hidden,) = arguments
        before = nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
        return (hidden + before,)

    model.model.layers[1].mlp.register_forward_pre_hook(mix)
    return model


class Recurrent(nn.Module):
    """A layer that mixes tokens without an attention function."""

    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Tensor, None]:
        return hidden_states.cumsum(dim=1) / 8, None


def partly_recurrent(model: Any) -> Any:
    model.model.layers[1].self_attn = Recurrent()
    return model


def without_positions(model: Any) -> Any:
    """The decoder takes no positions."""
    forward = type(model.model).forward  # unbound, so that a copy of the model runs itself

    def strict(self: Any, input_ids: Any, **options: Any) -> Any:
        if options.get("position_ids") is not None:
            raise TypeError("unexpected position_ids")
        return forward(self, input_ids=input_ids, **options)

    model.model.forward = MethodType(strict, model.model)
    return model


@pytest.mark.parametrize(
    ("modify", "reason"),
    [
        (mixing_neighbours, "its packed log-probs differ from those of its own forward"),
        (partly_recurrent, "only 1 of its 2 layers attend"),
        (without_positions, r"it does not take packed sequences \(TypeError: unexpected"),
    ],
)
def test_models_with_wrong_packed_log_probs_are_padded(
    modify: Callable[[Any], Any], reason: str
) -> None:
    found = check_policy(modify(model_of("llama")), modify(model_of("llama")))
    assert re.match(reason, found or "")


def with_scaled_logits(model: Any) -> Any:
    model.lm_head.register_forward_hook(lambda module, arguments, logits: logits * 1.01)
    return model


def with_nonlinear_head(model: Any) -> Any:
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())
    return model


def with_adapted_head(**settings: Any) -> Callable[[Any], Any]:
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], **settings)
    return lambda model: get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore:.*lora_bias")
@pytest.mark.parametrize(
    ("modify", "message"),
    [
        (with_scaled_logits, "are not those of its output embeddings over its last hidden state"),
        (with_nonlinear_head, "has no output embeddings"),
        (lambda model: AutoModel.from_config(model.config), "has no output embeddings"),
        # These three give the base's log-probs until they are trained.
        (with_adapted_head(use_dora=True), "DoRA"),
        (with_adapted_head(lora_bias=True), "a LoRA bias"),
        (with_adapted_head(lora_dropout=0.1), "dropout"),
    ],
    ids=["scale", "nonlinear", "none", "dora", "bias", "dropout"],
)
def test_unsupported_heads_are_rejected(modify: Callable[[Any], Any], message: str) -> None:
    model = modify(model_of("llama")).train()
    with pytest.raises(ModelError, match=message):
        make_policy(model)
    assert model.training


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.1}], ids=["plain", "dropout"])
def test_an_adapter_on_attention_alone_is_packed(settings: dict[str, Any]) -> None:
    model = get_peft_model(model_of("llama"), LoraConfig(target_modules=["q_proj"], **settings))
    assert not make_policy(model)[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_packed(dtype: torch.dtype) -> None:
    policy, obstacles = make_policy(model_of("qwen2").to(dtype))
    assert not obstacles
    assert policy.route == "packed"
