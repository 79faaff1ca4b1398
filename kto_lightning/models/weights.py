"""Weights of a checkpoint: which belong into it, and whether they fit a model."""

from typing import Any

from torch import nn

from kto_lightning.errors import ConfigError


def check_weights_fit(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Refuse a checkpoint of another model: what does not fit would be left out without a word.

    Raises:
        ConfigError: unless it holds every trained weight of `module`, in its shape, and no other.
    """
    saved = checkpoint.get("state_dict")
    if not saved:
        return  # sharded: each rank loads its own part
    own = {name: weight.shape for name, weight in module.state_dict().items()}
    trained = [n for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad]
    wrong = [name for name in trained if name not in saved]
    wrong += [n for n, value in saved.items() if n not in own or own[n] != value.shape]
    if not wrong:
        return
    origin = checkpoint.get("kto", {})
    raise ConfigError(
        f"the checkpoint does not hold the weights of this policy ({len(wrong)} do not fit, "
        f"{wrong[0]} is one). It was saved with --model.policy {origin.get('policy')} and "
        f"--model.lora {origin.get('lora')}: give the same."
    )


def without_frozen(state: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """The part of a module's state that training changes: frozen weights are left out."""
    # Tied weights stand in the state under each of their names.
    parameters = module.named_parameters(remove_duplicate=False)
    frozen = {name for name, p in parameters if not p.requires_grad}
    # Four-bit weights keep their scales beside them, as `….weight.absmax`.
    return {
        name: value
        for name, value in state.items()
        if name not in frozen and _weight_of(name) not in frozen
    }


def _weight_of(name: str) -> str | None:
    weight, dot, _ = name.rpartition(".weight.")
    return f"{weight}.weight" if dot else None
