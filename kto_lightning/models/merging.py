"""Merging of an adapter into its base, where the merged model equals the base with its adapter."""

import copy
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from kto_lightning.models.lora import ADAPTER
from kto_lightning.models.lora_layers import computes_linear, expected_warnings_ignored

_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)
"""What peft puts around a layer that an adapter changes or replaces."""


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The outermost layers that an adapter changes or replaces, by each of their names."""
    layers: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        within = any(f"{name}.".startswith(f"{outer}.") for outer in layers)
        if isinstance(module, _WRAPPERS) and not within:
            layers[name] = module
    return layers


def merged_layer(
    layer: Any, name: str, tensors: dict[str, Tensor], values: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of a layer with the trained adapter merged into it, in float32, by their names.

    A bfloat16 base becomes float32: rounded to bfloat16, most of a small update would be lost. Only
    for models without a `merge_obstacle`.

    Args:
        layer: peft's layer, which stays as it is.
        name: its name in the model.
        tensors: its state, by names in the model's; empty: nothing is merged, and the result tells
            only which weights the merged layer has.
        values: their values on the CPU.
    """
    merges = bool(tensors)
    if merges:
        memo = {id(tensor): _copied(values[own], tensor) for own, tensor in tensors.items()}
        layer = copy.deepcopy(layer, memo).float()
    # Of modules trained whole, and of adapted parameters, which may be several in one module.
    if hasattr(layer, "unload_and_optionally_merge_module"):
        plain = layer.unload_and_optionally_merge_module(
            merge=merges, safe_merge=False, adapter_names=[ADAPTER]
        )
    else:
        if merges:
            with expected_warnings_ignored():
                layer.merge(adapter_names=[ADAPTER])
        plain = layer.get_base_layer()
    state = plain.state_dict(keep_vars=True)
    return {f"{name}.{own}": tensor for own, tensor in state.items()}


def _copied(value: Tensor, like: Tensor) -> Tensor:
    """A copy to merge into: the value may be the model's own tensor."""
    copied = value.detach().clone()
    if not isinstance(like, nn.Parameter):
        return copied
    return nn.Parameter(copied, requires_grad=False)


def merge_obstacle(model: nn.Module) -> str | None:
    """Why no merged model would equal the base with its adapter; None: one does.

    Args:
        model: a `PeftModel`, changed by nothing here.
    """
    assert isinstance(model, PeftModel)
    causal_lm: Any = model.get_base_model()
    ends = [causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()]
    end_weights = [_original(end).weight for end in ends if end is not None]
    uses = _uses_of_parameters(causal_lm)
    shared = {weight: names for weight, names in uses.items() if len(names) > 1}
    ends_are_tied = len({id(weight) for weight in end_weights}) < len(end_weights)
    others = [names for weight, names in shared.items() if weight is not end_weights[0]]
    for name, layer in _adapted(causal_lm):
        base = _original(layer)
        for own, parameter in base.named_parameters():
            names = shared.get(parameter, [])
            is_end = ends_are_tied and parameter is end_weights[0]
            if is_end and len(names) == 2 and not others:
                continue  # untied by `untie_in_config`
            if names:
                places = f"{len(names)} places" if len(names) > 2 else " and ".join(names)
                return (
                    f"{name} adapts one use of a weight that the model has at {places}, and a "
                    f"merged {own} would change all of them"
                )
        if not isinstance(layer, BaseTunerLayer) or not isinstance(base, nn.Linear):
            continue
        if not computes_linear(base, even_quantized=True):
            return f"{name} is a {type(base).__name__}, which is no product with one weight"
        if getattr(layer, "lora_bias", {}).get(ADAPTER) and base.bias is None:
            return f"the adapter adds a bias to {name}, which has none"
    return None


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that an adapter changes or replaces, by their names; outer ones first."""
    for name, module in model.named_modules():
        if isinstance(module, _WRAPPERS):
            yield name, module


def _original(layer: Any) -> Any:
    """A layer without adapters."""
    if isinstance(layer, AuxiliaryTrainingWrapper):
        layer = layer.original_module
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _uses_of_parameters(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """The places of every parameter of the base: the paths of the modules that hold it, one for
    each parent of such a module. What runs several times under one parent has one place."""
    places: dict[nn.Parameter, dict[tuple[int, str], str]] = defaultdict(dict)
    for name, parent in model.named_modules():
        if isinstance(parent, _WRAPPERS):
            continue
        for own, child in parent.named_children():
            for parameter in _original(child).parameters(recurse=False):
                places[parameter][id(parent), own] = f"{name}.{own}".strip(".")
    return {parameter: list(found.values()) for parameter, found in places.items()}


def untie_in_config(model: PreTrainedModel) -> None:
    """Say in the config that head and input embeddings are not tied, where they are not in the
    merged model: if either is adapted, as the update that was trained for one would otherwise be
    merged into both, and if they were not before, whatever the config says."""
    # `Any`: linear and embedding layers, or peft's layers around them.
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    bases = _original(head), _original(embeddings)
    if getattr(bases[0], "weight", None) is getattr(bases[1], "weight", None):
        if bases == (head, embeddings):
            return
        model.config.get_text_config().tie_word_embeddings = False
    if getattr(model.config, "tie_word_embeddings", False):
        model.config.tie_word_embeddings = False
