"""A reference that follows the policy (TR-DPO, arXiv:2404.09656): state of a run, never trained.

Every n completed optimizer steps π_ref ← α π_θ + (1 − α) π_ref, weight by weight (their soft
update; with α = 1 their hard one).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from kto_lightning.errors import ConfigError
from kto_lightning.models.policy import Policy
from kto_lightning.models.reference import FrozenReference, Reference, reshard

CHECKPOINT_KEY = "reference"


@dataclass(kw_only=True, slots=True)
class Follow:
    """How a reference follows the policy: every n steps, a part of the way."""

    every_n_steps: int = 512
    """Optimizer steps from one update of the reference to the next."""
    alpha: float = 0.6
    """The policy's share in an update: 1 copies the policy, 0.6 goes that part of the way."""

    def __post_init__(self) -> None:
        if self.every_n_steps < 1:
            raise ConfigError(
                f"--model.follow.every_n_steps must be at least 1, got {self.every_n_steps}."
            )
        if not 0.0 < self.alpha <= 1.0:
            raise ConfigError(
                f"--model.follow.alpha must be above 0 and at most 1, got {self.alpha:g}."
            )

    def __str__(self) -> str:
        often = "every step" if self.every_n_steps == 1 else f"every {self.every_n_steps} steps"
        return f"{often}, alpha {self.alpha:g}"


class FollowingReference(FrozenReference):
    """A second model that takes over a part of the policy's weights now and then.

    Args:
        start: the second model as it is at the beginning.
        follow: when and how far.
        policy: whom to follow.

    Raises:
        ConfigError: if the two models do not have the same weights.
    """

    def __init__(self, start: FrozenReference, follow: Follow, policy: Policy) -> None:
        who = "a copy that" if start.name is None else f"{start.name}, which"
        description = f"{who} follows the policy: {follow}"
        super().__init__(start.policy, description, name=start.name, offloaded=start.offloaded)
        self.follow = follow
        own, new = _shapes(self.policy), _shapes(policy)
        odd = sorted(dict(own.items() ^ new.items()))
        if odd:
            raise ConfigError(
                "--model.follow mixes the policy's weights into the reference's, but --model."
                f"reference {start.name} has others than the policy ({len(odd)} do not fit, "
                f"{odd[0]} is one). Take a reference of the policy's own shape, or leave one of "
                "the two out."
            )

    def warnings(self, num_steps: int) -> list[str]:
        """What is odd about following through a run of that many steps, in plain words."""
        every = self.follow.every_n_steps
        if every <= num_steps:
            return []
        return [
            f"--model.follow.every_n_steps {every} is more than the {num_steps} steps of this run, "
            "in which the reference stays what it is. Lower it."
        ]

    @torch.no_grad()
    def after_step(self, step: int, policy: Policy) -> None:
        """Follow, if it is time.

        Args:
            step: completed optimizer steps of the whole run.
            policy: as it is after them.
        """
        if step % self.follow.every_n_steps:
            return
        reshard(self.policy)
        reshard(policy)
        pairs = zip(self.policy.parameters(), policy.parameters(), strict=True)
        for own, new in pairs:  # tied weights come once
            own.lerp_(new.to(own.device), self.follow.alpha)


def _shapes(policy: Policy) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in policy.named_parameters()}


def reference_state(reference: Reference | None) -> dict[str, Any]:
    """What a checkpoint keeps of a reference: of one that follows its weights, of others nothing.

    Every rank must call it; under FSDP rank 0 alone gets the weights.
    """
    if not isinstance(reference, FollowingReference):
        return {}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {CHECKPOINT_KEY: get_model_state_dict(reference.policy, options=options)}


def restore_reference(
    checkpoint: dict[str, Any], reference: Reference | None, *, named: str | None, trains: bool
) -> None:
    """Give a reference the weights of the one that followed the policy, if a checkpoint has them.

    Args:
        checkpoint: as `fit` writes it.
        reference: as it began.
        named: the model that is asked for as reference by its whole name; None: none is. One that
            the run did not begin with is what rewards are measured against, in place of the
            checkpoint's.
        trains: whether the run goes on; then it goes on with the same reference.

    Raises:
        ConfigError: if the reference asked for cannot be the checkpoint's.
    """
    state = checkpoint.get(CHECKPOINT_KEY)
    if state is None:
        return
    origin = checkpoint["kto"]
    another = named is not None and named != origin["reference"]
    if another and not trains:
        return
    if another or (trains and not isinstance(reference, FollowingReference)):
        raise ConfigError(
            "the checkpoint holds a reference that follows the policy, which began as "
            f"{origin['reference']} (--model.follow {origin['follow']}). Give the same "
            "--model.reference and a --model.follow, or start a new run from the exported model."
        )
    if not isinstance(reference, FrozenReference):
        raise ConfigError(
            "the checkpoint holds a reference that followed the policy, whose log-probs are in no "
            "cache. Leave --model.reference_cache out."
        )
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(reference.policy, state, options=options)
    reference.description += ", as it is in the checkpoint"
