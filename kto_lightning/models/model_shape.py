"""Shapes of a model that decide its memory: parameters by unit, and the widths of a layer.

They are read from a policy on any device, `meta` included, and before or after it is sharded.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from kto_lightning.models.lora import LoRA
from kto_lightning.models.lora_layers import add_adapter
from kto_lightning.models.policy import Policy
from kto_lightning.models.units import decoder_layers, sharded_units

_EXPERT_WIDTHS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
_SHARED_WIDTHS = ("shared_expert_intermediate_size", "shared_intermediate_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterShape:
    """One parameter, unsharded."""

    shape: tuple[int, ...]
    itemsize: int
    """Bytes of an element."""
    is_trained: bool

    def numel(self, num_shards: int = 1) -> int:
        """Elements of a rank's shard: FSDP2 cuts the first dimension into equal parts, the last
        padded."""
        if num_shards == 1 or not self.shape:
            return math.prod(self.shape)
        return math.ceil(self.shape[0] / num_shards) * math.prod(self.shape[1:])


Unit = tuple[ParameterShape, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """Widths of a decoder layer, in elements per token."""

    width: int
    """Of the hidden states, D."""
    queries: int
    """Of all query heads together, A."""
    keys: int
    """Of all key heads together, K; values likewise."""
    intermediate: int
    """Of the MLP, I; of a Mixture of Experts the experts that a token runs through, together."""

    @classmethod
    def of(cls, config: PretrainedConfig) -> "LayerShape":
        """From a language model's config. What it does not name is taken from the width: as many
        query heads as make up the width, an MLP of four times the width."""
        width = _number(config, "hidden_size", "n_embd", "d_model") or 1
        heads = _number(config, "num_attention_heads", "n_head") or 1
        head_size = _number(config, "head_dim") or width // heads
        groups = _number(config, "num_key_value_heads") or heads
        active = _number(config, "num_experts_per_tok")
        intermediate = _number(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * width
        if active:
            intermediate = active * (_number(config, *_EXPERT_WIDTHS) or 4 * width)
            intermediate += _number(config, *_SHARED_WIDTHS) or 0
        return cls(
            width=width,
            queries=heads * head_size,
            keys=groups * head_size,
            intermediate=intermediate,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A model's parameters by unit (`units.py`), and its layers."""

    units: tuple[Unit, ...]
    """Every layer that is a unit, then the rest: embeddings, norm and head."""
    layer: LayerShape
    num_layers: int
    vocabulary: int
    trains_base: bool
    """Whether the weights of layers are trained, not an adapter's alone."""
    trains_head: bool

    @classmethod
    def of(cls, policy: Policy) -> "ModelShape":
        """The shape of a policy; sharded parameters count whole."""
        head = policy.causal_lm.get_output_embeddings()
        config: Any = policy.causal_lm.config.get_text_config()
        layers = decoder_layers(policy)
        weights = [p for layer in layers for p in layer.parameters()]
        trained = sum(p.numel() for p in weights if p.requires_grad)
        return cls(
            units=tuple(_units(policy)),
            layer=LayerShape.of(config),
            num_layers=max(len(layers), 1),
            vocabulary=config.vocab_size,
            trains_base=2 * trained > sum(p.numel() for p in weights),
            trains_head=any(p.requires_grad for p in head.parameters()) if head else False,
        )

    @property
    def parameters(self) -> Iterator[ParameterShape]:
        """All parameters, each once."""
        return (parameter for unit in self.units for parameter in unit)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)


def policy_on_meta(
    config: PretrainedConfig, *, lora: LoRA | None = None, dtype: torch.dtype = torch.float32
) -> Policy:
    """The policy of a config without values: on the device `meta`, which takes no memory.

    Args:
        config: a causal language model's.
        lora: a new adapter; None: all weights are trained.
        dtype: of the base's weights; an adapter's are float32.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if lora is not None:
            model = add_adapter(model, lora)
    return Policy(model, route="padded")


def _units(policy: Policy) -> Iterator[Unit]:
    seen: set[int] = set()
    for unit in sharded_units(policy):
        own = [p for p in unit.parameters() if id(p) not in seen]
        seen.update(map(id, own))
        yield tuple(
            ParameterShape(
                shape=tuple(p.shape), itemsize=p.dtype.itemsize, is_trained=p.requires_grad
            )
            for p in own
        )


def _number(config: Any, *names: str) -> int | None:
    """The first of these settings that is a number, or the largest of a list of numbers, one for
    each layer."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)):
            value = max((one for one in value if isinstance(one, int)), default=None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
