"""Loading of models and adapters, from a directory or hub id."""

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from kto_lightning.errors import ConfigError, ModelError
from kto_lightning.models.adapters import check_adapter
from kto_lightning.models.config_checks import check_size, load_config
from kto_lightning.models.loading_errors import explain_loading
from kto_lightning.models.lora import ADAPTER, REFERENCE_ADAPTER, LoRA
from kto_lightning.models.lora_layers import add_adapter, expected_warnings_ignored
from kto_lightning.models.model_class import auto_class
from kto_lightning.models.model_files import (
    adapter_base,
    check_model_files,
    explain_missing_base,
    is_adapter,
)
from kto_lightning.models.quantization import Quantization, loading_options
from kto_lightning.models.randomness import disable_dropout
from kto_lightning.models.text_part import find_text_part, freeze_without_gradient


@dataclass(kw_only=True, slots=True)
class LoadedModel:
    """The model that training starts from."""

    model: nn.Module
    """A transformers model, or the `PeftModel` around one."""
    adapter: Literal["new", "given"] | None = None
    """None: all weights are trained. `new`: a new adapter, with the base as its reference. `given`:
    an adapter directory, with its frozen copy `REFERENCE_ADAPTER` as its reference."""
    base: str | None = None
    """The name of the base of a given adapter."""
    unused: list[str] = field(default_factory=list)
    """The modules that text does not reach, see `TextPart`. They are frozen."""


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    lora: LoRA | None = None,
    dropout: bool = False,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
    given_base: str | None = None,
) -> LoadedModel:
    """Load the policy: a model, an adapter directory with its base, or a model with a new adapter.

    Args:
        name: a directory or a hub id.
        dtype: of the base's weights; adapters are always float32.
        lora: the adapter to add. Its own dropout is kept, whatever `dropout` is.
        dropout: keep the model's dropout. Off by default: KTO compares log-probs, and noise in
            them is noise in the rewards.
        quantization: of the base's weights; `dtype` then applies to the other weights only.
        trust_remote_code: run code that comes with the model.
        given_base: see `adapter_base`; models that are no adapters do without.

    Raises:
        ModelError: if there is no such model, its files are damaged or pickled, or an adapter does
            not fit it.
        ConfigError: if `lora` is asked for on top of an adapter directory.
    """
    load_base = partial(
        load_causal_lm, dtype=dtype, quantization=quantization, trust_remote_code=trust_remote_code
    )
    if not is_adapter(name):
        model = load_base(name)
        if not dropout:
            disable_dropout(model)
        return _with_adapter(model, lora)
    if lora is not None:
        raise ConfigError(
            f"--model.lora adds an adapter, but --model.policy {name} is an adapter already. "
            "Remove --model.lora to train that adapter, or merge it into its base first."
        )
    base = adapter_base(name, given_base)
    check_adapter(name)
    with explain_missing_base(name, base):
        model = load_base(base)
    adapted = load_adapter(model, name, base)
    if not dropout:
        disable_dropout(adapted)
    unused = freeze_without_gradient(model)
    return LoadedModel(model=adapted, adapter="given", base=base, unused=unused)


def take_policy(
    model: nn.Module, *, lora: LoRA | None = None, dropout: bool = False
) -> LoadedModel:
    """The policy of a model in memory, as `load_model` has it of a directory. It changes in place.

    Args:
        model: a transformers model, or a `PeftModel` around one, whose adapter is then trained.
        lora: see `load_model`, as `dropout`.
    """
    if not dropout:
        disable_dropout(model)
    if isinstance(model, PeftModel):
        _copy_adapter(model)
        base: Any = model.get_base_model()
        unused = freeze_without_gradient(base)
        return LoadedModel(model=model.train(), adapter="given", unused=unused)
    assert isinstance(model, PreTrainedModel)
    return _with_adapter(model.train(), lora)


def _with_adapter(model: PreTrainedModel, lora: LoRA | None) -> LoadedModel:
    """The policy, which is trained as far as text reaches: a new adapter, or without one all
    weights."""
    if lora is None:
        return LoadedModel(model=model, unused=freeze_without_gradient(model))
    part = find_text_part(model)
    adapted = add_adapter(model, lora, unreached=part.unreached)
    freeze_without_gradient(model)
    return LoadedModel(model=adapted, adapter="new", unused=part.unused)


def load_causal_lm(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
    on_meta: bool = False,
) -> PreTrainedModel:
    """Load a causal language model from safetensors, in training mode.

    `from_pretrained` returns eval mode, in which activation checkpointing would silently be off.

    Args:
        on_meta: leave all tensors on the device `meta`, without values.

    Raises:
        ModelError: if there is no such model, or its files are damaged, incomplete or pickled.
    """
    check_model_files(name)
    config = load_config(name, trust_remote_code=trust_remote_code)
    check_size(name, config)
    with explain_loading(name, f"the model {name} cannot be loaded"):
        # `Any`: its annotation does not say that `output_loading_info` adds a second value.
        auto = auto_class(name, config, trust_remote_code=trust_remote_code)
        loaded: Any = auto.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **({"device_map": "meta"} if on_meta else {}),
            **loading_options(quantization, dtype),
        )
    model, found = loaded
    if hasattr(model.config, "validate"):
        # Else saving would find it, after the training.
        with explain_loading(name, f"the config of {name} could not be saved again"):
            model.config.validate()
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"{name} is an adapter on the hub. Download it, and give its directory: its base is "
            "the reference."
        )
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ModelError(
            f"{name}: its files lack {len(missing)} of the weights that its config calls for, for "
            f"example {missing[0]}, which would be initialized randomly. Give a complete "
            "causal language model."
        )
    return model.train()


def load_adapter(model: PreTrainedModel, name: str, base: str) -> nn.Module:
    """Load an adapter twice: to be trained, and frozen as `REFERENCE_ADAPTER`. It has values also
    if the model has none."""
    assign = model.device.type == "meta"
    what = f"{name}: the adapter does not fit its base {base}"
    with explain_loading(name, what), expected_warnings_ignored():
        adapted = PeftModel.from_pretrained(
            model, name, is_trainable=True, low_cpu_mem_usage=assign
        )
        # Of the two, only this one says which keys did not match.
        found = adapted.load_adapter(
            name, adapter_name=REFERENCE_ADAPTER, is_trainable=False, low_cpu_mem_usage=assign
        )
        adapted.set_adapter(ADAPTER)
        adapted.peft_config[ADAPTER].base_model_name_or_path = base
    wrong = [f"lacks {key}" for key in found.missing_keys]
    wrong += [f"has {key}" for key in found.unexpected_keys]
    if wrong:
        raise ModelError(
            f"{what}: {len(wrong)} of their weights do not match, for example its file {wrong[0]}. "
            "Give the base that it was trained on as --model.adapter_base, or save the adapter "
            "again."
        )
    return adapted.train()


def _copy_adapter(model: PeftModel) -> None:
    """Add a frozen copy of the adapter as `REFERENCE_ADAPTER`."""
    config: Any = copy.deepcopy(model.peft_config[ADAPTER])  # of LoRA or another kind
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # another would change the base's weights once more
    with expected_warnings_ignored():
        model.add_adapter(REFERENCE_ADAPTER, config)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors.items():
        parts = name.split(".")
        if REFERENCE_ADAPTER in parts:
            parts[parts.index(REFERENCE_ADAPTER)] = ADAPTER
            tensor.data.copy_(tensors[".".join(parts)])
    model.set_adapter(ADAPTER)  # freezes the others


def vocabulary_size(
    name: str, *, trust_remote_code: bool = False, given_base: str | None = None
) -> int:
    """The number of token ids of a model, from its config alone.

    Args:
        given_base: see `adapter_base`.

    Raises:
        ModelError: if there is no such model.
    """
    if is_adapter(name):
        base = adapter_base(name, given_base)
        with explain_missing_base(name, base):
            return vocabulary_size(base, trust_remote_code=trust_remote_code)
    check_model_files(name)
    config = load_config(name, trust_remote_code=trust_remote_code)
    with explain_loading(name, f"the config of {name} cannot be used"):
        return int(config.get_text_config().vocab_size)
