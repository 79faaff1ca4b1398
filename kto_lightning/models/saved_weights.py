"""The weights of a model in units, each converted by itself to what `save_pretrained` writes.

`save_pretrained` converts the state dict as a whole: it leaves out tied weights and reverts the
conversions of `from_pretrained`, such as that of the experts of a layer to one tensor. The same
functions of transformers are called here for one layer at a time, after merging an adapter. That
this gives the same names and shapes is checked with tensors on the device `meta`; a model of which
it does not hold, because a conversion takes weights of several layers, is a single unit.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from kto_lightning.models.merging import adapted_layers, merged_layer

_LAYER = re.compile(r".*?\.\d+(?=\.)")
"""The name of the outermost numbered module that a tensor belongs to."""


@dataclass(kw_only=True, slots=True)
class _Source:
    """Tensors of the model that give tensors of the plain model: one itself, or the many of a layer
    with an adapter the few of the merged layer."""

    tensors: dict[str, Tensor]
    plain: dict[str, Tensor]
    """What they give, on the device `meta`; parameters are parameters."""
    owner: Hashable
    """Equal for what is one tensor under several names."""
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(kw_only=True, slots=True)
class SavedUnit:
    """Weights that are read and converted at once."""

    model: PreTrainedModel
    sources: list[_Source]
    kept: set[str]
    """The plain names that are saved: of tied weights only one."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What must be read, by its name in the model's state dict."""
        return {name: t for source in self.sources for name, t in source.tensors.items()}

    def convert(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is saved, by its name in the files.

        Args:
            values: on the CPU, of all of `tensors`.
        """
        plain: dict[str, Tensor] = {}
        for source in self.sources:
            plain |= source.convert({name: values[name] for name in source.tensors})
        return revert_weight_conversion(
            self.model, {name: plain[name] for name in plain if name in self.kept}
        )

    def on_meta(self) -> dict[str, Tensor]:
        """`convert` without values."""
        plain = {n: t for source in self.sources for n, t in source.plain.items()}
        kept = {name: tensor.detach() for name, tensor in plain.items() if name in self.kept}
        converted = revert_weight_conversion(self.model, kept)
        # Not views, whose size would be that of the whole storage.
        return {name: torch.empty_like(tensor) for name, tensor in converted.items()}


@dataclass(kw_only=True, slots=True)
class SavedWeights:
    """The weights of a model as they are saved."""

    units: list[SavedUnit]
    tensors: dict[str, Tensor]
    """All that is saved, on the device `meta`, unit by unit."""
    num_parameters: int


def saved_weights(model: PreTrainedModel, *, merges: bool = False) -> SavedWeights:
    """How to save a model's weights unit by unit.

    Args:
        model: its tensors may be on any device, and sharded. Nothing of it is changed.
        merges: whether it has adapters, which are merged into a float32 model.
    """
    sources = list(_sources(model, merges=merges))
    kept = _untied_names(model, sources)
    sources = [source for source in sources if not kept.isdisjoint(source.plain)]
    for ignored in model._keys_to_ignore_on_save or ():
        kept.discard(ignored)
    grouped: dict[str, list[_Source]] = defaultdict(list)
    for source in sources:
        name = next(iter(source.plain))
        layer = _LAYER.match(name)
        grouped[layer.group() if layer else name].append(source)
    unit = partial(SavedUnit, model=model, kept=kept)
    whole = unit(sources=sources)
    units = [unit(sources=group) for group in grouped.values()]
    tensors = {name: tensor for one in units for name, tensor in one.on_meta().items()}
    if _shapes(tensors) != _shapes(whole.on_meta()):
        units, tensors = [whole], whole.on_meta()
    plain = {n: t for source in sources for n, t in source.plain.items() if n in kept}
    num_parameters = sum(t.numel() for t in plain.values() if isinstance(t, nn.Parameter))
    return SavedWeights(units=units, tensors=tensors, num_parameters=num_parameters)


def _sources(model: PreTrainedModel, *, merges: bool) -> Iterator[_Source]:
    state = model.state_dict(keep_vars=True)
    state = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    layers = adapted_layers(model) if merges else {}
    of_layer: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    beginnings = {f"{name}.": name for name in layers}
    for name, tensor in state.items():
        layer = next((beginnings[b] for b in _beginnings(name) if b in beginnings), None)
        if layer is None:
            yield _plain_source(name, tensor, merges=merges)
        else:
            of_layer[layer][name] = tensor
    for name, tensors in of_layer.items():
        merge = partial(merged_layer, layers[name], name)
        yield _Source(
            tensors=tensors,
            plain={n: _on_meta(t, merges=True) for n, t in merge({}, {}).items()},
            owner=id(layers[name]),
            convert=partial(merge, tensors),
        )


def _beginnings(name: str) -> Iterator[str]:
    """`a.`, `a.b.` of `a.b.c`."""
    for dot in re.finditer(r"\.", name):
        yield name[: dot.end()]


def _plain_source(name: str, tensor: Tensor, *, merges: bool) -> _Source:
    return _Source(
        tensors={name: tensor},
        plain={name: _on_meta(tensor, merges=merges)},
        owner=id(tensor),
        convert=_as_float32 if merges else _unchanged,
    )


def _unchanged(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return values


def _as_float32(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.float() if t.is_floating_point() else t for n, t in values.items()}


def _on_meta(tensor: Tensor, *, merges: bool) -> Tensor:
    dtype = torch.float32 if merges and tensor.is_floating_point() else tensor.dtype
    empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(empty, requires_grad=False) if is_parameter else empty


def _untied_names(model: PreTrainedModel, sources: list[_Source]) -> set[str]:
    """The plain names that transformers saves: of tied weights the one that it loads."""
    stand_ins: dict[Any, Tensor] = {}
    named = {}
    for source in sources:
        for index, name in enumerate(source.plain):
            named[name] = stand_ins.setdefault((source.owner, index), torch.empty(1))
    return set(remove_tied_weights_from_state_dict(named, model))


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
