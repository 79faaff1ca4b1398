"""Families that differ from most in one mechanism, against separate plain forwards."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, MllamaForCausalLM
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from kto_lightning import KTOModule
from kto_lightning.errors import ConfigError, ModelError
from kto_lightning.models.architecture import decoder
from kto_lightning.models.build import build_models
from kto_lightning.models.loading import load_causal_lm
from kto_lightning.models.routes.choose import make_policy
from tests.support.factories import make_model
from tests.support.plain_forwards import Plain, make_triples, pack_triples

VOCABULARY = 97
LENGTHS = [(7, 9, 5), (1, 20, 3), (11, 6, 30)]


@pytest.mark.parametrize("architecture", ["granitemoehybrid", "jamba", "doge", "flint"])
def test_a_dense_model_of_a_class_that_can_have_experts_has_no_auxiliary_loss(architecture):
    settings = {"router_aux_loss_coef": 0.5, "output_router_logits": True}
    policy, _ = make_policy(make_model(architecture, vocab_size=VOCABULARY, **settings).train())
    assert policy.auxiliary_coefficient == 0.5
    triples = make_triples(LENGTHS, vocab_size=VOCABULARY)
    logps = policy(pack_triples(triples, shares_prompts=policy.shares_prompts))
    assert logps.auxiliary_loss is None
    Plain(make_model(architecture, vocab_size=VOCABULARY), triples).assert_logps(logps)


def mllama_text() -> MllamaForCausalLM:
    config = MllamaTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=[],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MllamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    "make", [partial(make_model, "llama4_text", vocab_size=VOCABULARY), mllama_text]
)
def test_the_decoder_of_a_class_that_names_another_submodule_than_it_has(make):
    model = make()
    assert model.base_model is model
    assert decoder(model) is model.model
    policy, _ = make_policy(model.train())
    triples = make_triples(LENGTHS, vocab_size=VOCABULARY)
    logps = policy(pack_triples(triples, shares_prompts=policy.shares_prompts))
    plain = Plain(make(), triples)
    plain.assert_logps(logps)
    weights = torch.tensor([1.0, -0.5, 2.0])
    (logps.matched * weights).sum().backward()
    plain.assert_gradients(policy.model, weights)


@pytest.mark.parametrize(
    ("layer_types", "expected"),
    [
        (
            ["linear_attention", "moe", "full_attention", "mlp"],
            "it has layers of type linear_attention",
        ),
        (["full_attention", "moe", "full_attention", "mlp"], None),
    ],
)
def test_feed_forward_layers_are_no_reason_to_pad(layer_types, expected):
    settings = {"vocab_size": VOCABULARY, "layer_types": layer_types}
    policy, obstacles = make_policy(make_model("nemotron_h", **settings).train())
    assert obstacles.get("packed") == expected
    triples = make_triples(LENGTHS, vocab_size=VOCABULARY)
    logps = policy(pack_triples(triples, shares_prompts=policy.shares_prompts))
    plain = Plain(make_model("nemotron_h", **settings), triples)
    plain.assert_logps(logps)


@pytest.mark.parametrize("architecture", ["jetmoe", "ctrl", "openai-gpt"])
def test_activation_checkpointing_is_refused_where_a_model_cannot(architecture):
    model = make_model(architecture, vocab_size=VOCABULARY)
    module = KTOModule(model, activation_checkpointing=True)
    with pytest.raises(ConfigError, match=f"activation_checkpointing: {type(model).__name__}"):
        build_models(
            module.model_settings,
            precision="32-true",
            longest=0,
            device=torch.device("cpu"),
            reference_keys=lambda: None,
        )


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_a_model_that_needs_another_package_names_it(tmp_path):
    AutoConfig.for_model("gemma3n").save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="it needs timm, which is not installed"):
        load_causal_lm(str(tmp_path))
