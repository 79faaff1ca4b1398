"""Loading: a directory or hub id to a model and its adapters."""

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from kto_lightning.errors import ConfigError, ModelError
from kto_lightning.models.quantization import Quantization, loading_options

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
REFERENCE_ADAPTER = "reference"
"""The frozen twin of an adapter that training starts from."""


@dataclass(kw_only=True, slots=True)
class LoRA:
    """A new low-rank adapter (arXiv:2106.09685) on a frozen base."""

    r: int = 16
    """Rank of the update."""
    alpha: float = 32.0
    """The update is scaled by alpha / r."""
    target_modules: str | list[str] = "all-linear"
    """Names of the modules to adapt, `lm_head` too; `all-linear`: every linear one but the head."""
    dropout: float = 0.0
    """Dropout on the update's input; the one dropout that stays on when given."""

    def __post_init__(self) -> None:
        for name, fits, limits in (
            ("r", self.r >= 1, "at least 1"),
            ("alpha", 0.0 < self.alpha < math.inf, "a number above 0"),
            ("dropout", 0.0 <= self.dropout < 1.0, "at least 0 and below 1"),
        ):
            if not fits:
                value = getattr(self, name)
                raise ConfigError(f"--model.lora.{name} must be {limits}, got {value:g}.")


@dataclass(kw_only=True, slots=True)
class LoadedModel:
    """What training starts from."""

    model: nn.Module
    """A transformers model, or the `PeftModel` around one."""
    adapter: Literal["new", "given"] | None = None
    """None: all weights are trained. `new`: a fresh adapter, whose reference is the base. `given`:
    an adapter directory, whose reference is its frozen twin `REFERENCE_ADAPTER`."""


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
        dtype: of the base's weights; adapters are float32 always.
        lora: the adapter to add. Its own dropout is kept, whatever `dropout` says.
        dropout: keep the model's dropout. Off by default: KTO compares log-probs, and noise in
            them is noise in the rewards.
        quantization: of the base's weights, which `dtype` then is not about.

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
            "Leave --model.lora out to train on, or merge the adapter into its base first."
        )
    base = adapter_base(name)
    if PeftConfig.from_pretrained(name).is_prompt_learning:
        raise ModelError(
            f"{name} is an adapter of virtual tokens, which cannot be trained here. Take one that "
            "changes weights, such as LoRA."
        )
    model = load_base(base)
    adapted = _load_adapter(model, name)
    if not dropout:
        disable_dropout(adapted)
    return LoadedModel(model=adapted, adapter="given")


def is_adapter(name: str) -> bool:
    """Whether a directory holds a peft adapter."""
    return (Path(name) / "adapter_config.json").is_file()


def weight_directories(name: str) -> list[Path]:
    """Where the weights behind a name lie: the model's directory, after its adapter's if it is one.

    A hub id is fetched into the hub's cache if it is not there yet.

    Raises:
        ModelError: if it cannot be had.
    """
    if is_adapter(name):
        return [Path(name), *weight_directories(adapter_base(name))]
    if Path(name).is_dir():
        return [Path(name)]
    try:
        return [Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))]
    except (OSError, ValueError) as error:
        raise ModelError(f"the model {name} cannot be had: {first_line(error)}") from error


def adapter_base(name: str) -> str:
    """The base model that an adapter directory names.

    Raises:
        ModelError: if its config is damaged or names none.
    """
    try:
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ModelError(f"{name}: adapter_config.json cannot be read: {error}") from error
    if not base:
        raise ModelError(f"{name}: adapter_config.json names no base_model_name_or_path. Add it.")
    return base


def load_causal_lm(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model from safetensors, in training mode.

    `from_pretrained` returns eval mode, in which activation checkpointing would silently be off.
    """
    check_model_files(name)
    try:
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
            f"{name}: its files lack {len(missing)} of the weights that its config calls for "
            f"({missing[0]} is one), which would start at random. Take a complete causal language "
            "model."
        )
    return model.train()


def check_model_files(name: str) -> None:
    directory = Path(name)
    if not name:
        raise ModelError("the name of a model is empty. Give a directory or hub id.")
    if not directory.exists() and not _HUB_ID.fullmatch(name):
        raise ModelError(f"there is no directory {name}, and it cannot be a hub id (owner/name).")
    if directory.is_dir() and not (directory / "config.json").is_file():
        within = directory / "model"  # of an OUTPUT
        found = f"{within}" if within.is_dir() else "the directory that save_pretrained wrote"
        raise ModelError(
            f"{name} has no config.json, so it is not a Hugging Face model directory. Give {found}."
        )
    if directory.is_dir() and not any(directory.glob("*.safetensors")):
        if any(directory.glob("*.bin")):
            raise _pickled(name)
        raise ModelError(f"{name} has no weights (*.safetensors). Copy them there.")
    if directory.is_file():
        raise ModelError(f"{name} is a file. Give a Hugging Face model directory or a hub id.")


def _pickled(name: str) -> ModelError:
    return ModelError(
        f"{name} has its weights as pickles only, which can run code when they are loaded. "
        "Save it again as safetensors: model.save_pretrained does."
    )


def reason_of_failure(name: str, error: BaseException) -> str:
    if "trust_remote_code" in str(error):
        return (
            "it comes with code of its own, which has not been run. Read that code; if you trust "
            "it, give --model.trust_remote_code true."
        )
    if Path(name).exists() or "connect" not in str(error):
        return first_line(error)
    return f"there is no directory {name} here, and the hub cannot be reached. Check the path."


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def disable_dropout(model: nn.Module) -> None:
    """Switch off every dropout of a model, adapters included."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        # Many modules hand a rate of their own, under names of their own, to a functional dropout.
        for name, rate in vars(module).items():
            if "drop" in name and isinstance(rate, float):
                vars(module)[name] = 0.0


@contextmanager
def _tied_head_allowed() -> Iterator[None]:
    """Without peft's warning of adapters on tied weights: `export` unties before it merges."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True")
        yield


def _add_adapter(model: PreTrainedModel, lora: LoRA) -> nn.Module:
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=_target_modules(lora.target_modules),
        lora_dropout=lora.dropout,
        task_type="CAUSAL_LM",
    )
    try:
        with _tied_head_allowed():
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(
            f"--model.lora.target_modules {lora.target_modules}: {first_line(error)}"
        ) from error
    return adapted.train()


def _target_modules(names: str | list[str]) -> str | list[str]:
    """One module's name as a list of one: peft takes a text for a pattern of whole paths, which a
    bare name is only of a module at the top."""
    if isinstance(names, str) and names.isidentifier():
        return [names]
    return names


def _load_adapter(model: PreTrainedModel, name: str) -> nn.Module:
    """The adapter to train on, and the same once more, frozen, as the reference."""
    directory = Path(name)
    if any(directory.glob("*.bin")) and not any(directory.glob("*.safetensors")):
        raise _pickled(name)
    try:
        with _tied_head_allowed():
            adapted = PeftModel.from_pretrained(model, name, is_trainable=True)
            adapted.load_adapter(name, adapter_name=REFERENCE_ADAPTER, is_trainable=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        message = f"{name}: the adapter does not fit its base: {first_line(error)}"
        raise ModelError(message) from error
    adapted.set_adapter("default")
    return adapted.train()


def vocabulary_size(name: str, *, trust_remote_code: bool = False) -> int:
    """How many token ids a model knows, read from its config alone."""
    base = adapter_base(name) if is_adapter(name) else name
    check_model_files(base)
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = reason_of_failure(base, error)
        raise ModelError(f"--model.policy {name} cannot be loaded: {reason}") from error
    return config.get_text_config().vocab_size


def whole_name(name: str) -> str:
    """A directory by its whole path, so that it is found from elsewhere; a hub id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name
