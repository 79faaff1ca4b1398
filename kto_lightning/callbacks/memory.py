"""Rows of the summary on sharding, offloading and the memory that follows from shapes."""

from collections.abc import Iterator
from dataclasses import fields

import torch
from lightning import Trainer

from kto_lightning.data.datamodule import KTODataModule
from kto_lightning.models.checkpointing import checkpoints_activations
from kto_lightning.models.memory_plan import (
    PROMPT_SHARE,
    MemoryParts,
    MemoryPlan,
    RunShape,
    plan_memory,
)
from kto_lightning.models.model_shape import ModelShape
from kto_lightning.models.reference import FrozenReference
from kto_lightning.models.reference_cache import CachedReference
from kto_lightning.module import KTOModule
from kto_lightning.strategies.fsdp2 import FSDP2

_NAMED_SHARE = 0.05
"""Of the total; smaller parts are named together."""
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def memory_rows(
    trainer: Trainer, module: KTOModule, data: KTODataModule
) -> Iterator[tuple[str, str]]:
    """Name and text of each row: of the options that apply, and of the memory."""
    assert module.policy is not None
    run, second = run_shape(trainer, module, data), _second_model(module)
    on_gpu = trainer.strategy.root_device.type == "cuda"
    if run.is_sharded:
        models = "policy" if second is None else "policy and reference"
        ranks = "devices" if on_gpu else "processes"
        yield "sharding", _sharding(models, run, trainer.num_nodes, ranks)
    if run.is_offloaded:
        yield "offload", "shards and the optimizer step, in host memory"
    if run.checkpoints_activations or run.offloads_activations:
        yield "activations", _activations(run)
    reference = None if second is None else ModelShape.of(second.policy)
    plan = plan_memory(ModelShape.of(module.policy), run, reference)
    yield "memory", describe(plan, on_gpu=on_gpu)


def run_shape(trainer: Trainer, module: KTOModule, data: KTODataModule) -> RunShape:
    """What decides a run's memory beside its models."""
    assert module.policy is not None
    strategy, second = trainer.strategy, _second_model(module)
    device = strategy.root_device
    on_gpu = device.type == "cuda"
    sharded = strategy if isinstance(strategy, FSDP2) else None
    return RunShape(
        num_ranks=trainer.world_size,
        num_replicas=1 if sharded is None else sharded.num_replicas,
        is_sharded=sharded is not None,
        is_offloaded=sharded is not None and sharded.offloads,
        half=str(trainer.precision).startswith("bf16"),
        optimizer=module.optimization.optimizer,
        offloads_reference=second is not None and second.offloaded,
        checkpoints_activations=checkpoints_activations(module.policy.causal_lm),
        offloads_activations=module.policy.offloads_activations,
        max_tokens=_max_tokens(data, trainer.world_size),
        prompt_share=_prompt_share(data),
        device_memory=torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
    )


def describe(plan: MemoryPlan, *, on_gpu: bool) -> str:
    """A plan in one sentence; on a CPU device and host are one memory."""
    if not on_gpu:
        names = [field.name for field in fields(MemoryParts)]
        both = {name: getattr(plan.device, name) + getattr(plan.host, name) for name in names}
        return _named(MemoryParts(**both), "a process")
    of_device = _named(plan.device, "a device")
    if not plan.host.total:
        return of_device
    return f"{of_device}; {_named(plan.host, 'of host memory a process')}"


def _named(parts: MemoryParts, where: str) -> str:
    size, unit = next((one for one in _UNITS if parts.total >= one[0]), _UNITS[-1])
    sizes = {field.name: getattr(parts, field.name) for field in fields(parts)}
    named = {name: part for name, part in sizes.items() if part >= _NAMED_SHARE * parts.total}
    named["others"] = parts.total - sum(named.values())
    listed = ", ".join(f"{name} {part / size:.1f}" for name, part in named.items() if part)
    return f"about {parts.total / size:.1f} {unit} {where} (from shapes): {listed}"


def _sharding(models: str, run: RunShape, num_nodes: int, ranks: str) -> str:
    if run.num_replicas == 1:
        return f"{models} over {run.num_ranks} {ranks}"
    groups = "on {} machines" if run.num_replicas == num_nodes else "in {} groups"
    replicated = f"replicated {groups.format(run.num_replicas)}"
    return f"{models} within {run.num_shards} {ranks}, {replicated}"


def _activations(run: RunShape) -> str:
    kept = "in host memory until backward" if run.offloads_activations else ""
    again = "computed again in backward" if run.checkpoints_activations else ""
    return "; ".join(part for part in (again, kept) if part)


def _second_model(module: KTOModule) -> FrozenReference | None:
    reference = module.reference
    if isinstance(reference, CachedReference):
        reference = reference.reference
    return reference if isinstance(reference, FrozenReference) else None


def _max_tokens(data: KTODataModule, num_ranks: int) -> int:
    """Most tokens of a forward: those of the setting, of a rank's whole share of a batch, or of one
    sequence that is longer than the setting."""
    most, longest = data.batching.max_tokens, data.longest_sequence()
    if longest is None:
        return most
    return max(longest, min(most, longest * -(-data.batching.batch_size // num_ranks)))


def _prompt_share(data: KTODataModule) -> float:
    """Of the tokens, over all records that are trained on."""
    if data.prepared.train_set is None:
        return PROMPT_SHARE
    counts = data.prepared.train_set.counts
    return counts.prompt_tokens / max(1, counts.prompt_tokens + counts.completion_tokens)
