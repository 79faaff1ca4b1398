"""Export of a trained policy to directories that `from_pretrained` loads."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kto_lightning.files import whole_directory
from kto_lightning.models.loading import load_causal_lm
from kto_lightning.models.model_card import model_card
from kto_lightning.models.model_files import is_file, resolve_name
from kto_lightning.models.policy import Policy
from kto_lightning.models.quantization import is_quantized
from kto_lightning.models.reference import ORIGIN_FILE

_PROCESSOR_FILES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("audio_preprocessor_config.json", "feature_extractor_config.json"),
    *("chat_template.json", "audio_tokenizer_config.json"),
)


def save_policy(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    *,
    origin: dict[str, Any],
    trust_remote_code: bool = False,
) -> None:
    """Write `directory/model`; under LoRA it is the merged model, beside `directory/adapter`.

    The policy is the merged model afterwards. An update cannot be merged into four-bit weights: for
    a quantized policy the original base is loaded once more, on the CPU in float32.

    Args:
        origin: `KTOModule.origin`, written beside the weights.
        trust_remote_code: run code that comes with the original base.

    Raises:
        KTOError: if the disk is full or the directory cannot be written.
    """
    directory = Path(directory)
    if has_adapter(policy):
        save_weights(policy, tokenizer, directory / "adapter", origin=origin)
        if is_quantized(policy.causal_lm):
            policy = _on_original_base(policy, directory / "adapter", trust_remote_code)
        merge_adapter(policy)
    save_weights(policy, tokenizer, directory / "model", origin=origin)


def _on_original_base(policy: Policy, adapter: Path, trust_remote_code: bool) -> Policy:
    """The saved adapter on its base model without quantization."""
    model: Any = policy.model  # `nn.Module` to pyright, as below; peft adds what is used here
    name = model.peft_config["default"].base_model_name_or_path
    base = load_causal_lm(name, trust_remote_code=trust_remote_code)
    return Policy(PeftModel.from_pretrained(base, adapter), packed=False)


def has_adapter(policy: Policy) -> bool:
    """Whether the trained weights are those of an adapter."""
    return hasattr(policy.model, "peft_config")


def save_weights(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    origin: dict[str, Any],
) -> None:
    """Write the trained weights (the model's, or the adapter's alone), tokenizer and model card.

    Raises:
        KTOError: if the disk is full or the directory cannot be written.
    """
    model: Any = policy.model
    with policy.use_original_attention(), whole_directory(directory) as part:
        if has_adapter(policy):
            config = model.peft_config["default"]
            config.base_model_name_or_path = resolve_name(config.base_model_name_or_path)
            # Without `save_embedding_layers=False` peft would add the base's embeddings.
            model.save_pretrained(part, selected_adapters=["default"], save_embedding_layers=False)
        else:
            model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        if not has_adapter(policy):
            _copy_processor(policy.causal_lm, part)
        _write(part / ORIGIN_FILE, json.dumps(origin, indent=2) + "\n")
        _write(part / "README.md", model_card(origin, is_adapter=has_adapter(policy)))


def _copy_processor(model: PreTrainedModel, target: Path) -> None:
    """Copy the files of the base's image, audio and video processors, which no tokenizer saves."""
    source = Path(model.config._name_or_path)
    for name in _PROCESSOR_FILES:
        if is_file(str(source / name)) and not (target / name).exists():
            shutil.copyfile(source / name, target / name)


def merge_adapter(policy: Policy) -> None:
    """Merge the trained adapter into the base's weights, in float32; the policy changes in place.

    A bfloat16 base becomes float32, on the CPU, which has the memory for it: rounded to bfloat16,
    most of a small update would be lost.
    """
    model: Any = policy.model
    if policy.causal_lm.dtype != torch.float32:
        model = model.to("cpu").float()
    _untie_adapted(policy.causal_lm)
    policy.model = model.merge_and_unload(adapter_names=["default"])
    policy.causal_lm.config.dtype = torch.float32


def _untie_adapted(model: PreTrainedModel) -> None:
    """Untie head and input embeddings if either is adapted: the update that was trained for one
    would otherwise be merged into both."""
    # `Any`: linear and embedding layers, or peft's layers around them.
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    if not (hasattr(head, "get_base_layer") or hasattr(embeddings, "get_base_layer")):
        return
    head, embeddings = _base_layer(head), _base_layer(embeddings)
    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False


def _base_layer(layer: Any) -> Any:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
