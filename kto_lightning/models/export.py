"""From a trained policy to directories that `from_pretrained` opens."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kto_lightning.files import _whole_directory
from kto_lightning.models.loading import load_causal_lm, whole_name
from kto_lightning.models.model_card import model_card
from kto_lightning.models.policy import Policy
from kto_lightning.models.quantization import is_quantized
from kto_lightning.models.reference import ORIGIN_FILE


def save_policy(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    *,
    origin: dict[str, Any],
) -> None:
    """Write `directory/model`, and under LoRA `directory/adapter` with the model merged.

    Merging is for good: the policy is the merged model afterwards. Nothing can be merged into
    weights of four bits: the update of a quantized policy goes into its base as it was before
    that, loaded once more, on the CPU in float32.

    Args:
        origin: `KTOModule.origin`, written beside the weights.

    Raises:
        KTOError: if the disk is full or the directory cannot be written.
    """
    directory = Path(directory)
    if has_adapter(policy):
        save_weights(policy, tokenizer, directory / "adapter", origin=origin)
        if is_quantized(policy.causal_lm):
            policy = _on_whole_base(policy, directory / "adapter", origin)
        merge_adapter(policy)
    save_weights(policy, tokenizer, directory / "model", origin=origin)


def _on_whole_base(policy: Policy, adapter: Path, origin: dict[str, Any]) -> Policy:
    model: Any = policy.model
    name = model.peft_config["default"].base_model_name_or_path
    base = load_causal_lm(name, trust_remote_code=origin["trust_remote_code"])
    return Policy(PeftModel.from_pretrained(base, adapter), packed=False)


def has_adapter(policy: Policy) -> bool:
    """Whether what is trained is an adapter."""
    return hasattr(policy.model, "peft_config")


def save_weights(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    origin: dict[str, Any],
) -> None:
    """Write what was trained, the model or the adapter alone, with tokenizer and model card.

    Raises:
        KTOError: if the disk is full or the directory cannot be written.
    """
    model: Any = policy.model
    with policy.own_attention_restored(), _whole_directory(directory) as part:
        if has_adapter(policy):
            config = model.peft_config["default"]
            config.base_model_name_or_path = whole_name(config.base_model_name_or_path)
            # The update alone: the base's embeddings stay where they came from.
            model.save_pretrained(part, selected_adapters=["default"], save_embedding_layers=False)
        else:
            model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        _write(part / ORIGIN_FILE, json.dumps(origin, indent=2) + "\n")
        _write(part / "README.md", model_card(origin, is_adapter=has_adapter(policy)))


def merge_adapter(policy: Policy) -> None:
    """Add the trained adapter's update to the weights, for good, in float32.

    A base in bfloat16 becomes float32, on the CPU, where there is room for it: rounded to bfloat16
    again, most of a small update would be lost.
    """
    model: Any = policy.model
    if policy.causal_lm.dtype != torch.float32:
        model = model.to("cpu").float()
    _untie_adapted(policy.causal_lm)
    policy.model = model.merge_and_unload(adapter_names=["default"])
    policy.causal_lm.config.dtype = torch.float32


def _untie_adapted(model: PreTrainedModel) -> None:
    """Give an adapted head, or adapted input embeddings, a weight of its own: tied, both would take
    up the update that was trained for one of them."""
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
