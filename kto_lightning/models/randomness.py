"""Randomness in a model's own forward: dropout, router noise, skipped layers.

KTO compares log-probs, and noise in them is noise in the rewards. So all of it is off unless it is
asked for: the rates of dropout are set to 0, and whatever else a module does in training only is
switched off with the mode itself.
"""

import copy

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

_RESCALES = "layers_are_rescaled"
_OTHER_IN_TRAINING = ("A_log", _RESCALES, "attention_seed")
"""Attributes of state-space mixers, which have a fused kernel for training; of RWKV, see
`keep_weights`; and of Reformer's layers, which have a backward in training."""


def disable_dropout(model: nn.Module) -> None:
    """Disable every dropout of a model, including that of its adapters."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        # Functional dropouts get their rate from an attribute: `dropout`, `attention_dropout`, ….
        _zero_rates(module)
        config = getattr(module, "config", None)
        if isinstance(module, GradientCheckpointingLayer) and isinstance(config, PreTrainedConfig):
            # Falcon's layers read the rates from the config, which is exported as it is.
            own = copy.copy(config)
            _zero_rates(own)
            vars(module)["config"] = own


def _zero_rates(holder: nn.Module | PreTrainedConfig) -> None:
    for name, rate in vars(holder).items():
        if "drop" in name and isinstance(rate, float):
            vars(holder)[name] = 0.0


def train_without_randomness(model: nn.Module) -> None:
    """Switch from training to evaluation whatever need not be in training to compute the same.

    Router noise (PhiMoE, Mixtral) has no rate that could be set to 0: PhiMoE's is a threshold of
    its routing in evaluation too.
    """
    for name, module in model.named_modules():
        if module is not model:  # only its decoder runs
            module.training = ".lora_dropout." in name or _needs_training_mode(module)


def keep_weights(model: nn.Module) -> None:
    """Leave in training what rescales its weights in place in evaluation (RWKV): between a forward
    and its backward, and before they are exported, they must stay as they are."""
    for module in model.modules():
        if hasattr(module, _RESCALES):
            module.training = True


def _needs_training_mode(module: nn.Module) -> bool:
    """Whether a module checkpoints activations in training only, as layers do, or has one of
    `_OTHER_IN_TRAINING`."""
    if isinstance(module, GradientCheckpointingLayer):
        return True
    if any(hasattr(module, attribute) for attribute in _OTHER_IN_TRAINING):
        return True
    if not hasattr(module, "gradient_checkpointing"):
        return False
    # A model that checkpoints by itself, without such layers.
    return not any(isinstance(inner, GradientCheckpointingLayer) for inner in module.modules())
