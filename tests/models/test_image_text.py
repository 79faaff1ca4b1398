"""Image-text models are trained on text alone, in the class that they were saved from."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kto_lightning.errors import ModelError
from kto_lightning.models.export import save_policy
from kto_lightning.models.loading import load_model, take_policy
from kto_lightning.models.lora import LoRA
from kto_lightning.models.model_class import auto_class
from kto_lightning.models.packed_run import CHECKPOINTING
from kto_lightning.models.policy import Policy
from kto_lightning.models.reference import make_reference
from kto_lightning.models.routes.choose import make_policy
from kto_lightning.models.text_part import find_text_part, shown_names
from tests.models.test_merge import ORIGIN
from tests.support.factories import make_model, make_tokenizer
from tests.support.image_text import IMAGE_TEXT, PROCESSOR_FILES, make_image_text, save_image_text
from tests.support.plain_forwards import Plain, make_triples, pack_triples

VOCABULARY = 97
LENGTHS = [(7, 9, 5), (1, 20, 3), (11, 6, 30)]
TRAINABLE = sorted(IMAGE_TEXT.keys() - {"paligemma", "aya_vision"})
PADDED = {
    "qwen3_5": "it has layers of type linear_attention",
    "llama4": "it has layers of type chunked_attention",
}
TOWERS = {
    "qwen2_5_vl": ["model.visual"],
    "qwen3_5": ["model.visual"],
    "llama4": ["vision_model", "multi_modal_projector"],
    "mllama": [
        "model.vision_model",
        "model.language_model.layers.1",
        "model.multi_modal_projector",
    ],
}


def towers(architecture: str) -> list[str]:
    return TOWERS.get(architecture, ["model.vision_tower", "model.multi_modal_projector"])


def frozen(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def tensors(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that saves a model of each family once."""
    root = tmp_path_factory.mktemp("image_text")

    def saved(architecture: str) -> Path:
        path = root / architecture
        return path if path.exists() else save_image_text(path, architecture)

    return saved


@pytest.mark.parametrize("architecture", TRAINABLE)
def test_log_probs_and_gradients_are_those_of_plain_forwards(architecture):
    model = make_image_text(architecture, vocab_size=VOCABULARY)
    loaded = take_policy(model.train())
    policy, obstacles = make_policy(loaded.model)
    assert obstacles.get("packed") == PADDED.get(architecture)
    triples = make_triples(LENGTHS, vocab_size=VOCABULARY)
    batch = pack_triples(triples, shares_prompts=policy.shares_prompts)
    plain = Plain(make_image_text(architecture, vocab_size=VOCABULARY), triples)
    reference = make_reference(policy, loaded, name=None, load=lambda _: loaded)
    plain.assert_logps(reference.logps(batch))
    logps = policy(batch)
    plain.assert_logps(logps)
    weights = torch.tensor([1.0, -0.5, 2.0])
    (logps.matched * weights).sum().backward()
    plain.assert_gradients(policy.model, weights)


@pytest.mark.parametrize(
    ("architecture", "lora"),
    [("mistral3", None), ("mllama", None), ("llama4", LoRA(r=2)), ("qwen3_5", LoRA(r=2))],
)
def test_activation_checkpointing_changes_no_gradient(architecture, lora):
    found = []
    for checkpointing in (False, True):
        model = make_image_text(architecture, vocab_size=VOCABULARY)
        torch.manual_seed(0)  # of the adapter
        policy, _ = make_policy(take_policy(model.train(), lora=lora).model)
        if checkpointing:
            policy.causal_lm.gradient_checkpointing_enable(CHECKPOINTING)
        policy.train()
        triples = make_triples(LENGTHS, vocab_size=VOCABULARY)
        logps = policy(pack_triples(triples, shares_prompts=policy.shares_prompts))
        logps.matched.sum().backward()
        found.append({name: p.grad for name, p in policy.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", TRAINABLE)
def test_what_gets_no_gradient_from_text_is_frozen_and_nothing_else(architecture):
    plain = make_image_text(architecture, vocab_size=VOCABULARY)
    ids = torch.arange(3, 40)[None]
    plain(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    without = {name for name, p in plain.named_parameters() if p.grad is None}
    loaded = take_policy(make_image_text(architecture, vocab_size=VOCABULARY).train())
    assert sorted(loaded.unused) == sorted(towers(architecture))
    assert frozen(loaded.model) == without
    inside = [n for n in without if not n.startswith(tuple(f"{t}." for t in loaded.unused))]
    assert not inside
    assert loaded.model.training


@pytest.mark.parametrize(
    ("architecture", "lora"),
    [*((name, None) for name in TRAINABLE), ("llava", LoRA(r=2)), ("qwen3_5", LoRA(r=2))],
)
def test_an_export_is_the_whole_model_that_was_trained(tmp_path, directory, architecture, lora):
    source = directory(architecture)
    loaded = load_model(str(source), lora=lora)
    policy, _ = make_policy(loaded.model)
    assert type(policy.causal_lm).__name__ == saved_class(source).__name__
    _disturb(policy)
    trained = copy.deepcopy(policy)
    save_policy(policy, AutoTokenizer.from_pretrained(source), tmp_path, origin=ORIGIN)
    before, after = tensors(source), tensors(tmp_path / "model")
    assert before.keys() == after.keys()
    opened, found = saved_class(tmp_path / "model").from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if lora is None:
        expected = trained.causal_lm.state_dict()
        assert all(
            torch.equal(value, expected[name]) for name, value in opened.state_dict().items()
        )
    with torch.no_grad(), trained.use_original_attention() as model:
        ids = torch.arange(3, 40)[None]
        found = opened(input_ids=ids).logits
        torch.testing.assert_close(found, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    original = saved_class(source).from_pretrained(source).state_dict()
    untouched = tuple(f"{name}." for name in loaded.unused)
    for name, value in opened.state_dict().items():
        if name.startswith(untouched):
            assert torch.equal(value, original[name])
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    for name in PROCESSOR_FILES:
        assert (tmp_path / "model" / name).read_bytes() == (source / name).read_bytes()
    _check_card(tmp_path / "model")
    if lora is not None:
        _check_card(tmp_path / "adapter")
    configs = [json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "model")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_no_class_loads_are_kept(tmp_path, directory, sharded):
    source = tmp_path / "source"
    shutil.copytree(directory("qwen3_5"), source)
    if sharded:
        whole = transformers.AutoModelForImageTextToText.from_pretrained(source)
        (source / "model.safetensors").unlink()
        whole.save_pretrained(source, max_shard_size="100KB")
    extra = {"mtp.fc.weight": torch.randn(3, 4), "mtp.norm.weight": torch.randn(4).bfloat16()}
    save_file(extra, source / "model-mtp.safetensors", metadata={"format": "pt"})
    places = {n: p.name for p in source.glob("*.safetensors") for n in load_file(p)}
    index = {"metadata": {}, "weight_map": places}
    if not sharded:
        (source / "model.safetensors").rename(source / "model-1.safetensors")
        places |= {n: "model-1.safetensors" for n in places if n not in extra}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    policy = Policy(load_model(str(source)).model)
    save_policy(policy, make_tokenizer(), tmp_path, origin=ORIGIN)
    saved = {
        n: t for p in (tmp_path / "model").glob("*.safetensors") for n, t in load_file(p).items()
    }
    assert saved.keys() == places.keys()
    assert all(torch.equal(saved[name], value) for name, value in extra.items())
    opened, found = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not found["missing_keys"]
    expected = policy.causal_lm.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in opened.state_dict().items())
    listed = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert listed["weight_map"].keys() == places.keys()


def test_the_files_of_processors_come_from_the_cache_of_a_hub_too(tmp_path, directory, monkeypatch):
    cached = tmp_path / "hub" / "models--owner--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    shutil.copytree(directory("llava"), cached / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    policy = Policy(load_model("owner/name").model)
    save_policy(policy, make_tokenizer(), tmp_path, origin=ORIGIN)
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (tmp_path / "model" / name).read_text() == '{"made_for": "tests"}'
    assert not (tmp_path / "model" / "feature_extractor_config.json").exists()


def _check_card(path: Path) -> None:
    """What the model card says of loading works."""
    code = (path / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("DIRECTORY", str(path)), names)
    opened = (
        names["model"].get_base_model()
        if (path / "adapter_config.json").exists()
        else names["model"]
    )
    assert any("vision" in n or "visual" in n for n, _ in opened.named_parameters())


def saved_class(path: Path) -> Any:
    """The class in `architectures` of a directory's config."""
    (name,) = json.loads((path / "config.json").read_text())["architectures"]
    return getattr(transformers, name)


def _disturb(policy: Policy) -> None:
    """Change every trained weight."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "gate_proj"], r".*\.v_proj"])
def test_a_new_adapter_is_on_the_language_model_only(targets):
    model = make_image_text("mistral3", vocab_size=VOCABULARY)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert any("vision_tower" in n and n.endswith("q_proj") for n in names)
    adapted = take_policy(model.train(), lora=LoRA(r=2, target_modules=targets))
    layers = [n for n, p in adapted.model.named_parameters() if p.requires_grad]
    assert layers
    assert all(".language_model." in name for name in layers)
    if targets == "all-linear":
        expected = [n for n in names if ".language_model." in n]
        assert len(layers) == 2 * len(expected)


def test_an_adapter_on_a_vision_tower_alone_is_refused():
    model = make_image_text("mistral3", vocab_size=VOCABULARY)
    with pytest.raises(ModelError, match="target_modules"):
        take_policy(model.train(), lora=LoRA(r=2, target_modules=r".*vision_tower.*q_proj"))


def test_a_given_adapter_is_frozen_where_text_does_not_reach_it(tmp_path, directory):
    source = directory("mistral3")
    base = transformers.AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(str(tmp_path))
    loaded = load_model(str(tmp_path), given_base=str(source))
    policy, _ = make_policy(loaded.model)
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all(".language_model." in name for name in trained)
    assert any("vision_tower" in name and "lora_A" in name for name in frozen(policy))
    reference = make_reference(policy, loaded, name=None, load=lambda _: loaded)
    batch = pack_triples(make_triples(LENGTHS, vocab_size=VOCABULARY))
    expected = policy(batch).matched
    torch.testing.assert_close(reference.logps(batch).matched, expected)
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == trained


def test_text_that_attends_to_what_follows_it_is_refused():
    model = make_image_text("paligemma", vocab_size=VOCABULARY)
    with pytest.raises(ModelError, match="PaliGemmaForConditionalGeneration is not causal"):
        make_policy(take_policy(model.train()).model)


def test_a_forward_that_leaves_out_a_scale_of_the_logits_is_refused():
    model = make_image_text("aya_vision", vocab_size=VOCABULARY)
    with pytest.raises(ModelError, match=r"leaves out logit_scale 0\.25, which .* set it to 1"):
        make_policy(take_policy(model.train()).model)
    settled = make_image_text("aya_vision", vocab_size=VOCABULARY, logit_scale=1.0)
    policy, obstacles = make_policy(take_policy(settled.train()).model)
    assert not obstacles
    triples = make_triples(LENGTHS, vocab_size=VOCABULARY)
    Plain(model, triples).assert_logps(policy(pack_triples(triples)))


@pytest.mark.parametrize("architecture", ["gemma3_text", "xlnet"])
def test_a_language_model_that_reads_both_ways_is_refused(architecture):
    both_ways = {"use_bidirectional_attention": True} if architecture == "gemma3_text" else {}
    model = make_model(architecture, vocab_size=VOCABULARY, **both_ways)
    with pytest.raises(ModelError, match="is not causal: its log-probs of a token depend on"):
        make_policy(model.train())


def test_a_model_that_needs_an_image_is_refused():
    text = {"embed_dim": 16, "ffn_dim": 16, "layers": 1, "attention_heads": 2, "vocab_size": 97}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = AutoConfig.for_model("kosmos-2", text_config=text, vision_config=vision)
    model = transformers.Kosmos2ForConditionalGeneration(config)
    with pytest.raises(ModelError, match=r"cannot run on text alone: .*pixel_values"):
        take_policy(model.train())


class Experts(nn.Module):
    """A list of experts, of which one is used, and a router that only ranks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, width)) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        self.router(hidden).argmax()
        return self.experts[1](hidden)


def test_an_expert_without_tokens_is_trained_and_what_only_ranks_is_not():
    model: Any = make_model("llama", vocab_size=VOCABULARY)
    model.model.layers[0].mlp = Experts(32)
    loaded = take_policy(model.train())
    assert loaded.unused == []
    assert frozen(model) == {f"model.layers.0.mlp.router.{n}" for n in ("weight", "bias")}


def test_blocks_longer_than_a_few_tokens_are_trained():
    model = make_model("deepseek_v4", vocab_size=VOCABULARY)
    part = find_text_part(model)
    assert part.without_gradient
    assert all(".indexer." in name for name in part.without_gradient)
    assert any(".indexer." not in name and ".compressor." in name for name, _ in parameters(model))


def parameters(model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def test_a_plain_model_is_trained_whole():
    for architecture in ("llama", "qwen2_moe", "mamba", "gpt2"):
        model = make_model(architecture, vocab_size=VOCABULARY)
        part = find_text_part(model)
        assert (part.unused, part.without_gradient, part.unreached) == ([], set(), set())
        assert not model.training


@pytest.mark.parametrize(
    ("architecture", "saved_from", "expected"),
    [
        ("llama", ["LlamaForCausalLM"], "AutoModelForCausalLM"),
        ("llama", None, "AutoModelForCausalLM"),
        ("llama", ["LlamaForSequenceClassification"], "AutoModelForCausalLM"),
        ("qwen3_5", ["Qwen3_5ForConditionalGeneration"], "AutoModelForImageTextToText"),
        ("qwen3_5", ["Qwen3_5ForCausalLM"], "AutoModelForCausalLM"),
        ("qwen3_5_text", ["Qwen3_5ForCausalLM"], "AutoModelForCausalLM"),
        ("gemma3", ["Gemma3ForConditionalGeneration"], "AutoModelForCausalLM"),
        ("llama4", ["Llama4ForConditionalGeneration"], "AutoModelForImageTextToText"),
        ("mistral3", ["Mistral3ForConditionalGeneration"], "AutoModelForImageTextToText"),
        ("mistral3", None, "AutoModelForImageTextToText"),
        ("voxtral", ["VoxtralForConditionalGeneration"], "AutoModelForMultimodalLM"),
        ("vit", ["ViTForImageClassification"], "AutoModelForCausalLM"),  # whose error says it
    ],
)
def test_the_class_is_the_one_that_a_model_was_saved_from(architecture, saved_from, expected):
    config = AutoConfig.for_model(architecture)
    config.architectures = saved_from
    assert auto_class("model", config, trust_remote_code=False).__name__ == expected


def test_code_of_its_own_is_used_where_it_is_trusted():
    config = AutoConfig.for_model("mistral3")
    config.auto_map = {"AutoModelForCausalLM": "modeling.Model"}
    assert auto_class("model", config, trust_remote_code=True) is AutoModelForCausalLM
    assert auto_class("model", config, trust_remote_code=False) is not AutoModelForCausalLM


def test_an_encoder_with_a_decoder_is_refused():
    config = AutoConfig.for_model("pix2struct")
    config.architectures = ["Pix2StructForConditionalGeneration"]
    with pytest.raises(ModelError, match="a Pix2StructForConditionalGeneration, an encoder with"):
        auto_class("model", config, trust_remote_code=False)


def test_the_names_of_many_unused_modules_are_counted():
    names = ["model.vision_tower", *(f"model.layers.{i}" for i in range(5))]
    assert shown_names(names) == "vision_tower, layers.0, layers.1, layers.2 and 2 more"
