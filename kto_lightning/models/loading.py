"""Loading of models and adapters, from a directory or hub id."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import AutoModelForCausalLM, PreTrainedModel

from kto_lightning.errors import ConfigError, ModelError, check_count, check_number
from kto_lightning.models.adapters import check_adapter
from kto_lightning.models.config_checks import check_size, load_config
from kto_lightning.models.loading_errors import explain_loading, first_line
from kto_lightning.models.model_files import (
    adapter_base,
    check_model_files,
    explain_missing_base,
    is_adapter,
)
from kto_lightning.models.quantization import Quantization, loading_options

MAX_RANK = 65_536
REFERENCE_ADAPTER = "reference"
"""peft's name for the frozen copy of an adapter that training starts from."""


@dataclass(kw_only=True, slots=True)
class LoRA:
    """A new low-rank adapter (arXiv:2106.09685) on a frozen base."""

    r: int = 16
    """Rank of the update."""
    alpha: float = 32.0
    """The update is scaled by alpha / r."""
    target_modules: str | list[str] = "all-linear"
    """Names of the modules to adapt, `lm_head` too; `all-linear`: all linear ones but the head."""
    dropout: float = 0.0
    """Dropout on the update's input; unlike the model's own, it is on whenever it is above 0."""

    def __post_init__(self) -> None:
        check_count("--model.lora.r", self.r, most=MAX_RANK)
        check_number("lora.alpha", self.alpha, above=0.0)
        check_number("lora.dropout", self.dropout, below=1.0)


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
        if lora is None:
            return LoadedModel(model=model)
        return LoadedModel(model=_add_adapter(model, lora), adapter="new")
    if lora is not None:
        raise ConfigError(
            f"--model.lora adds an adapter, but --model.policy {name} is an adapter already. "
            "Remove --model.lora to train that adapter, or merge it into its base first."
        )
    base = adapter_base(name, given_base)
    check_adapter(name)
    with explain_missing_base(name, base):
        model = load_base(base)
    adapted = _load_adapter(model, name, base)
    if not dropout:
        disable_dropout(adapted)
    return LoadedModel(model=adapted, adapter="given", base=base)


def load_causal_lm(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model from safetensors, in training mode.

    `from_pretrained` returns eval mode, in which activation checkpointing would silently be off.

    Raises:
        ModelError: if there is no such model, or its files are damaged, incomplete or pickled.
    """
    check_model_files(name)
    config = load_config(name, trust_remote_code=trust_remote_code)
    check_size(name, config)
    with explain_loading(name, f"the model {name} cannot be loaded"):
        # `Any`: its annotation does not say that `output_loading_info` adds a second value.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
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


def disable_dropout(model: nn.Module) -> None:
    """Disable every dropout of a model, including that of its adapters."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        # Functional dropouts get their rate from an attribute: `dropout`, `attention_dropout`, ….
        for name, rate in vars(module).items():
            if "drop" in name and isinstance(rate, float):
                vars(module)[name] = 0.0


@contextmanager
def _tied_weights_allowed() -> Iterator[None]:
    """Suppress peft's warnings about adapters on tied weights (`export` unties before it merges),
    and about missing weights, which are an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True")
        yield


def _add_adapter(model: PreTrainedModel, lora: LoRA) -> nn.Module:
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  # int by annotation only
        target_modules=_target_modules(lora.target_modules),
        lora_dropout=lora.dropout,
        task_type="CAUSAL_LM",
    )
    try:
        with _tied_weights_allowed():
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(
            f"--model.lora.target_modules {lora.target_modules}: {first_line(error)}"
        ) from error
    return adapted.train()


def _target_modules(names: str | list[str]) -> str | list[str]:
    """One module's name as a list: peft reads a string as a pattern that the whole path must match,
    which a bare name does for a top-level module only."""
    if isinstance(names, str) and names.isidentifier():
        return [names]
    return names


def _load_adapter(model: PreTrainedModel, name: str, base: str) -> nn.Module:
    """Load an adapter twice: to be trained, and frozen as `REFERENCE_ADAPTER`."""
    what = f"{name}: the adapter does not fit its base {base}"
    with explain_loading(name, what), _tied_weights_allowed():
        adapted = PeftModel.from_pretrained(model, name, is_trainable=True)
        # Of the two, only this one says which keys did not match.
        found = adapted.load_adapter(name, adapter_name=REFERENCE_ADAPTER, is_trainable=False)
        adapted.set_adapter("default")
        adapted.peft_config["default"].base_model_name_or_path = base
    wrong = [f"lacks {key}" for key in found.missing_keys]
    wrong += [f"has {key}" for key in found.unexpected_keys]
    if wrong:
        raise ModelError(
            f"{what}: {len(wrong)} of their weights do not match, for example its file {wrong[0]}. "
            "Give the base that it was trained on as --model.adapter_base, or save the adapter "
            "again."
        )
    return adapted.train()


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
