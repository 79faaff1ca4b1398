"""From a trained policy to directories that `from_pretrained` opens."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from kto_lightning.errors import KTOError
from kto_lightning.policy import Policy

ORIGIN_FILE = "kto_lightning.json"
"""Beside the weights: where they came from, so that rewards are measured against that."""


def save_policy(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    *,
    origin: dict[str, Any],
) -> None:
    """Write `directory/model`, and under LoRA `directory/adapter` with the model merged.

    Merging is for good: the policy is the merged model afterwards.

    Args:
        origin: `KTOModule.origin`, written beside the weights.

    Raises:
        KTOError: if the disk is full or the directory cannot be written.
    """
    directory = Path(directory)
    with policy.own_attention_restored():
        if hasattr(policy.model, "peft_config"):
            peft_model: Any = policy.model
            with _whole_directory(directory / "adapter") as part:
                peft_model.save_pretrained(part, selected_adapters=["default"])
                _save_beside(part, tokenizer, origin)
            policy.model = peft_model.merge_and_unload(adapter_names=["default"])
            policy.causal_lm.set_attn_implementation(policy.own_attention)
        with _whole_directory(directory / "model") as part:
            policy.causal_lm.save_pretrained(part)
            _save_beside(part, tokenizer, origin)


def _save_beside(
    directory: Path, tokenizer: PreTrainedTokenizerBase, origin: dict[str, Any]
) -> None:
    tokenizer.save_pretrained(directory)
    (directory / ORIGIN_FILE).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def remembered_reference(name: str) -> str | None:
    """The reference that a model written by `save_policy` was trained against."""
    try:
        origin = json.loads((Path(name) / ORIGIN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return origin.get("reference") if isinstance(origin, dict) else None


def whole_name(name: str) -> str:
    """A directory by its whole path, so that it is found from elsewhere; a hub id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


class _whole_directory:
    """A directory that appears under its name when all of it is written, or not at all."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._part = target.with_name(f".{target.name}.part")

    def __enter__(self) -> Path:
        shutil.rmtree(self._part, ignore_errors=True)
        self._part.mkdir(parents=True)
        return self._part

    def __exit__(self, kind: type[BaseException] | None, error: Any, _: Any) -> None:
        if kind is None:
            shutil.rmtree(self._target, ignore_errors=True)
            os.replace(self._part, self._target)
            return
        shutil.rmtree(self._part, ignore_errors=True)
        if issubclass(kind, OSError):
            message = f"{self._target} cannot be written: {error}. Make room and export again."
            raise KTOError(message) from error
