"""Models and tokenizers in memory: the numbers of a run from files, and what is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.strategies import Strategy
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
)

from kto_lightning import Follow, KTODataModule, KTOModule, LoRA
from kto_lightning.errors import ConfigError
from kto_lightning.models.in_memory import object_identity, object_name
from kto_lightning.models.model_card import model_card
from kto_lightning.models.reference import AdapterReference, FrozenReference
from kto_lightning.models.tokenizer import take_tokenizer
from kto_lightning.strategies.checks import check_objects
from kto_lightning.training import resuming
from tests.support.cli import run_cli
from tests.support.factories import (
    chat_records,
    make_model,
    make_tokenizer,
    plain_records,
    save_adapter,
    save_model,
    trl_chat_template,
    write_jsonl,
)
from tests.support.loggers import RowLogger

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models with tied weights, a third that runs padded, an adapter, and records."""
    root = tmp_path_factory.mktemp("files")
    records = [record | {"label": i % 2 == 0} for i, record in enumerate(plain_records(7))]
    model = save_model(root / "model", "qwen2", make_tokenizer())
    return {
        "model": model,
        "other": save_model(root / "other", "qwen2", make_tokenizer(), seed=1),
        "padded": save_model(root / "padded", "mamba", make_tokenizer()),
        "adapter": save_adapter(root / "adapter", model),
        "train": write_jsonl(root / "train.jsonl", records),
    }


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **({"dtype": torch.float32} | options))


def load_adapted(files: dict[str, Path]) -> PeftModel:
    return PeftModel.from_pretrained(load(files["model"]), files["adapter"], is_trainable=True)


def adapted(model: Any, **settings: Any) -> Any:
    config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**(config | settings)))


def make_trainer(rows: RowLogger | None = None, **options: Any) -> Trainer:
    settings = {"max_epochs": 2, "accelerator": "cpu", "logger": rows or False} | options
    return Trainer(
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **settings,
    )


def data_of(files: dict[str, Path], **settings: Any) -> KTODataModule:
    return KTODataModule(
        train=str(files["train"]), batch_size=4, preprocessing_workers=1, **settings
    )


def run(
    files: dict[str, Path],
    data: KTODataModule | None = None,
    *,
    checkpoint: Path | None = None,
    resumes: Path | None = None,
    trainer: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[KTOModule, list[dict[str, Any]]]:
    """Four steps; writes a checkpoint after the last."""
    torch.manual_seed(0)
    rows, module = RowLogger(), KTOModule(learning_rate=1e-3, **settings)
    fitting = make_trainer(rows, **(trainer or {}))
    fitting.fit(module, datamodule=data or data_of(files), ckpt_path=resumes)
    if checkpoint is not None:
        fitting.save_checkpoint(checkpoint)
    return module, rows.rows


def assert_same_runs(one: tuple[KTOModule, list], other: tuple[KTOModule, list]) -> None:
    assert one[1] == other[1]
    assert_same_weights(one[0], other[0])


def assert_same_weights(one: KTOModule, other: KTOModule) -> None:
    assert one.policy is not None
    assert other.policy is not None
    expected = dict(other.policy.named_parameters())
    found = dict(one.policy.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def with_checkpointing(model: Any) -> Any:
    """In the variant that is not ours."""
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return model


def with_gradients(model: Any) -> Any:
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    return model


Files = dict[str, Path]
RUNS: dict[str, tuple[Callable[[Files], dict], Callable[[Files], dict]]] = {
    "full": (lambda f: {"policy": str(f["model"])}, lambda f: {"policy": load(f["model"])}),
    "padded": (lambda f: {"policy": str(f["padded"])}, lambda f: {"policy": load(f["padded"])}),
    "a reference too": (
        lambda f: {"policy": str(f["model"]), "reference": str(f["other"])},
        lambda f: {"policy": load(f["model"]), "reference": load(f["other"])},
    ),
    "only the reference": (
        lambda f: {"policy": str(f["model"]), "reference": str(f["other"])},
        lambda f: {"policy": f["model"], "reference": load(f["other"])},
    ),
    "the reference by name": (
        lambda f: {"policy": str(f["model"]), "reference": str(f["other"])},
        lambda f: {"policy": load(f["model"]), "reference": f["other"]},
    ),
    "lora": (
        lambda f: {"policy": str(f["model"]), "lora": LoRA(r=4)},
        lambda f: {"policy": load(f["model"]).requires_grad_(False), "lora": LoRA(r=4)},
    ),
    "bfloat16": (
        lambda f: {"policy": str(f["model"]), "lora": LoRA(r=4), "dtype": "bfloat16"},
        lambda f: {"policy": load(f["model"], dtype=BF16), "lora": LoRA(r=4)},
    ),
    "an adapter": (
        lambda f: {"policy": str(f["adapter"])},
        lambda f: {"policy": load_adapted(f)},
    ),
    "follow": (
        lambda f: {"policy": str(f["model"]), "follow": Follow(every_n_steps=1)},
        lambda f: {"policy": load(f["model"]), "follow": Follow(every_n_steps=1)},
    ),
    "activation checkpointing": (
        lambda f: {
            "policy": str(f["model"]),
            "lora": LoRA(r=4),
            "activation_checkpointing": True,
        },
        lambda f: {"policy": with_checkpointing(load(f["model"])), "lora": LoRA(r=4)},
    ),
    "gradients of before": (
        lambda f: {"policy": str(f["model"])},
        lambda f: {"policy": with_gradients(load(f["model"]))},
    ),
}


@pytest.mark.parametrize("kind", RUNS)
def test_the_numbers_are_those_of_the_same_weights_on_disk(kind: str, files: Files) -> None:
    from_files, in_memory = RUNS[kind]
    expected = run(files, **from_files(files))
    found = run(files, **in_memory(files))
    assert_same_runs(found, expected)
    assert found[1][0]["train/loss"] != found[1][-1]["train/loss"]
    assert type(found[0].reference) is type(expected[0].reference)
    if kind == "activation checkpointing":
        assert found[0].policy is not None
        (layer, *_) = found[0].policy.causal_lm.base_model.layers
        assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is False


def test_dropout_is_off_unless_it_is_asked_for(tmp_path: Path, files: Files) -> None:
    dropping = save_model(tmp_path / "model", "gpt2", make_tokenizer(), resid_pdrop=0.5)
    without, with_it = ({"policy": load(dropping), "dropout": on} for on in (False, True))
    assert_same_runs(run(files, **without), run(files, policy=dropping))
    found = run(files, **with_it)
    assert_same_runs(found, run(files, policy=dropping, dropout=True))
    assert found[1] != run(files, policy=dropping)[1]


def test_a_model_is_trained_in_place_and_can_be_used_afterwards(
    files: Files, tmp_path: Path
) -> None:
    model, tokenizer = load(files["model"]), AutoTokenizer.from_pretrained(files["model"])
    attention = model.config._attn_implementation
    start = load(files["model"])
    module, _ = run(files, data_of(files, tokenizer=tokenizer), policy=model)
    assert module.policy is not None
    assert module.policy.model is model
    assert model.config._attn_implementation == attention
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert isinstance(module.reference, FrozenReference)
    assert torch.equal(module.reference.policy.causal_lm.lm_head.weight, start.lm_head.weight)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(load(tmp_path)(ids).logits, model.eval()(ids).logits)
    assert tokenizer.chat_template is None
    assert module.trainer.datamodule.prepared.tokenizer is not tokenizer  # pyright: ignore


def test_a_model_can_be_used_after_a_run_that_failed(files: Files) -> None:
    class Broken(RowLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            raise OSError("no space left")

    model, ids = load(files["model"]), torch.tensor([[5, 6, 7]])
    fitting = make_trainer(Broken())
    with pytest.raises(OSError, match="no space left"):
        fitting.fit(KTOModule(model, learning_rate=1e-3), datamodule=data_of(files))
    assert model(ids).logits.isfinite().all()


def test_the_same_module_is_trained_further(files: Files) -> None:
    model, data = load(files["model"]), data_of(files)
    reference = load(files["other"])
    module, _ = run(files, data, policy=model, reference=reference)
    once = model.lm_head.weight.detach().clone()
    make_trainer().fit(module, datamodule=data)
    assert not torch.equal(model.lm_head.weight, once)
    predicting = data_of(files, predict=str(files["train"]))
    assert make_trainer().predict(module, datamodule=predicting)
    assert reference.config._attn_implementation == model.config._attn_implementation == "sdpa"


def test_frozen_weights_of_a_model_stay(files: Files) -> None:
    model = load(files["model"])
    model.model.layers[0].requires_grad_(False)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    run(files, policy=model)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) is name.startswith("model.layers.0."), name


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_the_base_of_an_adapter_can_be_the_reference(kind: str, files: Files) -> None:
    if kind == "lora":
        base = load(files["model"])
        settings: dict[str, Any] = {"policy": base, "reference": base, "lora": LoRA(r=4)}
        expected: dict[str, Any] = {"policy": files["model"], "lora": LoRA(r=4)}
    else:
        policy = load_adapted(files)
        settings = {"policy": policy, "reference": policy.get_base_model()}
        expected = {"policy": files["adapter"], "reference": files["model"]}
    found = run(files, **settings)
    assert isinstance(found[0].reference, AdapterReference)
    assert_same_runs(found, run(files, **expected))


@pytest.mark.parametrize("kind", ["modules_to_save", "dora", "ia3", "pissa"])
def test_the_reference_is_a_copy_of_any_adapter(kind: str, files: Files) -> None:
    model = load(files["model"])
    if kind == "ia3":
        policy = get_peft_model(model, IA3Config(task_type="CAUSAL_LM"))
    else:
        options = {"modules_to_save": ["norm"]} if kind == "modules_to_save" else {}
        options |= {"use_dora": True} if kind == "dora" else {}
        policy = adapted(model, init_lora_weights="pissa" if kind == "pissa" else False, **options)
    base = {name: w.detach().clone() for name, w in policy.named_parameters() if "base" in name}
    module, rows = run(files, policy=policy)
    kept = dict(policy.named_parameters())
    trained = [name for name in base if kept[name].requires_grad]
    assert all(torch.equal(kept[n], w) for n, w in base.items() if n not in trained)
    assert all(".default" in name for name in trained)
    assert abs(rows[0]["train/z0_raw"]) < 1e-4
    assert abs(rows[0]["train/reward/desirable"]) < 1e-5
    assert abs(rows[-1]["train/reward/desirable"]) > 1e-4
    assert isinstance(module.reference, AdapterReference)


def compiled_in_place(model: Any) -> Any:
    model.compile()
    return model


def merged(model: Any) -> Any:
    model.merge_adapter()
    return model


def meta(model: Any) -> Any:
    return model.to("meta")


def with_integers(model: Any) -> Any:
    weight = model.lm_head.weight.detach().to(torch.int8)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    return model


def with_trained_norm(model: Any) -> Any:
    model.base_model.model.model.norm.requires_grad_(True)
    return model


def bert() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=512, intermediate_size=16, **sizes))


REFUSED: dict[str, tuple[Callable[[Files], Any], dict[str, Any], str]] = {
    "bfloat16": (lambda f: load(f["model"], dtype=BF16), {}, "Load it with dtype=torch.float32"),
    "float16": (
        lambda f: load(f["model"], dtype=torch.float16),
        {"lora": LoRA()},
        "neither float32 nor bfloat16",
    ),
    "frozen": (lambda f: load(f["model"]).requires_grad_(False), {}, "no weight that requires"),
    "compiled": (lambda f: torch.compile(load(f["model"])), {}, "its attribute _orig_mod"),
    "compiled in place": (lambda f: compiled_in_place(load(f["model"])), {}, "is compiled"),
    "parallel": (lambda f: nn.DataParallel(load(f["model"])), {}, "its attribute module"),
    "meta": (lambda f: meta(load(f["model"])), {}, "on the device meta"),
    "quantized": (lambda f: with_integers(load(f["model"])), {"lora": LoRA()}, "is quantized"),
    "another module": (lambda f: nn.Linear(2, 2), {}, "transformers.PreTrainedModel .* got Linear"),
    "no head": (
        lambda f: AutoModel.from_pretrained(f["model"]),
        {},
        "Qwen2Model, which is no causal language model",
    ),
    "a classifier": (
        lambda f: AutoModelForSequenceClassification.from_pretrained(f["model"]),
        {},
        "is no causal language model. Load it with AutoModelForCausalLM",
    ),
    "no causal model": (lambda f: bert(), {}, "BertForMaskedLM, which is no causal"),
    "an adapter and lora": (load_adapted, {"lora": LoRA()}, "the policy has one already"),
    "an adapter for inference": (
        lambda f: PeftModel.from_pretrained(load(f["model"]), f["adapter"]),
        {},
        "is_trainable=True",
    ),
    "an adapter of another name": (
        lambda f: get_peft_model(
            load(f["model"]), LoraConfig(task_type="CAUSAL_LM"), adapter_name="mine"
        ),
        {},
        "the adapters mine, of which mine is active",
    ),
    "an adapter's layers": (
        lambda f: load_adapted(f).get_base_model(),
        {},
        "is not the peft.PeftModel that they belong to",
    ),
    "a merged adapter": (lambda f: merged(load_adapted(f)), {}, "unmerge_adapter"),
    "an adapter in half precision": (
        lambda f: load_adapted(f).to(BF16),
        {},
        "autocast_adapter_dtype=True",
    ),
    "a base that is trained": (
        lambda f: with_trained_norm(load_adapted(f)),
        {},
        "1 weights of the policy outside its adapter",
    ),
    "virtual tokens": (
        lambda f: get_peft_model(
            load(f["model"]), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        ),
        {},
        "prompt-learning",
    ),
    "dtype": (lambda f: load(f["model"]), {"dtype": "float32"}, "dtype='float32' is for a policy"),
    "quantization": (
        lambda f: load(f["model"]),
        {"quantization": "4bit", "lora": LoRA()},
        "quantization='4bit' is for a policy",
    ),
    "adapter_base": (lambda f: load(f["model"]), {"adapter_base": "base"}, "adapter directories"),
    "reference_cache": (
        lambda f: load(f["model"]),
        {"reference_cache": "cache"},
        "reference_cache keeps log-probs by the files of the reference",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(case: str, files: Files) -> None:
    make, settings, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        KTOModule(make(files), **settings)


def test_a_reference_must_not_change_with_the_policy(files: Files) -> None:
    model, other = load(files["model"]), load(files["other"])
    with pytest.raises(ConfigError, match="shares weights with the policy"):
        KTOModule(model, reference=model)
    other.model.norm = model.model.norm
    with pytest.raises(ConfigError, match="shares weights with the policy"):
        KTOModule(model, reference=other)


def test_a_reference_is_refused_by_name(files: Files) -> None:
    model = files["model"]
    with pytest.raises(ConfigError, match=r"the reference, .* has bfloat16 weights and the policy"):
        KTOModule(model, reference=load(files["other"], dtype=BF16))
    with pytest.raises(ConfigError, match="reference_cache keeps"):
        KTOModule(model, reference=load(files["other"]), reference_cache="cache")
    with pytest.raises(ConfigError, match="quantization is for models that are loaded by"):
        KTOModule(model, reference=load(model), quantization="4bit", lora=LoRA())
    KTOModule(load(model), reference=model, reference_cache="cache")
    KTOModule(model, reference=load(model, dtype=BF16), dtype="bfloat16", lora=LoRA())


def test_a_model_with_the_layers_of_an_earlier_adapter_is_refused(files: Files) -> None:
    model = load(files["model"])
    run(files, policy=model, lora=LoRA(r=4))
    with pytest.raises(ConfigError, match="has layers of an adapter"):
        KTOModule(model, lora=LoRA(r=4))
    policy = load_adapted(files)
    run(files, policy=policy)
    with pytest.raises(ConfigError, match="leave the name 'reference' to its frozen copy"):
        KTOModule(policy)
    policy.delete_adapter("reference")
    KTOModule(policy)


def strategy(name: str) -> Strategy:
    return Trainer(strategy=name, accelerator="cpu", devices=1, logger=False).strategy


def test_strategies_that_shard_or_start_child_processes_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be sharded by FSDP2"):
        check_objects(["policy"], strategy("fsdp2"))
    for name in ("ddp_spawn", "ddp_fork"):
        with pytest.raises(ConfigError, match="the policy would be trained in child processes"):
            check_objects(["policy"], strategy(name))
    check_objects(["policy", "reference"], strategy("ddp"))


def test_ranks_must_have_the_same_weights(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = KTOModule(load(files["model"])).model_settings
    resumption = resuming.Resumption()
    resumption.identify_objects(settings)
    elsewhere = {"policy": object_identity(load(files["other"]))}
    monkeypatch.setattr(resuming, "gathered", lambda own: [*own, elsewhere])
    with pytest.raises(ConfigError, match="the policy in memory has other weights on some ranks"):
        resumption.identify_objects(settings)


@pytest.mark.parametrize("kind", ["full", "lora", "an adapter", "a reference too", "follow"])
def test_a_run_resumes_with_the_same_weights_only(kind: str, files: Files, tmp_path: Path) -> None:
    from_files, in_memory = RUNS[kind]
    whole = run(files, **in_memory(files))
    path = tmp_path / "two.ckpt"
    run(files, checkpoint=path, trainer={"max_steps": 2}, **in_memory(files))
    resumed = run(files, resumes=path, **in_memory(files))
    assert resumed[1] == whole[1][2:]
    assert_same_weights(resumed[0], whole[0])
    changed = in_memory(files)
    with torch.no_grad():
        next(changed["policy"].parameters()).add_(0.01)
    with pytest.raises(ConfigError, match=r"--model\.policy Qwen2.* does not hold the weights"):
        run(files, resumes=path, **changed)
    with pytest.raises(ConfigError, match=r"\(files\) cannot be compared with Qwen2.*in memory"):
        run(files, resumes=path, **from_files(files))


def test_an_identity_is_that_of_the_weights_wherever_they_come_from(
    files: Files, tmp_path: Path
) -> None:
    model = make_model("llama", vocab_size=512)
    model.save_pretrained(tmp_path)
    assert object_identity(model) == object_identity(load(tmp_path).train())
    assert object_identity(model) != object_identity(load(tmp_path, dtype=BF16))
    assert object_identity(model) != object_identity(make_model("llama", vocab_size=512, seed=1))
    plain, named = adapted(model), object_identity(model)
    assert object_identity(plain) != named
    assert object_name(plain) == "LlamaForCausalLM in memory with an adapter"
    model = plain.unload()
    assert object_name(model) == "LlamaForCausalLM in memory"
    assert object_name(load(tmp_path)) == f"LlamaForCausalLM in memory (loaded from {tmp_path})"


def test_a_checkpoint_names_the_objects_and_export_refuses_them(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "one.ckpt"
    module, _ = run(files, checkpoint=path, trainer={"max_steps": 1}, policy=load(files["model"]))
    origin = torch.load(path, weights_only=True)["kto"]
    name = f"Qwen2ForCausalLM in memory (loaded from {files['model']})"
    assert (origin["policy"], origin["reference"], origin["in_memory"]) == (name, name, ["policy"])
    assert json.loads(json.dumps(origin)) == origin
    assert f"made from `{name}`" in model_card(module.origin(), is_adapter=False)
    assert run_cli("export", path, tmp_path / "exported") == 1
    error = capsys.readouterr().err
    assert f"{path}: its policy was an object in a Python program ({name})" in error
    tokenizer = AutoTokenizer.from_pretrained(files["model"])
    data = data_of(files, tokenizer=tokenizer)
    run(files, data, checkpoint=path, trainer={"max_steps": 1}, policy=files["model"])
    assert run_cli("export", path, tmp_path / "exported") == 1
    assert "its tokenizer was an object in a Python program (Qwen2T" in capsys.readouterr().err
    run(files, checkpoint=path, policy=files["model"], reference=load(files["other"]))
    assert run_cli("export", path, tmp_path / "exported") == 0


def test_the_tokenizer_is_the_one_given_or_that_of_the_models_directory(files: Files) -> None:
    tokenizer = AutoTokenizer.from_pretrained(files["model"])
    expected = run(files, policy=files["model"])
    for given in (None, tokenizer, files["model"]):
        assert_same_runs(
            run(files, data_of(files, tokenizer=given), policy=load(files["model"])), expected
        )
    made = make_model("qwen2", vocab_size=512)
    with pytest.raises(ConfigError, match=r"Give it: KTODataModule\(tokenizer=…\)"):
        run(files, policy=made)
    run(files, data_of(files, tokenizer=tokenizer), policy=made)


def test_a_chat_template_goes_to_a_copy_of_the_tokenizer(files: Files, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(trl_chat_template("qwen2_5"), encoding="utf-8")
    train = write_jsonl(tmp_path / "chat.jsonl", chat_records(8))
    tokenizer = AutoTokenizer.from_pretrained(files["model"])
    tokenizer.pad_token = None
    rows = []
    for given in (tokenizer, str(files["model"])):
        data = data_of(files | {"train": train}, tokenizer=given, chat_template=str(template))
        rows.append(run(files, data, policy=files["model"])[1])
    assert rows[0] == rows[1]
    assert tokenizer.chat_template is None
    assert tokenizer.pad_token is None


def test_no_tokenizer_is_refused_by_its_class() -> None:
    inner = make_tokenizer()
    with pytest.raises(ConfigError, match=r"PreTrainedTokenizerBase, got Tokenizer\. Load one"):
        take_tokenizer(inner.backend_tokenizer)
    with pytest.raises(ConfigError, match=r"got SimpleNamespace\. Give its attribute tokenizer"):
        take_tokenizer(SimpleNamespace(tokenizer=inner))


def test_the_command_line_takes_names_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("fit", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "hub id or an adapter directory. (required, type: str) ARG: --model.reference" in shown
    assert "(type: Union[str, list[str], null], default: null) ARG: --data.validation" in shown
    for key in ("model.policy", "model.reference", "data.tokenizer"):
        assert f"ARG: --{key} {key.rpartition('.')[2].upper()} " in shown
        assert f"--{key}.help" not in shown
