"""What a model's config may ask for before anything is built from it: no code, no endless size."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from kto_lightning.errors import ModelError
from kto_lightning.models.loading_errors import explain_loading
from kto_lightning.models.model_class import auto_class
from kto_lightning.models.model_files import is_directory, read_json

_COUNTED = ("layer", "head", "expert", "label", "block", "group")
_MAX_COUNT = 2**17
"""Of what a config counts: libraries make a module or a list entry of each."""
_MAX_INTEGER = 2**62
_MAX_DEPTH = 50
_MAX_PACKING = 16
"""Weights in an element of a file: two-bit weights in 32-bit integers."""


def load_config(name: str, *, trust_remote_code: bool) -> PreTrainedConfig:
    """Load a model's config.

    Raises:
        ModelError: if it cannot be read, or asks for code without `trust_remote_code` or for sizes
            that no model has.
    """
    if is_directory(name):
        path = Path(name) / "config.json"
        for key, value in _settings(read_json(path), path):
            _check_setting(path, key, value, trust_remote_code=trust_remote_code)
    with explain_loading(name, f"{_config_of(name)} cannot be used"):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def _config_of(name: str) -> str:
    return str(Path(name) / "config.json") if is_directory(name) else f"the config of {name}"


def _settings(value: Any, path: Path, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The plain values of a config with the key of each; an entry of a list has the list's."""
    if depth > _MAX_DEPTH:
        raise ModelError(f"{path} is nested more than {_MAX_DEPTH} deep. Copy the model again.")
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _settings(inner, path, name or key, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _settings(inner, path, key, depth + 1)
    else:
        yield key, value


def _check_setting(path: Path, key: str, value: Any, *, trust_remote_code: bool) -> None:
    # transformers takes `owner/name` for a repository of kernels, downloads and runs it.
    if "implementation" in key and "/" in str(value) and not trust_remote_code:
        raise ModelError(
            f"{path}: {key} {value} is code from a hub, which has not been run. If you trust it, "
            "give --model.trust_remote_code true (to export: --trust_remote_code)."
        )
    if key == "transformers_weights" and (
        Path(str(value)).suffix != ".safetensors" or "/" in str(value)
    ):
        raise ModelError(f"{path}: {key} must be the name of a safetensors file, got {value}.")
    if isinstance(value, int):
        limit = _MAX_COUNT if any(word in key for word in _COUNTED) else _MAX_INTEGER
        if any(word in key for word in ("_size", "_dim", "vocab")):
            limit = _MAX_INTEGER
        if abs(value) > limit:
            raise ModelError(f"{path}: {key} {value} is more than any model has. Copy it again.")


def check_size(name: str, config: PreTrainedConfig) -> None:
    """Check that the weight files of a directory hold about as many weights as its config calls
    for, before memory is allocated for them.

    Raises:
        ModelError: if a file is damaged, or the config calls for many times what is there.
    """
    if not is_directory(name) or not type(config).__module__.startswith("transformers.models."):
        return  # the code that came with a model has been trusted
    found = sum(map(count_elements, sorted(Path(name).glob("*.safetensors"))))
    model = make_empty(name, config, trust_remote_code=False)
    expected = sum(parameter.numel() for parameter in model.parameters())
    if expected > _MAX_PACKING * found:
        raise ModelError(
            f"{_config_of(name)} calls for {expected:,} weights, and its files hold {found:,}. "
            "Copy the model again."
        )


def make_empty(name: str, config: PreTrainedConfig, *, trust_remote_code: bool) -> PreTrainedModel:
    """A model as its config calls for, on the device `meta`.

    Raises:
        ModelError: if its config cannot be used.
    """
    with explain_loading(name, f"{_config_of(name)} cannot be used"), torch.device("meta"):
        auto = auto_class(name, config, trust_remote_code=trust_remote_code)
        return auto.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)


def count_elements(path: Path) -> int:
    """The number of elements of all tensors in a safetensors file, from its header.

    Raises:
        ModelError: if the file is damaged.
    """
    return sum(torch.Size(shape).numel() for shape in tensor_shapes(path).values())


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of all tensors in a safetensors file, from its header.

    Raises:
        ModelError: if the file is damaged.
    """
    what, advice = f"{path}: its weights are damaged", "Copy them again."
    with explain_loading(str(path), what, advice=advice), safe_open(path, "pt") as file:
        return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - no mapping
