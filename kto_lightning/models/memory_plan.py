"""Memory of a training run, from shapes alone: bytes per device and per process's host memory.

Weights, gradients, optimizer state and the reference are counted exactly, as the fullest rank holds
them. Activations are those of a decoder layer with two norms, attention and a gated MLP, on the
packed route. With D, A, K, I the widths of hidden states, queries, keys and MLP (`LayerShape`), s
the bytes of the products' type, and per token and layer, autograd keeps

    8 D                      inputs of the two norms, float32
    + 2 n D  (trained base)  normalized inputs; n = 2 where weights are rounded to bfloat16, else 4
    + c s D                  inputs of products; c = 5 if autocast makes a copy for each, else 2
    + s (2 A + 2 K)          queries, keys, values, attended values
    + s A    (no varlen)     attended values again, in the order of the next product's input
    + 4 s I                  gate, its activation, its factor, their product

Backward has gradients of one layer's activations at a time, taken as large as these. With
activation checkpointing only the input of each layer is kept, and one layer at a time is computed
again, while keys and values of the prompts are copied for the mismatched run.

Not counted: the device's context and libraries, fragmentation of the allocator, collective buffers
of NCCL, the tables of quantized weights, router logits and padding of Mixtures of Experts, states
of state-space layers, the batch itself, and Python with the records (host).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from kto_kernels.linear_logps.plan import (
    CPU_BUDGET_MIB,
    CPU_TILE_ELEMENTS,
    CUDA_BUDGET_SHARE,
    MIB,
    Mode,
    Needs,
    choose_mode,
    cuda_tile,
    dispatch_for,
)
from kto_lightning.models.model_shape import ModelShape, ParameterShape, Unit

_FLOAT32, _HALF = 4, 2
_QUANTIZED_FROM = 4096
"""Elements from which bitsandbytes keeps a parameter's optimizer state in 8 bits."""
_BLOCK = 256
"""Elements that share a float32 scale there."""
_SCALAR = 4
"""Bytes of the one number that an optimizer keeps for each parameter."""
PROMPT_SHARE = 0.5
"""Of the tokens, where it is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunShape:
    """What decides a run's memory beside its models."""

    num_ranks: int = 1
    num_replicas: int = 1
    """Groups of ranks with a whole model each, in hybrid sharding."""
    is_sharded: bool = False
    """FSDP2; else every rank holds the whole model, and several are DDP."""
    is_offloaded: bool = False
    """Shards, gradients and optimizer state are in host memory (`CPUOffloadPolicy`)."""
    half: bool = False
    """bf16-mixed; else float32."""
    optimizer: str = "adamw"
    """A name of `training.optimizers.OPTIMIZERS`."""
    offloads_reference: bool = False
    checkpoints_activations: bool = False
    offloads_activations: bool = False
    max_tokens: int = 16384
    """Tokens of a forward."""
    prompt_share: float = PROMPT_SHARE
    device_memory: int | None = None
    """Bytes of a GPU's memory, a share of which the head may use; None: the run is on a CPU."""

    @property
    def num_shards(self) -> int:
        """Ranks over which a model is sharded; 1: it is not."""
        return self.num_ranks // self.num_replicas if self.is_sharded else 1

    @property
    def rounds_weights(self) -> bool:
        """Whether layers have their weights in bfloat16; else autocast rounds the inputs."""
        return self.is_sharded and self.half

    @property
    def itemsize(self) -> int:
        """Bytes of an operand of a product."""
        return _HALF if self.half else _FLOAT32


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryParts:
    """Parts of a memory, in bytes."""

    weights: int = 0
    """The policy's, or a rank's shard of them."""
    gradients: int = 0
    optimizer: int = 0
    """Its state."""
    reference: int = 0
    """Weights of a second model."""
    gathered: int = 0
    """Weights in the type of the products: FSDP2's unsharded embeddings and head and two layers, of
    which one is sent ahead; without it autocast's copies."""
    reduced: int = 0
    """Gradients on their way to other ranks: FSDP2's unsharded ones, DDP's buckets."""
    activations: int = 0
    logits: int = 0
    """What the log-prob head keeps, and its tile."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """The memory of a run's fullest rank."""

    device: MemoryParts
    host: MemoryParts
    """Beside Python, libraries and records; on a CPU the same memory as `device`."""


def plan_memory(
    model: ModelShape, run: RunShape, reference: ModelShape | None = None
) -> MemoryPlan:
    """The memory that a run takes.

    Args:
        model: the policy, with its adapter if it has one.
        run: how it is trained.
        reference: a second model; None: the policy's base without its adapter, or a full cache.
    """
    shards = run.num_shards
    states = {
        "weights": _weights(model.parameters, shards),
        "gradients": _weights(_trained(model.parameters), shards),
        "optimizer": sum(
            optimizer_bytes(run.optimizer, p, shards) for p in _trained(model.parameters)
        ),
    }
    second = 0 if reference is None else _weights(reference.parameters, shards)
    saved, working = _activations(model, run)
    temporary = {
        "gathered": _gathered(model, run),
        "reduced": _reduced(model, run),
        "activations": working + (0 if run.offloads_activations else saved),
        "logits": _logits(model, run),
    }
    host = {"activations": saved} if run.offloads_activations else {}
    if run.is_offloaded:
        return MemoryPlan(
            device=MemoryParts(**temporary),
            host=MemoryParts(**states | {"reference": second} | host),
        )
    if run.offloads_reference:
        # On the device only while it scores, before gradients and activations are there.
        host["reference"] = second
        second = max(0, second - states["gradients"] - sum(temporary.values()))
    device = MemoryParts(**states | temporary | {"reference": second})
    return MemoryPlan(device=device, host=MemoryParts(**host))


def optimizer_bytes(name: str, parameter: ParameterShape, num_shards: int = 1) -> int:
    """The state of one parameter, in bytes.

    Args:
        name: adamw (two float32 moments), sgd (none), adafactor (a row and a column of a matrix),
            adamw_8bit (two 8-bit moments with a scale per block).
    """
    numel = parameter.numel(num_shards)
    if name == "sgd":
        return 0
    if name == "adafactor":
        shape = parameter.shape
        if len(shape) < 2:
            return _FLOAT32 * numel + _SCALAR
        row, column = math.prod(shape[:-1]), math.prod((*shape[:-2], shape[-1]))
        return _FLOAT32 * (row + column) + _SCALAR
    if name == "adamw_8bit" and numel >= _QUANTIZED_FROM:
        return 2 * (numel + _FLOAT32 * math.ceil(numel / _BLOCK))
    return 2 * _FLOAT32 * numel + _SCALAR


def _trained(parameters: Iterable[ParameterShape]) -> Iterable[ParameterShape]:
    return (parameter for parameter in parameters if parameter.is_trained)


def _weights(parameters: Iterable[ParameterShape], num_shards: int) -> int:
    return sum(p.numel(num_shards) * p.itemsize for p in parameters)


def _in_products(unit: Iterable[ParameterShape], run: RunShape) -> int:
    """Bytes of whole weights in the type that FSDP2 gathers them in."""
    return sum(p.numel() * (_HALF if run.half else p.itemsize) for p in unit)


def _largest(units: Iterable[Unit], run: RunShape) -> int:
    return max((_in_products(unit, run) for unit in units), default=0)


def _gathered(model: ModelShape, run: RunShape) -> int:
    *layers, rest = model.units
    if run.is_sharded:
        return _in_products(rest, run) + 2 * _largest(layers, run)
    if not run.half:
        return 0
    copied = [[p for p in unit if len(p.shape) > 1 and p.itemsize == _FLOAT32] for unit in layers]
    copies = [sum(_HALF * p.numel() for p in unit) for unit in copied]
    if model.trains_base or not run.checkpoints_activations:
        return sum(copies)
    return max(copies, default=0)  # autocast keeps copies of trained weights only


def _reduced(model: ModelShape, run: RunShape) -> int:
    if not run.is_sharded:
        return _weights(_trained(model.parameters), 1) if run.num_ranks > 1 else 0
    *layers, rest = [tuple(_trained(unit)) for unit in model.units]
    of_layer = max((_in_products(unit, run) + _sent(unit) for unit in layers), default=0)
    # Gradients of the rest begin with the head's and are complete with the embeddings' at the end.
    return _in_products(rest, run) + max(of_layer, _sent(rest))


def _sent(unit: Unit) -> int:
    """Bytes of a unit's gradients as they are reduced, float32."""
    return _FLOAT32 * sum(p.numel() for p in unit)


def _activations(model: ModelShape, run: RunShape) -> tuple[int, int]:
    """What a micro-batch keeps until backward, and what backward takes at once beside it."""
    layer, s = model.layer, run.itemsize
    layers = run.max_tokens * _bytes_per_token(model, run)
    last = run.max_tokens * layer.width * (_FLOAT32 + _normalized(model, run))
    if not run.checkpoints_activations:
        return model.num_layers * layers + last, layers
    stream = _HALF if run.rounds_weights else _FLOAT32
    kept = model.num_layers * run.max_tokens * layer.width * stream + last
    prompts = round(run.max_tokens * run.prompt_share)
    stored = model.num_layers * prompts * 2 * layer.keys * s
    return kept, max(2 * layers, stored)


def _normalized(model: ModelShape, run: RunShape) -> int:
    """Bytes of a norm's normalized input, which the gradient of its weight needs."""
    return (_HALF if run.rounds_weights else _FLOAT32) if model.trains_base else 0


def _bytes_per_token(model: ModelShape, run: RunShape) -> int:
    """Activations of a layer, see the module's docstring."""
    layer, s = model.layer, run.itemsize
    by_segment = run.device_memory is None or not run.half
    norms = 2 * layer.width * (_FLOAT32 + _normalized(model, run))
    inputs = s * layer.width * (5 if run.half and not run.rounds_weights else 2)
    attention = s * (2 * layer.queries + 2 * layer.keys + layer.queries * by_segment)
    return norms + inputs + attention + 4 * s * layer.intermediate


def _logits(model: ModelShape, run: RunShape) -> int:
    """The hidden states that predict completions, what their gradient needs, and a tile."""
    tokens = max(1, math.ceil(run.max_tokens * (1 - run.prompt_share)))
    s, vocabulary, width = run.itemsize, model.vocabulary, model.layer.width
    if run.device_memory is None:
        budget, tile = CPU_BUDGET_MIB * MIB, CPU_TILE_ELEMENTS
    else:
        budget = run.device_memory // CUDA_BUDGET_SHARE
        rows, columns = cuda_tile(
            dispatch_for(width), tokens=tokens, vocabulary=vocabulary, memory=run.device_memory
        )
        tile = rows * columns
    needs = Needs(hidden=True, weight=model.trains_head, bias=False)
    mode = choose_mode(needs, tokens=tokens, vocabulary=vocabulary, itemsize=s, budget=budget)
    kept = tokens * vocabulary * s if mode is Mode.KEPT else 0
    # A trained head keeps the hidden states; a frozen one their gradient, in the products' type.
    hidden = _FLOAT32 if model.trains_head and not run.rounds_weights else s
    return tokens * width * hidden + kept + _FLOAT32 * min(tile, tokens * vocabulary)
