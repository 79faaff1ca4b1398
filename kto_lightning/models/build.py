"""What a step is made of, put together by name: the policy, and the reference it is held to."""

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
from kto_lightning.models.loading import (
    LoadedModel,
    LoRA,
    is_adapter,
    load_model,
    weight_directories,
)
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
class Recipe:
    """Which models are asked for, and how they are to be loaded and run.

    Raises:
        ConfigError: if two of these contradict each other.
    """

    policy: str
    """A directory, a hub id or an adapter directory."""
    reference: str | None
    """The same; None: the policy as it was."""
    dtype: str | None
    """Of a frozen base's weights, a key of `DTYPES`; None: float32."""
    quantization: Quantization | None
    """Of a frozen base's weights; None: as `dtype` says."""
    lora: LoRA | None
    dropout: bool
    activation_checkpointing: bool
    activation_offloading: bool
    reference_cache: str | None
    """A directory; None: no log-prob is kept."""
    follow: Follow | None
    """How the reference follows the policy; None: it stays what it is."""
    offload_reference: bool
    """Keep a second model in the host's memory while it is not asked."""
    trust_remote_code: bool
    shard: Callable[[Policy], None] | None = None
    """Spreads a policy over all ranks, in place; None: every rank has the whole."""
    rounds_weights: bool = False
    """Whether mixed precision then rounds weights, where autocast rounds what products take in."""

    def __post_init__(self) -> None:
        if self.dtype is not None:
            check_one_of("dtype", self.dtype, DTYPES)
        frozen_base = self.lora is not None or is_adapter(self.policy)
        if self.dtype == "bfloat16" and not frozen_base:
            raise ConfigError(
                "--model.dtype bfloat16 is for a frozen base: steps of a small learning rate are "
                "lost in bfloat16 weights. Add --model.lora, or leave the weights in float32 and "
                "compute in bfloat16 with --trainer.precision bf16-mixed."
            )
        check_quantization(self.quantization, frozen_base=frozen_base)
        if self.follow is not None and frozen_base:
            raise ConfigError(
                "--model.follow is for full fine-tuning: with an adapter the reference is its "
                "frozen base, which all that is trained stands on. Leave --model.follow out, or "
                "train all weights."
            )
        if self.follow is not None and self.reference_cache is not None:
            raise ConfigError(
                "--model.reference_cache keeps the log-probs of a reference that stays as it is, "
                "and with --model.follow it changes. Leave one of the two out."
            )
        if self.offload_reference and self.quantization is not None:
            raise ConfigError(
                "--model.offload_reference does not move quantized weights. Leave one of it and "
                "--model.quantization out."
            )
        if self.offload_reference and self.shard is not None:
            raise ConfigError(
                "--model.offload_reference moves a whole model, and under this strategy every "
                "device holds only its share of the reference. Leave it out."
            )
        if self.offload_reference and frozen_base and self.reference is None:
            raise ConfigError(
                "--model.offload_reference has nothing to move: with an adapter the reference is "
                "the policy's own base, and there is no second model. Leave it out."
            )


@dataclass(kw_only=True, slots=True)
class Assembly:
    """The models of a run."""

    policy: Policy
    reference: Reference
    packing_obstacle: str | None
    """Why the policy runs padded; None: it runs packed."""


def check_device(recipe: Recipe, device: torch.device) -> None:
    """Refuse to move to the host's memory what is there already, before anything is loaded.

    Raises:
        ConfigError: if the run trains on the CPU and asks for it.
    """
    for name in ("activation_offloading", "offload_reference"):
        if getattr(recipe, name) and device.type == "cpu":
            raise ConfigError(
                f"--model.{name} frees memory of a device by using the host's, and this run has no "
                "other than the host's. Leave it out; --model.activation_checkpointing saves "
                "memory here too."
            )


def assemble(
    recipe: Recipe, *, precision: str, reference_keys: Callable[[], set[bytes] | None]
) -> Assembly:
    """Load the policy, and the reference where one is needed beside it.

    Args:
        recipe: what is asked for.
        precision: the trainer's, which decides the reference's log-probs too.
        reference_keys: tells the keys of all reference log-probs that the run can ask for, or None
            where that is not known; called only where there is a reference cache.
    """
    load = partial(
        load_model,
        dtype=DTYPES[_dtype_name(recipe)],
        quantization=recipe.quantization,
        trust_remote_code=recipe.trust_remote_code,
    )
    loaded = load(recipe.policy, lora=recipe.lora, dropout=recipe.dropout)
    policy, obstacle = make_policy(loaded.model)
    if recipe.shard is not None:
        recipe.shard(policy)
    make = partial(_make_reference, recipe, policy, loaded, load)
    if recipe.reference_cache is None:
        reference = make()
    else:
        agree = {} if recipe.shard is None else {"agree": on_any_rank}
        cache = _cache(recipe, precision)
        reference = CachedReference(cache, reference_keys(), make, **agree)
    if not policy.packed and obstacle is None:
        obstacle = "its reference cannot be packed"
    if recipe.activation_checkpointing:
        policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy.offloads_activations = recipe.activation_offloading
    return Assembly(policy=policy, reference=reference, packing_obstacle=obstacle)


def _make_reference(
    recipe: Recipe, policy: Policy, loaded: LoadedModel, load: Callable[[str], LoadedModel]
) -> Reference:
    reference = make_reference(
        policy,
        loaded,
        policy_name=recipe.policy,
        name=recipe.reference,
        load=load,
        offloaded=recipe.offload_reference,
        shard=recipe.shard,
    )
    if recipe.follow is None:
        return reference
    assert isinstance(reference, FrozenReference)
    return FollowingReference(reference, recipe.follow, policy)


def load_policy_from_checkpoint(checkpoint: dict[str, Any]) -> Policy:
    """The policy as it was before training, then with a checkpoint's weights.

    Args:
        checkpoint: its `state_dict`, and its `kto` as `KTOModule.origin` tells.
    """
    origin = checkpoint["kto"]
    loaded = load_model(
        origin["policy"],
        dtype=DTYPES[origin["dtype"] or "float32"],
        lora=LoRA(**origin["lora"]) if origin["lora"] else None,
        trust_remote_code=origin["trust_remote_code"],
    )
    policy = Policy(loaded.model, packed=False)
    whole = nn.ModuleDict({"policy": policy})  # the names in a checkpoint begin with it
    check_weights_fit(checkpoint, whole)
    whole.load_state_dict(checkpoint["state_dict"], strict=False)
    return policy


def _cache(recipe: Recipe, precision: str) -> ReferenceCache:
    """The cache of this reference, addressed by what decides its log-probs."""
    assert recipe.reference_cache is not None
    directories = weight_directories(recipe.reference or recipe.policy)
    settings: tuple[str, ...] = (_dtype_name(recipe), precision)
    if recipe.quantization is not None:
        settings += (recipe.quantization,)
    if recipe.rounds_weights and precision != "32-true":
        settings += ("sharded",)
    fingerprint = reference_fingerprint(directories, settings)
    return ReferenceCache(Path(recipe.reference_cache) / fingerprint)


def _dtype_name(recipe: Recipe) -> str:
    """Of what is not quantized, and of the products with what is; of all weights without."""
    return recipe.dtype or ("float32" if recipe.quantization is None else "bfloat16")
