"""Split into training and held-out examples by prompt, with the same fraction of both classes."""

import numpy as np
from jaxtyping import Bool, Int64

from kto_lightning.errors import ConfigError


def split_by_prompt(
    prompt_keys: Int64[np.ndarray, " examples"],
    desirable: Bool[np.ndarray, " examples"],
    *,
    fraction: float,
    seed: int,
) -> tuple[Int64[np.ndarray, " kept"], Int64[np.ndarray, " held_out"]]:
    """Positions to train on and positions to hold out, each ascending.

    Prompts are drawn at random, each with all its completions, and held out while neither class
    exceeds its share. With a prompt on both sides, validation would reward memorising it.

    Args:
        prompt_keys: equal exactly where prompts are.
        desirable: the labels.
        fraction: share of the examples of each class to hold out.
        seed: draws the prompts.

    Raises:
        ConfigError: if `fraction` is not between 0 and 1, or one side is left empty.
    """
    if not 0.0 < fraction < 1.0:
        raise ConfigError(
            f"--data.validation {fraction:g}: a fraction must be between 0 and 1. "
            "Give a fraction such as 0.1, or a file of records."
        )
    _, group = np.unique(prompt_keys, return_inverse=True)
    num_groups = int(group.max(initial=-1)) + 1
    of_class = np.stack(
        [np.bincount(group[side], minlength=num_groups) for side in (desirable, ~desirable)]
    )  # [2, groups]
    wanted = np.rint(fraction * of_class.sum(axis=1))
    taken = np.zeros(2)
    held = np.zeros(num_groups, dtype=bool)
    for candidate in np.random.default_rng(seed).permutation(num_groups):
        if np.all(taken + of_class[:, candidate] <= wanted):
            taken += of_class[:, candidate]
            held[candidate] = True
    held_out = held[group]
    if not held_out.any() or held_out.all():
        raise ConfigError(
            f"--data.validation {fraction:g} of {len(desirable)} examples on {num_groups} prompts "
            "leaves one side empty: all records of a prompt stay in one set. Give a larger "
            "fraction, or a file of records."
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
