"""Memory per GPU of 7B and 70B models under every strategy, from shapes alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from inputs import SHAPES, make_config
from transformers import AutoConfig, PretrainedConfig

from kto_lightning.models.lora import LoRA
from kto_lightning.models.memory_plan import MemoryPlan, RunShape, plan_memory
from kto_lightning.models.model_shape import ModelShape, policy_on_meta

GIB = 2**30
CONFIGS: dict[str, PretrainedConfig] = {
    "Qwen2.5-7B": make_config(SHAPES["qwen2.5-7b"]),
    "Llama-3.1-70B": AutoConfig.for_model(
        "llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
    ),
}
"""Shapes of published models, from their configs."""
RUN = RunShape(half=True, checkpoints_activations=True, max_tokens=8192, device_memory=80 * GIB)
"""As configs/fsdp2_8gpu.yaml, on GPUs of 80 GiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What is trained, and the type of the frozen base."""

    name: str
    lora: LoRA | None = None
    dtype: torch.dtype = torch.float32


TRAININGS = (
    Training(name="full"),
    Training(name="LoRA, base in bfloat16", lora=LoRA(r=16), dtype=torch.bfloat16),
)


MACHINE = 8
"""GPUs of a machine."""


def strategies(gpus: int) -> Iterator[tuple[str, RunShape]]:
    """The strategies by name; hybrid sharding needs several machines."""
    sharded = replace(RUN, num_ranks=gpus, is_sharded=True)
    hybrid = replace(sharded, num_replicas=gpus // MACHINE)
    yield "ddp", replace(RUN, num_ranks=gpus)
    yield "fsdp2", sharded
    yield "fsdp2_offload", replace(sharded, is_offloaded=True)
    if gpus > MACHINE:
        yield "fsdp2_hybrid", hybrid
        yield "fsdp2_hybrid_offload", replace(hybrid, is_offloaded=True)


def memory_table() -> list[dict[str, str]]:
    """A row per model, training and strategy, in GiB per GPU and, after a plus, of host memory per
    process."""
    return [
        row
        for name, config in CONFIGS.items()
        for training in TRAININGS
        for row in _rows(name, config, training)
    ]


def _rows(name: str, config: PretrainedConfig, training: Training) -> Iterator[dict[str, str]]:
    model = ModelShape.of(policy_on_meta(config, lora=training.lora, dtype=training.dtype))
    reference = model if training.lora is None else None
    on_one, on_two = dict(strategies(MACHINE)), dict(strategies(2 * MACHINE))
    for strategy, run in on_two.items():
        device = plan_memory(model, run, reference).device
        during = device.gathered + device.reduced + device.activations + device.logits
        few = on_one.get(strategy)
        yield {
            "model": name,
            "trained": training.name,
            "strategy": strategy,
            "8 GPUs": "–" if few is None else _as_text(plan_memory(model, few, reference)),
            "16 GPUs": _as_text(plan_memory(model, run, reference)),
            "of it during a step": f"{during / GIB:.1f}",
        }


def _as_text(plan: MemoryPlan) -> str:
    host = f" + {plan.host.total / GIB:.1f}" if plan.host.total else ""
    return f"{plan.device.total / GIB:.1f}{host}"
