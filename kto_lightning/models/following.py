"""A reference that follows the policy (TR-DPO, arXiv:2404.09656).

After every n-th optimizer step π_ref ← α π_θ + (1 − α) π_ref, weight by weight: the paper's soft
update, or with α = 1 its hard update. The reference then is part of the run's state.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from kto_lightning.errors import ConfigError, check_count, check_number
from kto_lightning.models.policy import Policy
from kto_lightning.models.reference import FrozenReference, Reference, reshard
from kto_lightning.sharded_checkpoint import ShardedHeader, read_tensors

CHECKPOINT_KEY = "reference"


@dataclass(kw_only=True, slots=True)
class Follow:
    """When and how far a reference moves towards the policy."""

    every_n_steps: int = 512
    """Optimizer steps from one update of the reference to the next."""
    alpha: float = 0.6
    """The policy's weight in an update, above 0 and at most 1; 1 copies the policy."""

    def __post_init__(self) -> None:
        check_count("--model.follow.every_n_steps", self.every_n_steps)
        check_number("follow.alpha", self.alpha, above=0.0, most=1.0)

    def __str__(self) -> str:
        often = "every step" if self.every_n_steps == 1 else f"every {self.every_n_steps} steps"
        return f"{often}, alpha {self.alpha:g}"


class FollowingReference(FrozenReference):
    """A second model whose weights move towards the policy's.

    Args:
        start: the second model at the start of the run.
        follow: when and how far its weights move.
        policy: the policy it follows.

    Raises:
        ConfigError: if the two models do not have the same weights.
    """

    def __init__(self, start: FrozenReference, follow: Follow, policy: Policy) -> None:
        subject = "a copy that" if start.name is None else f"{start.name}, which"
        description = f"{subject} follows the policy: {follow}"
        super().__init__(start.policy, description, name=start.name, offloaded=start.offloaded)
        self.follow, self.in_checkpoints = follow, True
        own, new = _shapes(self.policy), _shapes(policy)
        odd = sorted(dict(own.items() ^ new.items()))
        if odd:
            raise ConfigError(
                "--model.follow mixes the policy's weights into the reference's, but --model."
                f"reference {start.name} has others than the policy ({len(odd)} do not fit, "
                f"for example {odd[0]}). Give a reference of the policy's shape, or only one of "
                "the two options."
            )

    def warnings(self, num_steps: int) -> list[str]:
        """Warnings about a run of that many steps: one if the reference would never change."""
        every = self.follow.every_n_steps
        if every <= num_steps:
            return []
        return [
            f"--model.follow.every_n_steps {every} is more than the {num_steps} steps of this run, "
            "in which the reference never changes. Lower it."
        ]

    @torch.no_grad()
    def after_step(self, step: int, policy: Policy) -> None:
        """Update the weights, if `step` is a multiple of `every_n_steps`.

        Args:
            step: completed optimizer steps of the whole run.
            policy: the policy after that step.
        """
        if step % self.follow.every_n_steps:
            return
        reshard(policy)
        pairs = zip(self.policy.parameters(), policy.parameters(), strict=True)
        for own, new in pairs:  # a tied weight comes once
            own.lerp_(new.to(own.device), self.follow.alpha)


def _shapes(policy: Policy) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in policy.named_parameters()}


def reference_state(reference: Reference | None) -> dict[str, Any]:
    """Entries of a checkpoint: the weights of a reference that follows the policy or has, else
    none.

    Under FSDP2 every rank gets its shards.
    """
    if not isinstance(reference, FrozenReference) or not reference.in_checkpoints:
        return {}
    return {CHECKPOINT_KEY: get_model_state_dict(reference.policy)}


def restore_reference(
    checkpoint: dict[str, Any],
    reference: Reference | None,
    *,
    requested: str | None,
    resuming: bool,
) -> None:
    """Load the weights of a reference that followed the policy, if the checkpoint has them.

    Outside training, a `requested` reference other than the one that the run started with replaces
    the checkpoint's, and nothing is loaded. A run that is resumed needs the checkpoint's, which may
    follow the policy no longer.

    Args:
        checkpoint: as `fit` writes it.
        reference: the reference as this run has loaded it.
        requested: the resolved name of the reference in this run's settings; None: none is set.
        resuming: whether the run is trained further.

    Raises:
        ConfigError: if these settings do not allow the checkpoint's reference.
    """
    state = checkpoint.get(CHECKPOINT_KEY)
    if state is None:
        return
    origin = checkpoint["kto"]
    is_another = requested is not None and requested != origin["reference"]
    if is_another and not resuming:
        return
    if is_another:
        raise ConfigError(
            "the checkpoint holds a reference that follows the policy, which started as "
            f"{origin['reference']} (--model.follow {origin['follow']}). Give the same "
            "--model.reference, or start a new run from the exported model."
        )
    if not isinstance(reference, FrozenReference):
        raise ConfigError(
            "the checkpoint holds a reference that followed the policy, whose log-probs are in no "
            "cache. Remove --model.reference_cache."
        )
    if isinstance(checkpoint, ShardedHeader):
        own: dict[str, Any] = get_model_state_dict(reference.policy)
        named = {f"{CHECKPOINT_KEY}.{name}": value for name, value in own.items()}
        read_tensors(checkpoint.path, named)
    else:
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(reference.policy, state, options=options)
    reference.in_checkpoints = True
    reference.description += ", from the checkpoint"
