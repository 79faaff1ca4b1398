"""Building the policy and its reference from their settings."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kto_lightning.distributed import from_first_rank, on_any_rank
from kto_lightning.errors import ConfigError
from kto_lightning.models.checkpointing import checkpoints_activations
from kto_lightning.models.following import FollowingReference
from kto_lightning.models.loading import LoadedModel, load_model, take_policy
from kto_lightning.models.model_files import weight_directories
from kto_lightning.models.packed_run import CHECKPOINTING
from kto_lightning.models.policy import Policy
from kto_lightning.models.reference import (
    AdapterReference,
    FrozenReference,
    Reference,
    make_reference,
)
from kto_lightning.models.reference_cache import (
    CachedReference,
    ReferenceCache,
    reference_fingerprint,
)
from kto_lightning.models.routes.choose import (
    RouteNeeds,
    make_policy,
)
from kto_lightning.models.routes.runner import RouteName
from kto_lightning.models.settings import DTYPES, ModelSettings
from kto_lightning.models.sharding import LoadedPolicy, load_on_first_rank


@dataclass(kw_only=True, slots=True)
class BuiltModels:
    """The models of a run."""

    policy: Policy
    reference: Reference
    obstacles: dict[RouteName, str]
    """Why the policy does not take each route that is faster than its own."""
    unused: list[str]
    """The policy's modules that text does not reach, which are frozen."""


def build_models(
    settings: ModelSettings,
    *,
    precision: str,
    longest: int | None,
    device: torch.device,
    reference_keys: Callable[[], set[bytes] | None],
) -> BuiltModels:
    """Load the policy, and the reference where one is needed beside it.

    Args:
        settings: which models.
        precision: the trainer's, part of what addresses a reference cache.
        longest: most tokens of a sequence; None: unlimited.
        device: where this rank computes.
        reference_keys: gives the cache keys of all reference log-probs that the run can need, or
            None where that is unknown; called only with a reference cache.
    """
    needs = RouteNeeds(
        route=settings.route,
        longest=longest,
        sharded=settings.shard is not None,
    )
    load = partial(_load, settings, device, needs)
    policy, obstacles, loaded, shard_of = load(settings.policy, is_policy=True)
    route, skeleton = policy.route, None
    if settings.shard is not None:
        assert shard_of is not None
        if settings.reference is None and loaded.adapter is None:
            skeleton = copy.deepcopy(policy)  # of a sharded one there is no copy
        settings.shard(policy, shard_of)
    make = partial(_make_reference, settings, policy, loaded, load, skeleton)
    if settings.reference_cache is None:
        reference = make()
    else:
        agree = {} if settings.shard is None else {"agree": on_any_rank}
        cache = _cache(settings, precision)
        reference = CachedReference(cache, reference_keys(), make, **agree)
    if policy.route != route:
        obstacles[route] = "its reference cannot be run so"
    # A model in memory may have it on in the re-entrant variant, which DDP does not always take.
    if settings.activation_checkpointing or checkpoints_activations(policy.causal_lm):
        _checkpoint_activations(policy)
    policy.offloads_activations = settings.activation_offloading
    return BuiltModels(
        policy=policy, reference=reference, obstacles=obstacles, unused=loaded.unused
    )


def _load(
    settings: ModelSettings,
    device: torch.device,
    needs: RouteNeeds,
    name: str,
    *,
    is_policy: bool = False,
) -> LoadedPolicy:
    """Load the policy or reference, and choose its route."""
    load = partial(_load_here, settings, device, needs, name, is_policy=is_policy)
    if settings.shard is None:
        return load()
    return load_on_first_rank(load, trust_remote_code=settings.trust_remote_code)


def _load_here(
    settings: ModelSettings,
    device: torch.device,
    needs: RouteNeeds,
    name: str,
    *,
    is_policy: bool,
) -> LoadedPolicy:
    random = is_policy and settings.dropout
    options: dict[str, Any] = {"lora": settings.lora, "dropout": random} if is_policy else {}
    given = settings.objects.get("policy" if is_policy else "reference")
    if given is not None:  # is on the device
        loaded = take_policy(given, **options) if is_policy else LoadedModel(model=given)
    else:
        loaded = load_model(
            name,
            dtype=DTYPES[_dtype_name(settings)],
            quantization=settings.quantization,
            trust_remote_code=settings.trust_remote_code,
            given_base=settings.adapter_base,
            **options,
        )
        # For the probe's long sequences; else the strategy or the quantization places it.
        if settings.shard is None and settings.quantization is None:
            loaded.model.to(device)
    policy, obstacles = make_policy(loaded.model, random=random, needs=needs)
    return LoadedPolicy(policy, obstacles, loaded)


def _checkpoint_activations(policy: Policy) -> None:
    model = policy.causal_lm
    # Its name from transformers 5.23 on; before, the other one's.
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, model.gradient_checkpointing_enable)
    try:
        enable(CHECKPOINTING)
    except ValueError as error:
        raise ConfigError(
            f"--model.activation_checkpointing: {type(model).__name__} cannot compute its "
            "activations a second time. Remove it; a lower --data.max_tokens saves memory too."
        ) from error
    # For the re-entrant variant transformers makes the embeddings of a frozen base a leaf that
    # requires a gradient, to which GIT then adds in place.
    if hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()


def _make_reference(
    settings: ModelSettings,
    policy: Policy,
    loaded: LoadedModel,
    load: Callable[[str], LoadedPolicy],
    skeleton: Policy | None,
) -> Reference:
    if settings.objects.get("reference") is policy.causal_lm:  # with an adapter, see `name_models`
        return AdapterReference(policy, frozen_adapter=False)
    reference = make_reference(
        policy,
        loaded,
        name=settings.reference,
        load=load,
        offloaded=settings.offload_reference,
        shard=settings.shard,
        skeleton=skeleton,
    )
    if settings.follow is None:
        return reference
    assert isinstance(reference, FrozenReference)
    return FollowingReference(reference, settings.follow, policy)


def _cache(settings: ModelSettings, precision: str) -> ReferenceCache:
    """The cache of this reference, addressed by what decides its log-probs."""
    assert settings.reference_cache is not None
    numerics: tuple[str, ...] = (_dtype_name(settings), precision)
    if settings.quantization is not None:
        numerics += (settings.quantization,)
    if settings.rounds_weights and precision != "32-true":
        numerics += ("sharded",)
    name = settings.reference or settings.policy
    fingerprint = from_first_rank(
        lambda: reference_fingerprint(weight_directories(name, settings.adapter_base), numerics)
    )
    return ReferenceCache(Path(settings.reference_cache) / fingerprint)


def _dtype_name(settings: ModelSettings) -> str:
    """Of what is not quantized, and of the products with what is; of all weights without."""
    return settings.dtype or ("float32" if settings.quantization is None else "bfloat16")
