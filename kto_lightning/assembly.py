"""What a step is made of, put together by name: the policy, and the reference it is held to."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kto_lightning.errors import ConfigError
from kto_lightning.models import LoRA, is_adapter, load_model, weight_directories
from kto_lightning.optimization import require_one_of
from kto_lightning.packing_probe import make_policy
from kto_lightning.policy import Policy
from kto_lightning.reference import Reference, make_reference
from kto_lightning.reference_cache import (
    CachedReference,
    ReferenceCache,
    reference_fingerprint,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True, slots=True)
class Recipe:
    """Which models are asked for, and how they are to be loaded."""

    policy: str
    """A directory, a hub id or an adapter directory."""
    reference: str | None
    """The same; None: the policy as it was."""
    dtype: str | None
    """Of a frozen base's weights, a key of `DTYPES`; None: float32."""
    lora: LoRA | None
    dropout: bool
    activation_checkpointing: bool
    reference_cache: str | None
    """A directory; None: no log-prob is kept."""
    precision: str
    """The trainer's, which decides the reference's log-probs too."""
    trust_remote_code: bool


@dataclass(kw_only=True, slots=True)
class Assembly:
    """The models of a run."""

    policy: Policy
    reference: Reference
    packing_obstacle: str | None
    """Why the policy runs padded; None: it runs packed."""


def check_dtype(name: str | None, *, policy: str, lora: LoRA | None) -> None:
    """Refuse weights in which training would be lost, before anything is loaded.

    Raises:
        ConfigError: if there is no such dtype, or it is bfloat16 and all weights are trained.
    """
    if name is not None:
        require_one_of("dtype", name, DTYPES)
    if name == "bfloat16" and lora is None and not is_adapter(policy):
        raise ConfigError(
            "--model.dtype bfloat16 is for a frozen base: steps of a small learning rate are "
            "lost in bfloat16 weights. Add --model.lora, or leave the weights in float32 and "
            "compute in bfloat16 with --trainer.precision bf16-mixed."
        )


def assemble(recipe: Recipe, reference_keys: Callable[[], set[bytes]]) -> Assembly:
    """Load the policy, and the reference where one is needed beside it.

    Args:
        recipe: what is asked for.
        reference_keys: tells the keys of all reference log-probs that the run can ask for; called
            only where there is a reference cache.
    """
    load = partial(
        load_model,
        dtype=DTYPES[recipe.dtype or "float32"],
        trust_remote_code=recipe.trust_remote_code,
    )
    loaded = load(recipe.policy, lora=recipe.lora, dropout=recipe.dropout)
    policy, obstacle = make_policy(loaded.model)
    make = partial(
        make_reference,
        *(policy, loaded),
        policy_name=recipe.policy,
        name=recipe.reference,
        load=load,
    )
    reference: Any = make() if recipe.reference_cache is None else None
    if reference is None:
        reference = CachedReference(_cache(recipe), reference_keys(), make)
    if not policy.packed and obstacle is None:
        obstacle = "its reference cannot be packed"
    if recipe.activation_checkpointing:
        policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    return Assembly(policy=policy, reference=reference, packing_obstacle=obstacle)


def _cache(recipe: Recipe) -> ReferenceCache:
    """The cache of this reference, addressed by what decides its log-probs."""
    assert recipe.reference_cache is not None
    directories = weight_directories(recipe.reference or recipe.policy)
    settings = (recipe.dtype or "float32", recipe.precision)
    fingerprint = reference_fingerprint(directories, settings)
    return ReferenceCache(Path(recipe.reference_cache) / fingerprint)
