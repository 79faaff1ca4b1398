"""Building the policy and its reference from their settings."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kto_lightning.distributed import on_any_rank
from kto_lightning.errors import ConfigError, check_one_of
from kto_lightning.models.following import Follow, FollowingReference
from kto_lightning.models.loading import LoadedModel, LoRA, load_model
from kto_lightning.models.model_files import is_adapter, weight_directories
from kto_lightning.models.packing_probe import make_policy
from kto_lightning.models.policy import Policy
from kto_lightning.models.quantization import Quantization, check_quantization
from kto_lightning.models.reference import FrozenReference, Reference, make_reference
from kto_lightning.models.reference_cache import (
    CachedReference,
    ReferenceCache,
    reference_fingerprint,
)
from kto_lightning.models.weights import check_weights_fit

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True, slots=True)
class ModelSettings:
    """The models of a run, and how to load and run them; names as `KTOModule`'s arguments.

    Raises:
        ConfigError: if two of these contradict each other.
    """

    policy: str
    """A directory, a hub id or an adapter directory."""
    reference: str | None
    """Likewise; None: the policy before training."""
    dtype: str | None
    """Of a frozen base's weights, a key of `DTYPES`; None: float32 (bfloat16 with
    `quantization`)."""
    quantization: Quantization | None
    """Of a frozen base's weights; None: `dtype` applies."""
    lora: LoRA | None
    dropout: bool
    activation_checkpointing: bool
    activation_offloading: bool
    reference_cache: str | None
    """A directory; None: no log-probs are cached."""
    follow: Follow | None
    """How the reference follows the policy; None: it is frozen."""
    offload_reference: bool
    """Keep a second model in host memory except while it scores."""
    trust_remote_code: bool
    adapter_base: str | None = None
    """The base of adapter directories; None: the one that their `adapter_config.json` names."""
    shard: Callable[[Policy], None] | None = None
    """The strategy's: shards a policy over all ranks, in place; None: nothing is sharded."""
    rounds_weights: bool = False
    """The strategy's: whether mixed precision rounds the weights, where autocast rounds the inputs
    of products."""

    def __post_init__(self) -> None:
        if self.dtype is not None:
            check_one_of("dtype", self.dtype, DTYPES)
        frozen_base = self.lora is not None or is_adapter(self.policy)
        if self.adapter_base is not None and not any(
            name is not None and is_adapter(name) for name in (self.policy, self.reference)
        ):
            raise ConfigError(
                "--model.adapter_base is for adapter directories, and neither --model.policy nor "
                "--model.reference is one. Remove it."
            )
        if self.dtype == "bfloat16" and not frozen_base:
            raise ConfigError(
                "--model.dtype bfloat16 is for a frozen base: updates of a small learning rate are "
                "rounded away in bfloat16 weights. Add --model.lora, or keep the weights in "
                "float32 and compute in bfloat16 with --trainer.precision bf16-mixed."
            )
        check_quantization(self.quantization, frozen_base=frozen_base)
        if self.follow is not None and frozen_base:
            raise ConfigError(
                "--model.follow is for full fine-tuning: with an adapter the reference is its "
                "frozen base, which cannot follow. Remove --model.follow, or train all weights."
            )
        if self.follow is not None and self.reference_cache is not None:
            raise ConfigError(
                "--model.reference_cache keeps the log-probs of a frozen reference, and with "
                "--model.follow the reference changes. Remove one of the two."
            )
        if self.offload_reference and self.quantization is not None:
            raise ConfigError(
                "--model.offload_reference cannot move quantized weights. Remove it or "
                "--model.quantization."
            )
        if self.offload_reference and self.shard is not None:
            raise ConfigError(
                "--model.offload_reference moves a whole model, and under this strategy every "
                "device holds only its shard of the reference. Remove it, or use "
                "--trainer.strategy fsdp2_offload."
            )
        if self.offload_reference and frozen_base and self.reference is None:
            raise ConfigError(
                "--model.offload_reference has nothing to move: with an adapter the reference is "
                "the policy's own base, and there is no second model. Remove it."
            )


@dataclass(kw_only=True, slots=True)
class BuiltModels:
    """The models of a run."""

    policy: Policy
    reference: Reference
    padding_reason: str | None
    """Why the policy runs padded; None: it runs packed."""


def check_device(settings: ModelSettings, device: torch.device) -> None:
    """Refuse offloading to host memory where the run computes on the CPU anyway.

    Raises:
        ConfigError: with the option to remove.
    """
    for name in ("activation_offloading", "offload_reference"):
        if getattr(settings, name) and device.type == "cpu":
            raise ConfigError(
                f"--model.{name} moves data from a GPU to host memory, and this run trains on the "
                "CPU. Remove it; --model.activation_checkpointing true saves memory on a CPU too."
            )


def build_models(
    settings: ModelSettings, *, precision: str, reference_keys: Callable[[], set[bytes] | None]
) -> BuiltModels:
    """Load the policy, and the reference where one is needed beside it.

    Args:
        settings: which models.
        precision: the trainer's, part of what addresses a reference cache.
        reference_keys: gives the cache keys of all reference log-probs that the run can need, or
            None where that is unknown; called only with a reference cache.
    """
    load = partial(
        load_model,
        dtype=DTYPES[_dtype_name(settings)],
        quantization=settings.quantization,
        trust_remote_code=settings.trust_remote_code,
        given_base=settings.adapter_base,
    )
    loaded = load(settings.policy, lora=settings.lora, dropout=settings.dropout)
    policy, padding_reason = make_policy(loaded.model)
    if settings.shard is not None:
        settings.shard(policy)
    make = partial(_make_reference, settings, policy, loaded, load)
    if settings.reference_cache is None:
        reference = make()
    else:
        agree = {} if settings.shard is None else {"agree": on_any_rank}
        cache = _cache(settings, precision)
        reference = CachedReference(cache, reference_keys(), make, **agree)
    if not policy.packed and padding_reason is None:
        padding_reason = "its reference cannot be packed"
    if settings.activation_checkpointing:
        policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy.offloads_activations = settings.activation_offloading
    return BuiltModels(policy=policy, reference=reference, padding_reason=padding_reason)


def _make_reference(
    settings: ModelSettings, policy: Policy, loaded: LoadedModel, load: Callable[[str], LoadedModel]
) -> Reference:
    reference = make_reference(
        policy,
        loaded,
        policy_name=settings.policy,
        name=settings.reference,
        load=load,
        offloaded=settings.offload_reference,
        shard=settings.shard,
    )
    if settings.follow is None:
        return reference
    assert isinstance(reference, FrozenReference)
    return FollowingReference(reference, settings.follow, policy)


def load_policy_from_checkpoint(
    checkpoint: dict[str, Any], *, trust_remote_code: bool, adapter_base: str | None = None
) -> Policy:
    """Build the policy as before training and load a checkpoint's weights into it.

    Args:
        checkpoint: its `state_dict`, and its `kto` as `policy_origin` makes it.
        trust_remote_code: run code that comes with the model. What the checkpoint says of this
            does not count: a file must not decide what code runs.
        adapter_base: of a policy that was an adapter; None: the base it was trained on.

    Raises:
        ConfigError: if the checkpoint does not hold the weights of its policy.
        ModelError: if that policy cannot be loaded.
    """
    origin = checkpoint["kto"]
    loaded = load_model(
        origin["policy"],
        dtype=DTYPES[origin["dtype"] or "float32"],
        lora=LoRA(**origin["lora"]) if origin["lora"] else None,
        trust_remote_code=trust_remote_code,
        given_base=adapter_base or origin.get("adapter_base"),
    )
    policy = Policy(loaded.model, packed=False)
    whole = nn.ModuleDict({"policy": policy})  # the names in a checkpoint begin with it
    check_weights_fit(checkpoint, whole)
    whole.load_state_dict(checkpoint["state_dict"], strict=False)
    return policy


def _cache(settings: ModelSettings, precision: str) -> ReferenceCache:
    """The cache of this reference, addressed by what decides its log-probs."""
    assert settings.reference_cache is not None
    directories = weight_directories(settings.reference or settings.policy, settings.adapter_base)
    numerics: tuple[str, ...] = (_dtype_name(settings), precision)
    if settings.quantization is not None:
        numerics += (settings.quantization,)
    if settings.rounds_weights and precision != "32-true":
        numerics += ("sharded",)
    fingerprint = reference_fingerprint(directories, numerics)
    return ReferenceCache(Path(settings.reference_cache) / fingerprint)


def _dtype_name(settings: ModelSettings) -> str:
    """Of what is not quantized, and of the products with what is; of all weights without."""
    return settings.dtype or ("float32" if settings.quantization is None else "bfloat16")
