"""Export of a trained policy to directories that `from_pretrained` loads."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from kto_lightning.distributed import stream_to_first_rank
from kto_lightning.files import whole_directory
from kto_lightning.models.loading import load_causal_lm
from kto_lightning.models.lora import ADAPTER
from kto_lightning.models.lora_layers import expected_warnings_ignored
from kto_lightning.models.merging import merge_obstacle, untie_in_config
from kto_lightning.models.model_card import model_card
from kto_lightning.models.model_class import auto_class_of
from kto_lightning.models.model_files import is_directory, is_file, resolve_name
from kto_lightning.models.policy import Policy
from kto_lightning.models.quantization import is_quantized
from kto_lightning.models.reference import ORIGIN_FILE
from kto_lightning.models.safetensors_files import SafetensorsFiles
from kto_lightning.models.saved_weights import SavedWeights, saved_weights
from kto_lightning.models.unloaded import copy_unloaded

Read = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Gives the values of tensors by name, on the CPU of the process that writes."""
_PROCESSOR_FILES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("audio_preprocessor_config.json", "feature_extractor_config.json"),
    *("chat_template.json", "audio_tokenizer_config.json"),
)


def in_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values of whole tensors, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def save_policy(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    *,
    origin: dict[str, Any],
    trust_remote_code: bool = False,
    gather: Callable[[Tensor], Tensor | None] | None = None,
) -> str | None:
    """Write `directory/model`; under LoRA it is the merged model, beside `directory/adapter`.

    An update cannot be merged into four-bit weights: for a quantized policy the original base is
    loaded once more, on the CPU in float32.

    Args:
        origin: `KTOModule.origin`, written beside the weights.
        trust_remote_code: run code that comes with the original base.
        gather: that of `TrainingStrategy`. If it is given, all ranks call this function, and rank 0
            writes.

    Returns:
        why only the adapter was written: no merged model would equal it; None: all was written.

    Raises:
        KTOError: if the disk is full or the directory cannot be written.
    """
    directory = Path(directory)
    options: dict[str, Any] = {"origin": origin}
    if gather is not None:
        options |= {"read": partial(_gathered, gather), "sharded": True}
    if has_adapter(policy):
        save_weights(policy, tokenizer, directory / "adapter", **options)
        if is_quantized(policy.causal_lm):
            policy = _on_original_base(policy, directory / "adapter", trust_remote_code)
        obstacle = merge_obstacle(policy.model)
        if obstacle is not None:
            return obstacle
    save_weights(policy, tokenizer, directory / "model", merges=has_adapter(policy), **options)
    return None


def _gathered(
    gather: Callable[[Tensor], Tensor | None], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The values of sharded tensors on rank 0; nothing on the others."""
    whole = {name: gather(tensor) for name, tensor in tensors.items()}
    return {name: value for name, value in whole.items() if value is not None}


def _on_original_base(policy: Policy, adapter: Path, trust_remote_code: bool) -> Policy:
    """The saved adapter on its base model without quantization."""
    model: Any = policy.model  # `nn.Module` to pyright, as below; peft adds what is used here
    name = model.peft_config["default"].base_model_name_or_path
    base = load_causal_lm(name, trust_remote_code=trust_remote_code)
    return Policy(PeftModel.from_pretrained(base, adapter), route="padded")


def has_adapter(policy: Policy) -> bool:
    """Whether the trained weights are those of an adapter."""
    return hasattr(policy.model, "peft_config")


def save_weights(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    origin: dict[str, Any],
    merges: bool = False,
    read: Read = in_memory,
    sharded: bool = False,
) -> None:
    """Write the trained weights (the model's, or the adapter's alone), tokenizer and model card.

    The weights are read unit by unit, so that this process need not hold the whole model.

    Args:
        merges: write the model with the policy's adapter merged into it, not the adapter.
        read: gives the values of tensors, which come by their names in the policy's state dict.
        sharded: whether `read` is a collective. All ranks then call this function.

    Raises:
        KTOError: if the disk is full or the directory cannot be written; on other ranks, if rank 0
            could not.
    """
    write_weights: Callable[[Path, Iterator[dict[str, Tensor]]], None]
    is_adapter = has_adapter(policy) and not merges
    if is_adapter:
        units = [_adapter_tensors(policy)]
        write_weights = partial(_write_adapter, policy)
    else:
        if merges:
            untie_in_config(policy.causal_lm)
        weights = saved_weights(policy.causal_lm, merges=merges)
        prefix = _prefix(policy)
        units = [{prefix + name: t for name, t in one.tensors.items()} for one in weights.units]
        write_weights = partial(_write_model, policy, weights, prefix, merges)

    def write(values: Iterator[dict[str, Tensor]]) -> None:
        with whole_directory(directory) as part:
            write_weights(part, values)
            tokenizer.save_pretrained(part)
            if not is_adapter:
                _copy_processor(policy.causal_lm, part)
                copy_unloaded(policy.causal_lm, part)
            _write(part / ORIGIN_FILE, json.dumps(origin, indent=2) + "\n")
            card = model_card(
                origin, is_adapter=is_adapter, auto_class=auto_class_of(policy.causal_lm)
            )
            _write(part / "README.md", card)

    with policy.use_original_attention():
        if sharded:
            stream_to_first_rank(units, read, write)
        else:
            write(map(read, units))


def _prefix(policy: Policy) -> str:
    """What the names of the transformers model's tensors begin with in the policy's state dict."""
    return next(f"{name}." for name, m in policy.named_modules() if m is policy.causal_lm)


def _without(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _adapter_tensors(policy: Policy) -> dict[str, Tensor]:
    state = policy.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if ADAPTER in name.split(".")}


def _write_adapter(policy: Policy, part: Path, values: Iterator[dict[str, Tensor]]) -> None:
    model: Any = policy.model
    config = model.peft_config[ADAPTER]
    if config.base_model_name_or_path:  # a model in memory may have none
        config.base_model_name_or_path = resolve_name(config.base_model_name_or_path)
    (adapter,) = values
    state = _without("model.", adapter)
    # Without `save_embedding_layers=False` peft would add the base's embeddings.
    with expected_warnings_ignored():
        model.save_pretrained(
            part, selected_adapters=[ADAPTER], save_embedding_layers=False, state_dict=state
        )


def _write_model(
    policy: Policy,
    weights: SavedWeights,
    prefix: str,
    merges: bool,
    part: Path,
    values: Iterator[dict[str, Tensor]],
) -> None:
    model = policy.causal_lm
    model.save_pretrained(part, state_dict={})  # all but the weights
    if merges:
        model.config.dtype = torch.float32
        model.config.save_pretrained(part)
    files = SafetensorsFiles(part, weights.tensors, weights.num_parameters)
    for unit in weights.units:
        files.add(unit.convert(_without(prefix, next(values))))
    files.close()


def _copy_processor(model: PreTrainedModel, target: Path) -> None:
    """Copy the files of the base's image, audio and video processors, which no tokenizer saves."""
    for name in _PROCESSOR_FILES:
        source = None if (target / name).exists() else _processor_file(model, name)
        if source is not None:
            shutil.copyfile(source, target / name)


def _processor_file(model: PreTrainedModel, name: str) -> str | None:
    """The path of a file beside a model's weights; None: there is none."""
    origin = model.config._name_or_path
    if not origin:  # of a model in memory
        return None
    if is_directory(origin):
        path = str(Path(origin) / name)
        return path if is_file(path) else None
    if model.config.get_text_config() is model.config:  # nothing of it is asked of the hub
        return None
    try:
        return cached_file(origin, name)
    except OSError:  # transformers' error for a file that there is not, or no hub
        return None


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
