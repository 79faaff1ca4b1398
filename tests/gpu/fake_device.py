"""A forward on a device that does not exist: shows tensors left on the CPU, and waiting.

    python -m tests.gpu.fake_device qwen2 lora lfm2

Tensors have a shape and a device and no data (`FakeTensorMode`). An operation on tensors of two
devices fails, and so does whatever reads a value, for which a real device would be waited for.
PyTorch's build for CPUs cannot index CUDA tensors, so the device is one of a backend that is
registered here, for the whole process. Weights in bfloat16 take the variable-length kernel, as on a
GPU. There is no backward, which needs a device. Prints a line for each kind of `make_module`; the
exit status is 1 if one failed.
"""

import dataclasses
import functools
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

from kto_lightning.models import attention
from kto_lightning.models.reference import FrozenReference
from kto_lightning.module import KTOModule
from kto_lightning.training.metrics import BatchSums
from kto_lightning.training.scoring import BatchScorer
from tests.support.steps import make_module, step_batch

DEVICE = torch.device("privateuseone:0")
MODE = FakeTensorMode()


class Backend(_DummyBackendModule):
    """What PyTorch asks of a backend's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def register_device() -> torch.library.Library:
    """Register the backend, for as long as what is returned is there."""
    _setup_privateuseone_for_python_backend(backend_module=Backend())
    autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    autocast.fallback(torch.library.fallthrough_kernel)
    MODE.may_turn_const = lambda t: False  # else constants are moved with their data
    return autocast


def fake(value: Any) -> Any:
    """A tensor of the same shape on the device, in bfloat16 for a floating-point one; a dataclass
    of them; or anything else as it is."""
    if isinstance(value, Tensor):
        dtype = torch.bfloat16 if value.is_floating_point() else value.dtype
        with MODE:
            return torch.empty(value.shape, dtype=dtype, device=DEVICE)
    if isinstance(value, list):
        return [fake(item) for item in value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {f.name: fake(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return dataclasses.replace(value, **fields)


def move(model: nn.Module) -> None:
    """Give a model's tensors for others on the device."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                moved = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = moved
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = fake(buffer)


def use_varlen_everywhere() -> list[int]:
    """Let attention take the variable-length kernel wherever a GPU would; one entry a call."""
    calls: list[int] = []
    varlen_attn: Any = attention.varlen_attn

    @functools.wraps(varlen_attn)  # its signature is read
    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return varlen_attn(*arguments, **options)

    def can_use_varlen(query: Tensor, value: Tensor, dropout: float) -> bool:
        same_size = query.shape[-1] == value.shape[-1] <= 256
        return query.shape[2] > 0 and query.dtype == torch.bfloat16 and same_size and dropout == 0.0

    attention.varlen_attn, attention._can_use_varlen = counted, can_use_varlen
    return calls


def run_forwards(module: KTOModule) -> None:
    """The forwards and losses of a step, in one micro-batch and in several."""
    policy, reference = module.policy, module.reference
    assert policy is not None
    assert isinstance(reference, FrozenReference)
    scorer = BatchScorer(
        policy, reference, beta=0.1, loss_name="kto", sum_over_ranks=lambda values: values
    )
    for max_tokens in (10**6, 30):
        batch = fake(step_batch(max_tokens=max_tokens, packed=policy.shares_prompts))
        scored = scorer.score_for_reference_point(batch.micro_batches)
        sums = BatchSums.zero(DEVICE)
        _, z0 = scorer.reference_point(batch, scored, sums)
        for micro_batch, logps in zip(batch.micro_batches, scored, strict=True):
            whole = scorer.score_matched(micro_batch, logps)
            losses = scorer.compute_losses(micro_batch, whole, z0, sums)
            balance = scorer.auxiliary_loss(micro_batch, whole.policy, batch.num_tokens)
            if (losses.sum() + balance).device != DEVICE:
                raise RuntimeError(f"the loss is on {losses.device}")


def check_the_check() -> None:
    """Make sure that both faults are seen."""

    def mix() -> Tensor:
        return torch.ones(3, device=DEVICE) + torch.ones(3)

    def wait() -> float:
        return torch.ones(3, device=DEVICE).sum().item()

    for faulty in (mix, wait):
        try:
            faulty()
        except Exception:
            continue
        raise SystemExit(f"fake_device: {faulty.__name__} was not seen")


def failure_of(run: Callable[[], None]) -> str | None:
    """The traceback of a run that fails."""
    try:
        run()
    except Exception:
        return traceback.format_exc()
    return None


def main(kinds: list[str]) -> int:
    # Made before the device is registered: drawing weights would ask for its random state.
    modules = {kind: make_module(kind) for kind in kinds}
    kept = register_device()
    calls = use_varlen_everywhere()
    for module in modules.values():
        assert module.policy is not None
        assert isinstance(module.reference, FrozenReference)
        move(module.policy)
        move(module.reference.policy)
    failed = False
    with MODE:
        check_the_check()
        for kind, module in modules.items():
            before = len(calls)
            problem = failure_of(functools.partial(run_forwards, module))
            route = module.policy.route if module.policy else ""
            kernel = " by the variable-length kernel" if len(calls) > before else ""
            print(f"{kind}: {route}{kernel}, {'fails' if problem else 'runs'}")
            if problem:
                failed = True
                print(problem)
    del kept
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
