"""The reference model that rewards are measured against: its protocol and two of its four kinds.

Here: the policy's base with the adapter disabled or replaced by a frozen copy of it (no second
model), and a frozen second model. `reference_cache.py` and `following.py` build on these.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from kto_lightning.batches.types import Logps, PackedBatch
from kto_lightning.models.loading import LoadedModel
from kto_lightning.models.lora import REFERENCE_ADAPTER
from kto_lightning.models.model_files import is_file
from kto_lightning.models.policy import Policy
from kto_lightning.models.sharding import LoadedPolicy, Shard, copy_shards

_COPY_DESCRIPTION = "a frozen copy of the initial policy"


def reshard(policy: Policy) -> None:
    """Free the weights that FSDP2 has gathered: the root module keeps its own until backward, which
    a forward without gradient does not have. Does nothing without FSDP2."""
    if isinstance(policy, FSDPModule):
        policy.reshard()


@runtime_checkable
class Reference(Protocol):
    """A model that scores a micro-batch's completions with log π_ref."""

    description: str
    """The model in words, for the run's summary."""

    def logps(self, batch: PackedBatch, *, matched: bool = True, mismatched: bool = True) -> Logps:
        """Log-probs of the completions asked for, as from `Policy.forward`, without gradient."""
        ...

    def to(self, device: torch.device) -> None:
        """Move to the policy's device."""
        ...


class FrozenReference:
    """A second model that never changes.

    It is no `nn.Module`, so that no optimizer, checkpoint or strategy finds its weights in the
    module that holds it; hence its own `to`.

    Args:
        policy: the second model.
        description: see `Reference.description`.
        name: the name it was loaded by; None: it is a copy of the policy.
        offloaded: keep it in host memory, and on the device only while it scores.
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
        self.in_checkpoints = False
        """Whether its weights are part of the run's state: it follows the policy, or has done
        so."""
        self._device: torch.device | None = None
        """Offloaded: the device to score on."""

    @classmethod
    def copy_of(cls, policy: Policy, *, offloaded: bool = False) -> "FrozenReference":
        """A copy of the policy with its current weights."""
        return cls(copy.deepcopy(policy), _COPY_DESCRIPTION, offloaded=offloaded)

    def to(self, device: torch.device) -> None:
        if isinstance(self.policy, FSDPModule):
            return  # sharding has placed every shard on its device
        if not self.offloaded or device.type == "cpu":
            self.policy.to(device)
            return
        self._device = device
        for tensor in _tensors(self.policy):
            # Copies from page-locked memory are asynchronous and at the full speed of the bus.
            tensor.data = tensor.data.cpu().pin_memory()

    @torch.no_grad()
    def logps(self, batch: PackedBatch, *, matched: bool = True, mismatched: bool = True) -> Logps:
        with _on_device(self.policy, self._device):
            logps = self.policy(batch, matched=matched, mismatched=mismatched)
        reshard(self.policy)
        return logps


def _tensors(policy: Policy) -> list[Tensor]:
    return [*policy.parameters(), *policy.buffers()]


@contextmanager
def _on_device(policy: Policy, device: torch.device | None) -> Iterator[None]:
    """Copy the weights to a device for the block; None: leave them where they are.

    The host's tensors stay allocated, so that nothing has to be copied back.
    """
    if device is None:
        yield
        return
    on_host = [(tensor, tensor.data) for tensor in _tensors(policy)]
    for tensor, host in on_host:
        tensor.data = host.to(device, non_blocking=True, copy=True)
    try:
        yield
    finally:
        for tensor, host in on_host:
            tensor.data = host


class AdapterReference:
    """The policy's own base, without its adapter or with a frozen copy of the adapter.

    Args:
        policy: a policy around a `peft.PeftModel`.
        frozen_adapter: score with the adapter `REFERENCE_ADAPTER` instead of without any.
    """

    def __init__(self, policy: Policy, *, frozen_adapter: bool) -> None:
        self._policy = policy
        self._frozen_adapter = frozen_adapter
        self.description = (
            "a frozen copy of the given adapter (no second model)"
            if frozen_adapter
            else "the base model, adapter disabled (no second model)"
        )

    @torch.no_grad()
    def logps(self, batch: PackedBatch, *, matched: bool = True, mismatched: bool = True) -> Logps:
        training = self._policy.training
        trained = {name for name, p in self._policy.named_parameters() if p.requires_grad}
        self._policy.eval()  # without the adapter's dropout
        # peft sets `requires_grad` when it switches adapters. Under FSDP2 it has to set it on the
        # sharded parameters, not on gathered ones that are freed afterwards.
        reshard(self._policy)
        try:
            with self._switched_adapter():
                logps = self._policy(batch, matched=matched, mismatched=mismatched)
                reshard(self._policy)
                return logps
        finally:
            self._policy.train(training)
            # peft would train the adapter on a vision tower too, which text does not reach.
            for name, parameter in self._policy.named_parameters():
                if name not in trained:
                    parameter.requires_grad_(False)

    def to(self, device: torch.device) -> None:
        """Do nothing: the weights are the policy's."""

    def _switched_adapter(self) -> AbstractContextManager[None]:
        model = self._policy.model
        assert isinstance(model, PeftModel)
        return _use_frozen_adapter(model) if self._frozen_adapter else model.disable_adapter()


@contextmanager
def _use_frozen_adapter(model: PeftModel) -> Iterator[None]:
    """Activate `REFERENCE_ADAPTER` for the block, then the trained adapter again."""
    active = model.active_adapter
    assert isinstance(active, str)
    # Without `inference_mode` peft makes every adapter that it activates trainable.
    model.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(active)


def make_reference(
    policy: Policy,
    loaded: LoadedModel,
    *,
    name: str | None,
    load: Callable[[str], LoadedPolicy],
    offloaded: bool = False,
    shard: Shard | None = None,
    skeleton: Policy | None = None,
) -> Reference:
    """The reference of a policy that has just been loaded.

    Args:
        policy: switched to the padded route if the reference cannot share prompts, because both
            get the same batches.
        loaded: the model that `policy` wraps.
        name: the reference's; None: the initial policy.
        load: loads a second model by its name.
        offloaded: keep a second model in host memory, see `FrozenReference`.
        shard: shards a second model over all ranks, as it has sharded the policy.
        skeleton: sharded, with `name` None: the policy before it was sharded.
    """
    if name is None and loaded.adapter is not None:
        return AdapterReference(policy, frozen_adapter=loaded.adapter == "given")
    if name is None and shard is None:
        return FrozenReference.copy_of(policy, offloaded=offloaded)
    if loaded.adapter == "given" and name == loaded.base:
        return AdapterReference(policy, frozen_adapter=False)
    if name is None:
        assert skeleton is not None
        reference, shard_of = skeleton, copy_shards(policy)
    else:
        second = load(name)
        reference, shard_of = second.policy, second.shard_of
    if reference.shares_prompts != policy.shares_prompts:
        policy.use_route("padded")
        reference.use_route("padded")
    description = f"{name}, frozen" if name else _COPY_DESCRIPTION
    frozen = FrozenReference(reference, description, name=name, offloaded=offloaded)
    if shard is not None:
        assert shard_of is not None
        shard(frozen.policy, shard_of)
    return frozen


ORIGIN_FILE = "kto_lightning.json"
"""A file beside exported weights: which model, reference, settings and data they come from."""


def recorded_reference(name: str) -> str | None:
    """The reference that an exported model was trained against; None for other models."""
    path = Path(name) / ORIGIN_FILE
    if not is_file(str(path)):  # a pipe would be waited for
        return None
    try:
        origin = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    reference = origin.get("reference") if isinstance(origin, dict) else None
    return reference if isinstance(reference, str) else None
