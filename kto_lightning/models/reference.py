"""The reference: where the policy started from, never trained. Four kinds behind one protocol.

Here: the policy with its adapter switched off or exchanged for a frozen twin (no second model), and
a frozen copy. Cached and following references wrap these.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from kto_lightning.batches.types import Logps, PackedBatch
from kto_lightning.models.loading import REFERENCE_ADAPTER, LoadedModel, adapter_base
from kto_lightning.models.packing_probe import make_policy
from kto_lightning.models.policy import Policy

_AS_IT_WAS = "a frozen copy of the policy as it was"


def reshard(policy: Policy) -> None:
    """Let go of gathered weights under FSDP2, whose root keeps its own after a forward without a
    backward."""
    if isinstance(policy, FSDPModule):
        policy.reshard()


@runtime_checkable
class Reference(Protocol):
    """What says log π_ref of a micro-batch."""

    description: str
    """For the summary: which model this is."""

    def logps(self, batch: PackedBatch, *, matched: bool = True, mismatched: bool = True) -> Logps:
        """Score the completions asked for, as `Policy.forward` does, without a gradient."""
        ...

    def to(self, device: torch.device) -> None:
        """Go where the policy is."""
        ...


class FrozenReference:
    """A second model that stays as it is.

    Not a submodule of whatever holds it: it belongs to no optimizer and no checkpoint, so moving it
    to a device is this class's own business.

    Args:
        policy: the second model.
        description: for the summary.
        name: what it was loaded by; None: it is a copy of the policy.
        offloaded: keep it in the host's memory, and on the device only while it scores.
    """

    def __init__(
        self,
        policy: Policy,
        description: str,
        *,
        name: str | None = None,
        offloaded: bool = False,
    ) -> None:
        self.policy = policy.requires_grad_(False).eval()
        self.description = description
        self.name, self.offloaded = name, offloaded
        self._device: torch.device | None = None
        """Where it scores, if it is not there all the time."""

    @classmethod
    def copy_of(cls, policy: Policy, *, offloaded: bool = False) -> "FrozenReference":
        """The policy as it is now."""
        return cls(copy.deepcopy(policy), _AS_IT_WAS, offloaded=offloaded)

    def to(self, device: torch.device) -> None:
        if isinstance(self.policy, FSDPModule):
            return  # sharding has put every shard where it belongs
        if not self.offloaded or device.type == "cpu":
            self.policy.to(device)
            return
        self._device = device
        for tensor in _tensors(self.policy):
            # From page-locked memory a device reads at the bus's speed, and nobody waits for it.
            tensor.data = tensor.data.cpu().pin_memory()

    @torch.no_grad()
    def logps(self, batch: PackedBatch, *, matched: bool = True, mismatched: bool = True) -> Logps:
        with _on_device(self.policy, self._device):
            return self.policy(batch, matched=matched, mismatched=mismatched)


def _tensors(policy: Policy) -> list[Tensor]:
    return [*policy.parameters(), *policy.buffers()]


@contextmanager
def _on_device(policy: Policy, device: torch.device | None) -> Iterator[None]:
    """Weights on a device for a while; the host's stay, so that none is copied back."""
    if device is None:
        yield
        return
    kept = [(tensor, tensor.data) for tensor in _tensors(policy)]
    for tensor, host in kept:
        tensor.data = host.to(device, non_blocking=True, copy=True)
    try:
        yield
    finally:
        for tensor, host in kept:
            tensor.data = host


class AdapterReference:
    """The policy's own base, without its adapter or with the frozen twin of it.

    Args:
        policy: a policy around a `peft.PeftModel`.
        twin: score with the adapter `REFERENCE_ADAPTER` instead of with none.
    """

    def __init__(self, policy: Policy, *, twin: bool) -> None:
        # Not as a submodule: the policy belongs to the module that trains it.
        self._policy = policy
        self._twin = twin
        self.description = (
            "the given adapter as it was (a second, frozen adapter; no second model)"
            if twin
            else "the base model, adapter switched off (no second model)"
        )

    @torch.no_grad()
    def logps(self, batch: PackedBatch, *, matched: bool = True, mismatched: bool = True) -> Logps:
        training = self._policy.training
        self._policy.eval()  # an adapter's dropout belongs to training
        # Switching sets what requires a gradient, and would set it on gathered weights alone.
        reshard(self._policy)
        try:
            with self._switched():
                logps = self._policy(batch, matched=matched, mismatched=mismatched)
                reshard(self._policy)
                return logps
        finally:
            self._policy.train(training)

    def to(self, device: torch.device) -> None:
        """It is part of the policy and goes with it."""

    def _switched(self) -> AbstractContextManager[None]:
        model: Any = self._policy.model
        return _TwinAdapter(model) if self._twin else model.disable_adapter()


class _TwinAdapter(AbstractContextManager[None]):
    """Use the frozen twin for a while, then the trained adapter again."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._active = model.active_adapter

    def __enter__(self) -> None:
        # Without `inference_mode` peft takes every adapter that it activates for one to train.
        self._model.set_adapter(REFERENCE_ADAPTER, inference_mode=True)

    def __exit__(self, *_: object) -> None:
        self._model.set_adapter(self._active)


def make_reference(
    policy: Policy,
    loaded: LoadedModel,
    *,
    policy_name: str,
    name: str | None,
    load: Callable[[str], LoadedModel],
    offloaded: bool = False,
    shard: Callable[[Policy], None] | None = None,
) -> Reference:
    """The reference of a policy that has just been loaded.

    Args:
        policy: made padded if its reference cannot be packed: one batch serves both.
        loaded: what `policy` was made of.
        policy_name: the name it was loaded by.
        name: the reference's; None: the policy as it was.
        load: loads a model by its name.
        offloaded: keep a second model in the host's memory, see `FrozenReference`.
        shard: spreads a second model over all ranks, as the policy has been.
    """
    if name is None and loaded.adapter is not None:
        return AdapterReference(policy, twin=loaded.adapter == "given")
    if name is None and shard is None:
        return FrozenReference.copy_of(policy, offloaded=offloaded)
    if loaded.adapter == "given" and name == adapter_base(policy_name):
        return AdapterReference(policy, twin=False)
    # A policy that is sharded already cannot be copied: load it again.
    reference, obstacle = make_policy(load(name or policy_name).model)
    if obstacle is not None and policy.packed:
        policy.run_padded()
    description = f"{name}, frozen" if name else _AS_IT_WAS
    frozen = FrozenReference(reference, description, name=name, offloaded=offloaded)
    if shard is not None:
        shard(frozen.policy)
    return frozen


ORIGIN_FILE = "kto_lightning.json"
"""Beside the weights: where they came from, so that rewards are measured against that."""


def remembered_reference(name: str) -> str | None:
    """The reference that a model written by `save_policy` was trained against."""
    try:
        origin = json.loads((Path(name) / ORIGIN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return origin.get("reference") if isinstance(origin, dict) else None
