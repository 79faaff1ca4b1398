"""From a trained policy to directories that `from_pretrained` opens."""

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from kto_lightning.errors import KTOError
from kto_lightning.policy import Policy


def save_policy(policy: Policy, tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> None:
    """Write `directory/model`, and under LoRA `directory/adapter` with the model merged.

    Merging is for good: the policy is the merged model afterwards.

    Raises:
        KTOError: if the disk is full or the directory cannot be written.
    """
    directory = Path(directory)
    with policy.own_attention_restored():
        if hasattr(policy.model, "peft_config"):
            peft_model: Any = policy.model
            with _whole_directory(directory / "adapter") as part:
                peft_model.save_pretrained(part, selected_adapters=["default"])
                tokenizer.save_pretrained(part)
            policy.model = peft_model.merge_and_unload(adapter_names=["default"])
            policy.causal_lm.set_attn_implementation(policy.own_attention)
        with _whole_directory(directory / "model") as part:
            policy.causal_lm.save_pretrained(part)
            tokenizer.save_pretrained(part)


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
