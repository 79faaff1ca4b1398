"""The units of a policy: parts that are sharded, sent or written one at a time."""

from collections import Counter

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from kto_lightning.models.architecture import language_model
from kto_lightning.models.policy import Policy


def sharded_units(policy: Policy) -> list[nn.Module]:
    """The parts of a policy that are whole on a device one at a time: every layer, then the policy
    with the rest (embeddings, norm, head).

    The rest includes layers that share weights with another (Zamba), which can be in one unit only.
    """
    uses = _uses(policy).items()
    separable = [layer for layer in decoder_layers(policy) if _uses(layer).items() <= uses]
    return [*separable, policy]


def _uses(module: nn.Module) -> Counter[int]:
    """How often a module has each parameter, by its id."""
    return Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))


def decoder_layers(policy: Policy) -> list[nn.Module]:
    """The layers of the language model: its outermost `ModuleList` with as many entries as its
    config has layers (a layer's list of experts may be as long, and a vision tower's layers).

    Where a config counts otherwise (LongCat-Flash, HRM), the outermost that transformers can
    checkpoint.
    """
    config = policy.causal_lm.config.get_text_config()
    num_layers = getattr(config, "num_hidden_layers", None)
    modules = list(language_model(policy.causal_lm).modules())  # parents before their children
    for module in modules:
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return list(module)
    within: set[nn.Module] = set()
    layers = []
    for module in modules:
        if isinstance(module, GradientCheckpointingLayer) and module not in within:
            layers.append(module)
            within.update(module.modules())
    return layers
