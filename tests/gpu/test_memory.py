"""Memory of a step on a GPU, against the plan of it (`models/memory_plan.py`).

What is there at a time is exact or within a tenth. The plan's total adds up parts whose largest
sizes come at different times, activations before gradients, so that it is an upper bound.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device

from benchmarks.tracked_memory import TrackedMemory
from kto_lightning.models.memory_plan import RunShape, plan_memory
from kto_lightning.models.model_shape import ModelShape
from kto_lightning.models.packed_run import CHECKPOINTING
from kto_lightning.models.policy import Policy
from kto_lightning.training.optimizers import make_optimizer
from tests.support.factories import add_adapter, make_model
from tests.support.steps import Examples, step_batch

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
VOCABULARY = 4000
EXAMPLES = Examples([(120, 200), (180, 140), (100, 120), (40, 124)], [True, False, True, False])
WITHIN = 0.1
"""The tests of the plan have the same for activations."""
ROUNDING = 0.01
"""Of exact parts: the allocator gives each tensor a multiple of 512 bytes."""


@dataclass(slots=True)
class Used:
    """Bytes allocated within `measured`, beyond those before it."""

    now: int = 0
    peak: int = 0


class Meter:
    """Bytes allocated on a GPU, or by operations on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._tracked = device, TrackedMemory()

    @contextmanager
    def measured(self) -> Iterator[Used]:
        """Fills what it gives when the block ends."""
        used = Used()
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            yield used
            used.now = torch.cuda.memory_allocated(self._device) - before
            used.peak = torch.cuda.max_memory_allocated(self._device) - before
            return
        before = self._tracked.alive
        self._tracked.reset_peak()
        with self._tracked:
            yield used
        used.now, used.peak = self._tracked.alive - before, self._tracked.peak - before


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_step_takes_what_is_planned(
    lora: bool, checkpointing: bool, device: torch.device
) -> None:
    model: Any = make_model("llama", vocab_size=VOCABULARY, **WIDE)
    if lora:
        model = add_adapter(model, r=16)
    meter, policy = Meter(device), Policy(model).train()
    with meter.measured() as weights:
        policy.to(device)
    if checkpointing:
        policy.causal_lm.gradient_checkpointing_enable(CHECKPOINTING)
    optimizer = make_optimizer(
        "adamw", policy.named_parameters(), learning_rate=1e-3, weight_decay=0.0
    )
    (batch,) = step_batch(EXAMPLES).micro_batches
    batch = move_data_to_device(batch, device)

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logps = policy(batch).matched
        assert logps is not None
        return logps.sum()

    forward().backward()  # makes the workspaces of the libraries
    optimizer.zero_grad()
    with meter.measured() as kept:
        total = forward()
    del total
    with meter.measured() as gradients:
        forward().backward()
    with meter.measured() as state:
        optimizer.step()
    optimizer.zero_grad()
    with meter.measured() as step:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    on_gpu = device.type == "cuda"
    run = RunShape(
        half=True,
        max_tokens=EXAMPLES.num_tokens,
        prompt_share=sum(EXAMPLES.prompt_lengths) / EXAMPLES.num_tokens,
        checkpoints_activations=checkpointing,
        device_memory=torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
    )
    shape = ModelShape.of(policy)
    planned = plan_memory(shape, run).device
    if on_gpu:
        assert weights.now == pytest.approx(planned.weights, rel=ROUNDING)
    assert gradients.now == pytest.approx(planned.gradients, rel=ROUNDING)
    assert state.now == pytest.approx(planned.optimizer, rel=ROUNDING)
    if not checkpointing:  # of which the plan counts autocast's copies as held throughout
        offloaded = replace(run, offloads_activations=True)
        activations = plan_memory(shape, offloaded).host.activations
        tile = 4 * sum(EXAMPLES.completion_lengths) * VOCABULARY
        expected = activations + planned.gathered + planned.logits - tile
        assert kept.now == pytest.approx(expected, rel=WITHIN)
    during = planned.total - planned.weights - planned.optimizer
    assert gradients.now < step.peak <= during
