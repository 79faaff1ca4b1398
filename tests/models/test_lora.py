"""New adapters: their settings, and on which layers of a model they are."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from kto_lightning.errors import ConfigError, ModelError
from kto_lightning.models.export import save_policy
from kto_lightning.models.from_checkpoint import load_policy_from_checkpoint, read_values
from kto_lightning.models.loading import load_model, take_policy
from kto_lightning.models.lora import LoRA
from kto_lightning.models.lora_layers import expected_warnings_ignored, left_out
from kto_lightning.models.reference import make_reference
from kto_lightning.models.routes.choose import make_policy
from tests.models.test_merge import ORIGIN
from tests.support.factories import make_model, make_tokenizer, save_model
from tests.support.plain_forwards import Plain, make_triples, pack_triples, plain_logps

VOCABULARY = 97
LENGTHS = [(7, 9, 5), (1, 20, 3), (11, 6, 30)]
LEFT_OUT = {
    "llama4_text": ("router", "Llama4Router"),
    "phimoe": ("router", "PhimoeTopKRouter"),
    "deepseek_v4": ("o_a_proj", "DeepseekV4GroupedLinear"),
    "mamba2": ("out_proj", "peft forbids"),
    "mamba": ("out_proj", "peft forbids"),
}


def adapted_layers(model) -> set[str]:
    return {
        name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name
    }


@pytest.mark.parametrize("architecture", LEFT_OUT)
def test_all_linear_leaves_out_what_cannot_be_adapted(architecture):
    plain = make_model(architecture, vocab_size=VOCABULARY)
    adapted = take_policy(make_model(architecture, vocab_size=VOCABULARY), lora=LoRA(r=2)).model
    own, _ = LEFT_OUT[architecture]
    assert left_out(adapted) == [own]
    expected = {
        f"base_model.model.{name}"
        for name, module in plain.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] not in (own, "lm_head")
        if ".indexer." not in name  # it only ranks, and gets no gradient
    }
    assert adapted_layers(adapted) == expected
    policy, _ = make_policy(adapted)
    triples = make_triples(LENGTHS, vocab_size=VOCABULARY)
    logps = policy(pack_triples(triples, shares_prompts=policy.shares_prompts))
    if architecture != "deepseek_v4":  # its attention has float32 fixed
        Plain(plain, triples).assert_logps(logps)
    logps.matched.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in adapted.parameters())


@pytest.mark.parametrize("architecture", LEFT_OUT)
@pytest.mark.parametrize("as_pattern", [False, True])
def test_naming_such_a_layer_is_refused(architecture, as_pattern):
    own, reason = LEFT_OUT[architecture]
    targets = rf".*\.{own}" if as_pattern else ["in_proj", "q_proj", own]
    with pytest.raises(ModelError, match=rf"layers\.0\..*{own} .*{reason}"):
        take_policy(
            make_model(architecture, vocab_size=VOCABULARY), lora=LoRA(target_modules=targets)
        )


@pytest.mark.parametrize("architecture", ["falcon", "gpt2", "llama"])
def test_linear_layers_of_other_classes_are_adapted(architecture):
    plain = make_model(architecture, vocab_size=VOCABULARY)
    adapted = take_policy(make_model(architecture, vocab_size=VOCABULARY), lora=LoRA(r=2)).model
    assert left_out(adapted) == []
    linear = [m for m in plain.modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    assert len(adapted_layers(adapted)) == len(linear) - 1  # but the head


def test_what_is_left_out_is_saved_with_the_adapter(tmp_path):
    adapted = take_policy(make_model("phimoe", vocab_size=VOCABULARY), lora=LoRA(r=2)).model
    adapted.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(saved["exclude_modules"]) == [f"model.layers.{i}.mlp.router" for i in (0, 1)]


SETTINGS = {
    "dora": ("llama", {"use_dora": True}),
    "dora on Conv1D": ("gpt2", {"use_dora": True}),
    "rslora": ("llama", {"use_rslora": True}),
    "head": ("llama", {"modules_to_save": ["lm_head"]}),
    "tied head": ("qwen2", {"modules_to_save": ["lm_head"]}),
    "embeddings": ("qwen2", {"modules_to_save": ["embed_tokens", "model.norm"]}),
    "experts": ("qwen2_moe", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"up_proj": 3.0}}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "bias": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj"]}),
    "layers": ("llama", {"layers_to_transform": [1]}),
    "names left out": ("llama", {"exclude_modules": ["q_proj", "k_proj"]}),
    "pattern left out": ("phimoe", {"exclude_modules": r".*layers\.0\..*"}),
    "peft's names": ("llama", {"lora_alpha": 8.0, "lora_dropout": 0.0}),
}


def of_peft(model, settings):
    """What peft makes of the same settings; what it does not take beside all-linear is spelled."""
    config = {"lora_alpha": 32, "target_modules": "all-linear"} | settings
    if "layers_to_transform" in settings:
        config["target_modules"] = [
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        ]
    if model.config.model_type == "phimoe":
        config["exclude_modules"] += r"|.*\.router"
    with expected_warnings_ignored():
        return get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **config))


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_step_is_that_of_peft_and_the_reference_stays_the_base(kind):
    architecture, settings = SETTINGS[kind]
    plain = make_model(architecture, vocab_size=VOCABULARY)
    base = make_model(architecture, vocab_size=VOCABULARY)
    model = make_model(architecture, vocab_size=VOCABULARY)
    loaded = take_policy(model.train(), lora=LoRA(r=2, **settings))
    policy, _ = make_policy(loaded.model)
    reference = make_reference(policy, loaded, name=None, load=lambda _: loaded)
    theirs = of_peft(plain, settings)
    assert theirs.load_state_dict(policy.model.state_dict()).missing_keys == []
    triples = make_triples(LENGTHS, vocab_size=VOCABULARY)
    batch = pack_triples(triples, shares_prompts=policy.shares_prompts)
    weights = torch.tensor([1.0, -0.5, 2.0])

    found, before = policy(batch), reference.logps(batch)
    assert torch.equal(found.matched, before.matched)  # all rewards are 0
    assert torch.equal(found.mismatched, before.mismatched)
    (found.matched * weights).sum().backward()
    (plain_logps(theirs, triples)[0] * weights).sum().backward()
    expected = dict(theirs.named_parameters())
    trained = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    assert trained.keys() == {n for n, p in expected.items() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-3, msg=name)
            parameter -= 0.01 * parameter.grad
            expected[name] -= 0.01 * expected[name].grad

    after = policy(batch)
    matched, mismatched = plain_logps(theirs, triples)
    assert (after.matched - found.matched).abs().max() > 1e-2
    assert_close(after.matched, matched, rtol=1e-4, atol=1e-2)
    assert_close(after.mismatched, mismatched, rtol=1e-4, atol=1e-2)
    unchanged = reference.logps(batch)
    assert torch.equal(unchanged.matched, before.matched)
    assert_close(unchanged.matched, plain_logps(base, triples)[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", SETTINGS)
def test_each_adapter_is_exported_merged_and_built_again_from_its_settings(kind, tmp_path):
    architecture, settings = SETTINGS[kind]
    tokenizer = make_tokenizer()
    base = save_model(tmp_path / "base", architecture, tokenizer)
    lora = LoRA(r=2, **settings)
    policy, _ = make_policy(load_model(str(base), lora=lora).model)
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), policy.use_original_attention():
        expected = policy.model(input_ids=ids).logits
    state = {f"policy.{name}": value for name, value in policy.state_dict().items()}
    trained = {f"policy.{name}" for name, p in policy.named_parameters() if p.requires_grad}
    checkpoint = {
        "state_dict": {name: value for name, value in state.items() if name in trained},
        "kto": {"policy": str(base), "dtype": None, "lora": lora.settings()},
    }
    again = load_policy_from_checkpoint(checkpoint, trust_remote_code=False, merges=True)
    again.load_state_dict(read_values(checkpoint, again.state_dict()))
    with torch.no_grad(), again.use_original_attention():
        assert_close(again.model(input_ids=ids).logits, expected)
    obstacle = save_policy(policy, tokenizer, tmp_path / "out", origin=ORIGIN)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad(), expected_warnings_ignored():
        adapter = PeftModel.from_pretrained(plain, tmp_path / "out" / "adapter")(ids).logits
    assert_close(adapter, expected, rtol=1e-4, atol=2e-4)
    assert obstacle is None
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")(ids).logits
    assert_close(merged, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dorra": True}, r"use_dorra is no setting of an adapter\. Did you mean use_dora\?"),
        ({"bias": "all"}, r"lora\.bias must be none, got all"),
        ({"task_type": "CAUSAL_LM"}, r"lora\.task_type is set by the training itself"),
        ({"trainable_token_indices": [1]}, r"lora\.trainable_token_indices changes single rows"),
        ({"qalora_group_size": 16}, r"qalora_group_size of peft\.LoraConfig is not supported"),
        ({"init_lora_weights": "pissa"}, "must be true or gaussian, got pissa"),
        ({"init_lora_weights": False}, "must be true or gaussian, got False"),
        (
            {"lora_alpha": 8.0, "alpha": 16.0},
            r"lora_alpha 8.0 is peft's name of --model\.lora\.alpha",
        ),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern q_proj must be at least 1"),
        ({"dropout": 0.1, "target_parameters": ["experts.gate_up_proj"]}, "cannot drop the input"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias is for plain LoRA"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoRA(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": 5},
        {"modules_to_save": "lm_head"},
        {"target_parameters": [1]},
        {"exclude_modules": {"q_proj": 1}},
        {"layers_to_transform": ["1"]},
        {"rank_pattern": ["q_proj"]},
        {"use_dora": "yes"},
        {"init_lora_weights": [1]},
    ],
)
def test_settings_of_other_types_are_refused(settings):
    """As a file may hold them; the tests' own check of types is in the constructor alone."""
    lora = LoRA()
    for name, value in settings.items():
        setattr(lora, name, value)
        with pytest.raises(ConfigError, match=f"--model.lora.{name}"):
            lora.__post_init__()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["head"]}, "modules_to_save: LlamaForCausalLM has no module head"),
        ({"target_parameters": ["experts"]}, "target_parameters: LlamaForCausalLM has no"),
        ({"layers_to_transform": [2]}, "layers_to_transform 2: LlamaForCausalLM has the layers 0"),
        ({"layers_to_transform": 0, "target_modules": ".*q_proj"}, "not for a pattern such as"),
        ({"layers_pattern": "layers"}, "layers_pattern needs"),
        ({"rank_pattern": {"nope": 4}}, "rank_pattern keys did not match"),
        ({"exclude_modules": ["nope"]}, "no modules were excluded"),
        ({"target_modules": "("}, r"target_modules \(: "),
    ],
)
def test_settings_without_an_effect_on_the_model_are_refused(settings, message):
    with pytest.raises((ConfigError, ModelError), match=message):
        take_policy(make_model("llama", vocab_size=VOCABULARY), lora=LoRA(**settings))


def test_modules_of_a_bfloat16_base_are_not_trained_whole():
    model = make_model("llama", vocab_size=VOCABULARY).to(torch.bfloat16)
    with pytest.raises(ConfigError, match="modules_to_save trains weights of the base"):
        take_policy(model, lora=LoRA(modules_to_save=["lm_head"]))


def test_a_set_of_names_becomes_a_list():
    lora = LoRA()
    lora.target_modules = {"q_proj", "k_proj"}  # as `peft.LoraConfig` holds them
    lora.__post_init__()
    assert lora.settings()["target_modules"] == ["k_proj", "q_proj"]


def test_the_four_settings_of_before_are_always_recorded_and_others_where_they_differ():
    four = {"r": 16, "alpha": 32.0, "target_modules": "all-linear", "dropout": 0.0}
    assert LoRA().settings() == four
    assert LoRA(lora_alpha=8.0, use_dora=True).settings() == four | {"alpha": 8.0, "use_dora": True}
    assert LoRA(**LoRA(use_rslora=True).settings()) == LoRA(use_rslora=True)
