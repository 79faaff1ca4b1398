"""The part of a model that text reaches; towers and projectors of images and audio are beside it.

No list of architectures would stay complete, so a few tokens are run, as in the packing probe.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from kto_lightning.models.architecture import language_model
from kto_lightning.models.loading_errors import explain_loading
from kto_lightning.models.rope import SequenceLengths, rotating

_FEW_TOKENS, _MANY_TOKENS = 12, 512
"""Many: several blocks of an attention that compresses its keys, such as DeepSeek-V4's."""
_SHOWN = 4


@dataclass(kw_only=True, slots=True)
class TextPart:
    """What a forward of text alone uses of a model."""

    unused: list[str]
    """The modules that it does not run, outermost names only, such as `model.vision_tower`."""
    without_gradient: set[str]
    """The parameters that get no gradient from its log-probs: those of `unused`, and such as those
    of an indexer, which only ranks."""
    unreached: set[str]
    """The modules whose own parameters are all of that kind: an adapter on one is never trained."""


def find_text_part(model: PreTrainedModel) -> TextPart:
    """Run a few tokens through a model and follow the graph of its log-probs.

    Many tokens are run where a few use a layer of the language model in part only.

    Raises:
        ModelError: if the model cannot run.
    """
    if model.get_output_embeddings() is None:  # no language model, which the probe refuses
        return TextPart(unused=[], without_gradient=set(), unreached=set())
    part = _text_part(model, _FEW_TOKENS)
    whole_layers = tuple(f"{name}." for name in part.unused if name.rpartition(".")[2].isdigit())
    beside = {id(p) for p in model.parameters()} - {
        id(p) for p in language_model(model).parameters()
    }
    in_part_used_layers = (
        name
        for name in part.without_gradient
        if not name.startswith(whole_layers) and id(model.get_parameter(name)) not in beside
    )
    return part if next(in_part_used_layers, None) is None else _text_part(model, _MANY_TOKENS)


def _text_part(model: PreTrainedModel, num_tokens: int) -> TextPart:
    called, reached = _run(model, num_tokens)
    used = set()
    for module in model.modules():
        own = any(id(parameter) in reached for parameter in module.parameters(recurse=False))
        if module in called or own:
            used.add(module)
    used = {m for m in model.modules() if any(inner in used for inner in m.modules())}
    experts = {inner for e in _experts_not_routed_to(model, used) for inner in e.modules()}
    reached |= {id(parameter) for expert in experts for parameter in expert.parameters()}
    unused = list(_outermost_unused(model, "", used | experts))
    without = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and id(parameter) not in reached
    }
    unreached = set()
    for name, module in model.named_modules():
        own = {own for own, _ in module.named_parameters(name, recurse=False)}
        is_within = any(f"{name}.".startswith(f"{outer}.") for outer in unused)
        if is_within or (own and own <= without):
            unreached.add(name)
    return TextPart(unused=unused, without_gradient=without, unreached=unreached)


def _run(model: PreTrainedModel, num_tokens: int) -> tuple[set[nn.Module], set[int]]:
    """The modules that are called on some tokens, and the ids of the parameters that the logits
    depend on."""
    called: set[nn.Module] = set()
    hooks = [m.register_forward_pre_hook(lambda m, _: called.add(m)) for m in model.modules()]
    training = model.training
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    generator = torch.Generator().manual_seed(0)
    weight: Any = model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]  # `find_text_part`
    length = min(num_tokens, longest) if longest > 0 else num_tokens  # XLNet's: -1
    ids = torch.randint(weight.shape[0], (length,), generator=generator)
    try:
        with torch.enable_grad():
            logits = own_logits(model.eval(), ids.to(weight.device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return called, {id(leaf) for leaf in _leaves(logits)}


def own_logits(
    model: PreTrainedModel, input_ids: Int[Tensor, " tokens"]
) -> Float[Tensor, "tokens vocabulary"]:
    """The logits of a text by the model's own forward.

    Raises:
        ModelError: if the model cannot run: settings that no check of the config finds fail here.
    """
    options = {"use_cache": False}
    if hasattr(model.config.get_text_config(), "output_router_logits"):
        options["output_router_logits"] = False  # fails without experts where the config asks
    name = model.config._name_or_path or type(model).__name__
    with (
        explain_loading(name, f"the model {name} cannot run on text alone"),
        rotating(SequenceLengths([len(input_ids)])),
    ):
        return model(input_ids=input_ids[None], **options).logits[0]


def _leaves(output: Tensor) -> Iterator[Tensor]:
    """The leaf tensors of a graph."""
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        nodes += [following for following, _ in node.next_functions]


def _experts_not_routed_to(model: nn.Module, used: set[nn.Module]) -> Iterator[nn.Module]:
    """The unused modules of lists in which others of their class are used."""
    for children in model.modules():
        if isinstance(children, nn.ModuleList):
            kinds = {type(child) for child in children if child in used}
            yield from (c for c in children if c not in used and type(c) in kinds)


def _outermost_unused(module: nn.Module, name: str, used: set[nn.Module]) -> Iterator[str]:
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if next(child.parameters(), None) is None:
            continue
        if child not in used:
            yield path
        elif not isinstance(child, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield from _outermost_unused(child, path, used)


def freeze_without_gradient(model: PreTrainedModel) -> list[str]:
    """Freeze what text does not train: DDP would wait for its gradient.

    Returns:
        `TextPart.unused`.
    """
    part = find_text_part(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in part.without_gradient:
            parameter.requires_grad_(False)
    return part.unused


def shown_names(unused: list[str]) -> str:
    """The names of unused modules for a line of the summary."""
    names = [name.removeprefix("model.") for name in unused]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
