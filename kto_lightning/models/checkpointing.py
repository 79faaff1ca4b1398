"""Whether a model computes its layers' activations a second time in backward."""

from torch import nn


def checkpoints_activations(model: nn.Module) -> bool:
    """Whether activation checkpointing is on in any layer.

    Read off the layers: transformers' own property has another name from one version to another.
    """
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
