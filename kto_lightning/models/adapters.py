"""Checks of an adapter directory before peft opens it."""

from pathlib import Path

from peft import PeftConfig

from kto_lightning.errors import ModelError
from kto_lightning.models.config_checks import tensor_shapes
from kto_lightning.models.loading_errors import explain_loading
from kto_lightning.models.model_files import check_regular_files, pickled_weights_error, read_json

_WEIGHTS = "adapter_model.safetensors"


def check_adapter(name: str) -> None:
    """Check that a directory holds an adapter that changes weights, saved as safetensors, of ranks
    that its weights have, and that asks for no other code.

    Raises:
        ModelError: if not.
    """
    directory = Path(name)
    check_regular_files(directory)
    weights, path = directory / _WEIGHTS, directory / "adapter_config.json"
    if not weights.exists():
        if any(directory.glob("*.bin")):
            raise pickled_weights_error(name)
        raise ModelError(f"{name} has no weights ({_WEIGHTS}). Copy them there.")
    settings = read_json(path)
    if settings.get("megatron_config"):  # peft imports the module that it names
        raise ModelError(f"{path}: megatron_config is for Megatron's layers only. Remove it.")
    longest = max((n for shape in tensor_shapes(weights).values() for n in shape), default=0)
    patterns = settings.get("rank_pattern")
    ranks = [settings.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    for rank in ranks:
        if isinstance(rank, int) and rank > longest:
            raise ModelError(
                f"{path}: the rank {rank} is not that of {_WEIGHTS}. Copy the adapter again."
            )
    with explain_loading(name, f"{path} cannot be used"):
        config = PeftConfig.from_pretrained(name)
    if config.is_prompt_learning:
        raise ModelError(
            f"{name} is a prompt-learning adapter (virtual tokens), which cannot be trained "
            "here. Give one that changes weights, such as LoRA."
        )
    if getattr(config, "alora_invocation_tokens", None) is not None:
        raise ModelError(
            f"{path}: alora_invocation_tokens makes it an activated LoRA, which cannot be merged "
            "into its base. Give a plain LoRA adapter."
        )
