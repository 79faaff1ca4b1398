"""Loading of models and adapters, from a directory or hub id."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from kto_lightning.errors import ConfigError, ModelError, check_count, check_number
from kto_lightning.models.model_files import (
    adapter_base,
    check_model_files,
    first_line,
    is_adapter,
    pickled_weights_error,
    reason_of_failure,
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


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    lora: LoRA | None = None,
    dropout: bool = False,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
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
    base = adapter_base(name)
    if PeftConfig.from_pretrained(name).is_prompt_learning:
        raise ModelError(
            f"{name} is a prompt-learning adapter (virtual tokens), which cannot be trained "
            "here. Give one that changes weights, such as LoRA."
        )
    model = load_base(base)
    adapted = _load_adapter(model, name)
    if not dropout:
        disable_dropout(adapted)
    return LoadedModel(model=adapted, adapter="given")


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
    try:
        # `Any`: its annotation does not say that `output_loading_info` adds a second value.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **loading_options(quantization, dtype),
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"the model {name} cannot be loaded: {reason_of_failure(name, error)}"
        ) from error
    except Exception as error:  # safetensors raises its own type for a damaged file
        if type(error).__name__ != "SafetensorError":
            raise
        raise ModelError(f"{name}: its weights are damaged: {error}. Copy them again.") from error
    model, found = loaded
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
    """Suppress peft's warning about adapters on tied weights: `export` unties before it merges."""
    with warnings.catch_warnings():
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


def _load_adapter(model: PreTrainedModel, name: str) -> nn.Module:
    """Load an adapter twice: to be trained, and frozen as `REFERENCE_ADAPTER`."""
    directory = Path(name)
    if any(directory.glob("*.bin")) and not any(directory.glob("*.safetensors")):
        raise pickled_weights_error(name)
    try:
        with _tied_weights_allowed():
            adapted = PeftModel.from_pretrained(model, name, is_trainable=True)
            adapted.load_adapter(name, adapter_name=REFERENCE_ADAPTER, is_trainable=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        message = f"{name}: the adapter does not fit its base: {first_line(error)}"
        raise ModelError(message) from error
    adapted.set_adapter("default")
    return adapted.train()


def vocabulary_size(name: str, *, trust_remote_code: bool = False) -> int:
    """The number of token ids of a model, from its config alone.

    Raises:
        ModelError: if there is no such model.
    """
    base = adapter_base(name) if is_adapter(name) else name
    check_model_files(base)
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = reason_of_failure(base, error)
        raise ModelError(f"the model {name} cannot be loaded: {reason}") from error
    return config.get_text_config().vocab_size
