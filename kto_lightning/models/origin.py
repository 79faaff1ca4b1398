"""What a checkpoint says of its policy, checked before a model is built from it."""

import json
from collections.abc import Mapping
from typing import Any

from kto_lightning.errors import ConfigError, ModelError
from kto_lightning.models.loading_errors import first_line
from kto_lightning.models.lora import LoRA

_TEXT = (str,)
_TEXT_OR_NONE = (str, type(None))
_FIELDS: dict[str, tuple[type, ...]] = {
    "policy": _TEXT,
    "reference": _TEXT,
    "loss": _TEXT,
    "dtype": _TEXT_OR_NONE,
    "lora": (dict, type(None)),
    "step": (int,),
    "results": (dict,),
    "data": (dict,),
}
_DATA_FIELDS: dict[str, tuple[type, ...]] = {
    "tokenizer": _TEXT_OR_NONE,
    "chat_template": _TEXT_OR_NONE,
    "train": (str, list, type(None)),
}
_DTYPES = (None, "float32", "bfloat16")


def check_origin(checkpoint: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The `kto` of a checkpoint (`policy_origin`), if a policy can be built from it.

    Args:
        path: of the checkpoint, for the message.

    Raises:
        ModelError: if it is missing, not plain values, or a value has another type than `fit`
            writes.
    """
    if not isinstance(checkpoint, dict) or "kto" not in checkpoint:
        raise ModelError(
            f"{path} was not written by kto_lightning. Give a checkpoint that `fit` wrote."
        )
    origin = checkpoint["kto"]
    wrong = _first_wrong(origin)
    if wrong is None:
        try:
            json.dumps(origin)
            _lora(origin["lora"])
        except (TypeError, ValueError, RecursionError, ConfigError) as error:
            wrong = first_line(error)
    if wrong is not None:
        raise ModelError(
            f"{path}: its origin, under kto, is not what `fit` writes: {wrong.rstrip('.')}. Give "
            "another checkpoint."
        )
    _check_in_files(origin, path)
    return origin


def _check_in_files(origin: dict[str, Any], path: str) -> None:
    """Refuse a policy or tokenizer that was an object in Python: no name leads to it."""
    data, objects = origin["data"], origin.get("in_memory")
    found = {}
    if isinstance(objects, list) and "policy" in objects:
        found["policy"] = origin["policy"]
    if data.get("tokenizer_in_memory") is True:
        found["tokenizer"] = data["tokenizer"]
    for role, name in found.items():
        raise ModelError(
            f"{path}: its {role} was an object in a Python program ({name}), which `export` cannot "
            "build again. In such a program, load the checkpoint with trainer.validate(module, "
            "datamodule=data, ckpt_path=…), and save module.policy.model and the tokenizer with "
            "their save_pretrained."
        )


def _first_wrong(origin: Any) -> str | None:
    if not isinstance(origin, dict):
        return f"it is no mapping but {type(origin).__name__}"
    for name, kinds in _FIELDS.items():
        if name not in origin:
            return f"{name} is missing"
        if not isinstance(origin[name], kinds):
            return f"{name} is of type {type(origin[name]).__name__}"
    for name, kinds in _DATA_FIELDS.items():
        if name not in origin["data"]:
            return f"data.{name} is missing"
        if not isinstance(origin["data"][name], kinds):
            return f"data.{name} is of type {type(origin['data'][name]).__name__}"
    if not isinstance(origin.get("adapter_base"), _TEXT_OR_NONE):
        return f"adapter_base is of type {type(origin['adapter_base']).__name__}"
    if origin["dtype"] not in _DTYPES:
        return f"dtype is {origin['dtype']}"
    return None


def _lora(settings: dict[str, Any] | None) -> LoRA | None:
    """The adapter that was trained.

    Raises:
        TypeError, ValueError, ConfigError: if these are not its settings.
    """
    if not settings:
        return None
    lora = LoRA(**settings)
    names = lora.target_modules if isinstance(lora.target_modules, list) else [lora.target_modules]
    if not isinstance(lora.r, int) or not all(isinstance(name, str) for name in names):
        raise TypeError("the settings of lora are of other types")
    return lora
