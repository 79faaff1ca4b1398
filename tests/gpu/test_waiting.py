"""A training step does not wait for its device, except where it reads its numbers at the end."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kto_lightning.models.packed_run import CHECKPOINTING
from tests.support.steps import Examples, fit_steps, make_module, step_batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning"),
    pytest.mark.slow,
]

NUM_STEPS, WARMUP = 4, 2
"""Steps before `WARMUP` compile kernels and allocate workspaces, which waits."""
LONG = Examples([(100, 60), (40, 120), (3, 50)], [True, False, True])


@pytest.fixture
def modes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes in which PyTorch was told to watch for waiting. A CPU has none of its own."""
    modes: list[str] = []
    set_mode: Callable[[str], None] = torch.cuda.set_sync_debug_mode

    def recorded(mode: str) -> None:
        modes.append(mode)
        if device.type == "cuda":
            set_mode(mode)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", recorded)
    return modes


def forbid_waiting(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a step after the warm-up raise where it waits, but for `read_step`."""
    step = importlib.import_module("kto_lightning.module")
    read_step, training_step = step.read_step, module.training_step

    def allowed(*arguments: Any, **options: Any) -> Any:
        watched = module.trainer.global_step >= WARMUP
        torch.cuda.set_sync_debug_mode("default")
        result = read_step(*arguments, **options)
        if watched:
            torch.cuda.set_sync_debug_mode("error")
        return result

    def watched_step(batch: Any, batch_idx: int) -> None:
        if module.trainer.global_step >= WARMUP:
            torch.cuda.set_sync_debug_mode("error")
        try:
            training_step(batch, batch_idx)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(step, "read_step", allowed)
    monkeypatch.setattr(module, "training_step", watched_step)


@pytest.mark.parametrize("max_tokens", [10**6, 60], ids=["one", "several"])
@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        ("qwen2", False),
        ("qwen2", True),
        ("mistral", False),
        ("lora", True),
        ("gpt2", False),
        ("gemma2", False),
        ("qwen2_moe", False),
        ("lfm2", False),
        ("padded", False),
    ],
)
def test_forward_backward_and_update_do_not_wait(
    kind: str,
    checkpointing: bool,
    max_tokens: int,
    device: torch.device,
    modes: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = make_module(kind, optimizer="adamw")
    assert module.policy is not None
    if checkpointing:
        module.policy.causal_lm.gradient_checkpointing_enable(CHECKPOINTING)
    forbid_waiting(module, monkeypatch)
    packed = module.policy.shares_prompts
    batch = step_batch(LONG, max_tokens=max_tokens, packed=packed)
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    settings = {"accelerator": accelerator, "devices": 1, "precision": "bf16-mixed"}
    result = fit_steps(module, *[batch] * NUM_STEPS, **settings)
    assert len(result.rows) == NUM_STEPS
    assert modes[-4 * (NUM_STEPS - WARMUP) :] == [
        "error",  # from the step's beginning
        "default",  # in `read_step`
        "error",  # in the optimizer's step
        "default",
    ] * (NUM_STEPS - WARMUP)


@pytest.mark.gpu
def test_waiting_is_seen() -> None:
    total = torch.ones(3, device="cuda").sum()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            total.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
