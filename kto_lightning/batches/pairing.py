"""Pairing: the partner of each example, whose completion is its mismatched completion y'.

The reference point z0 needs completions drawn independently of the prompt. Partners are therefore

- drawn by a seed. Files are rarely in random order: neighbours often share a topic, a source or a
  label, and examples sorted by length would be paired with completions of their own length. In both
  cases y' would resemble y, and z0 would be biased.
- a property of the data set, fixed before the first step by the order of the records and a seed of
  their own, never by the batch or the run's seed. So the pairs (x, y') are the same in every epoch
  and run, and a reference cache can keep their log-probs.
- arranged in rings of two: y'1 = y2 and y'2 = y1. Every completion is then used exactly once as a
  mismatched one, so z0 is an average over the same completions as the loss; and an epoch can be
  shuffled by rings, so that a batch of even size contains both uses of each of its completions, as
  in TRL, where completions rotate within a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from kto_lightning.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True, eq=False)
class Pairing:
    """The partner of each example, and the units that an epoch shuffles as wholes.

    `members` lists every example once, unit after unit. A unit has `unit_size` examples; the last
    `num_fixed` examples (a ring of three, an odd one left over, a smaller block) are in no unit and
    come last in every epoch. So a batch whose size is a multiple of `unit_size` consists of whole
    units, and if these are rings, its mismatched completions are a permutation of its completions.
    """

    partner: Int64[np.ndarray, " examples"] | None
    """The example whose completion is the mismatched one; None if the loss needs none."""
    members: Int64[np.ndarray, " examples"]
    """Units in the order of their first members, then the fixed examples."""
    unit_size: int
    num_fixed: int

    def __len__(self) -> int:
        return len(self.members)

    @property
    def self_paired(self) -> Int64[np.ndarray, " self_paired"]:
        """The examples whose mismatched completion is their own; callers warn of them."""
        if self.partner is None:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(self.partner == np.arange(len(self)))


def pair_none(num_examples: int) -> Pairing:
    """No mismatched completions (`apo_zero_unpaired`): each example is a unit."""
    members = np.arange(num_examples, dtype=np.int64)
    return Pairing(partner=None, members=members, unit_size=1, num_fixed=0)


def pair_rotate(num_examples: int, batch_size: int) -> Pairing:
    """TRL's pairing: in each block of `batch_size` consecutive examples, completions rotate by one.

    (x1, y_last), (x2, y1), (x3, y2), …; a last block of one is paired with itself, see
    `Pairing.self_paired`.

    Raises:
        ConfigError: if `batch_size` is below 2, where every example would pair with itself.
    """
    if batch_size < 2:
        raise ConfigError(
            f"--data.pairing rotate pairs the examples of a batch with each other, and "
            f"--data.batch_size is {batch_size}. Take at least 2, or --data.pairing "
            "distinct_prompts, which allows a batch of one."
        )
    members = np.arange(num_examples, dtype=np.int64)
    partner = members - 1
    first_of_block = members[::batch_size]
    partner[first_of_block] = np.minimum(first_of_block + batch_size, num_examples) - 1
    leftover = num_examples % batch_size
    return Pairing(partner=partner, members=members, unit_size=batch_size, num_fixed=leftover)


def pair_distinct_prompts(
    prompt_keys: Int64[np.ndarray, " examples"], *, seed: int | Sequence[int] | None
) -> Pairing:
    """Join examples with different prompts in rings of two, and one of three if they are odd.

    Inside a ring completions rotate by one. If one prompt has more than half of all examples, the
    excess cannot be joined in rings: these examples take the completions of the others in turn, and
    form units of two, so that a batch of even size still consists of whole rings.

    Args:
        prompt_keys: equal exactly where prompts are.
        seed: draws the partners; None: the nearest examples with different prompts.

    Raises:
        DataError: if there are fewer than two different prompts.
    """
    _check_two_prompts(prompt_keys)
    num_examples = len(prompt_keys)
    sequence = np.arange(num_examples, dtype=np.int64)
    if seed is not None:
        sequence = np.random.Generator(np.random.PCG64(seed)).permutation(sequence)
    pairs, triple, excess = _rings(sequence.tolist(), prompt_keys.tolist())

    partner = np.empty(num_examples, dtype=np.int64)
    rings = np.sort(np.array(pairs, dtype=np.int64).reshape(-1, 2), axis=1)
    partner[rings] = rings[:, ::-1]
    triple = np.sort(np.array(triple, dtype=np.int64))
    partner[triple] = np.roll(triple, 1)
    excess = np.array(excess, dtype=np.int64)
    if len(excess):
        others = sequence[prompt_keys[sequence] != prompt_keys[excess[0]]]
        partner[excess] = np.resize(others, len(excess))

    leftover = len(excess) % 2
    excess = np.sort(excess)
    units = np.concatenate([rings, excess[: len(excess) - leftover].reshape(-1, 2)])
    units = units[np.argsort(units[:, 0])]
    fixed = np.concatenate([triple, excess[len(excess) - leftover :]])
    members = np.concatenate([units.ravel(), fixed])
    return Pairing(partner=partner, members=members, unit_size=2, num_fixed=len(fixed))


def _check_two_prompts(prompt_keys: Int64[np.ndarray, " examples"]) -> None:
    if len(prompt_keys) >= 2 and bool((prompt_keys != prompt_keys[0]).any()):
        return
    found = {0: "no record", 1: "a single record"}.get(
        len(prompt_keys), f"{len(prompt_keys)} records that all share one prompt"
    )
    raise DataError(
        "KTO compares each completion with one that answers another prompt, which takes records "
        f"with at least two different prompts; got {found}. Add records with other prompts, or use "
        "--model.loss apo_zero_unpaired, which needs no such comparison."
    )


def _rings(
    sequence: list[int], keys: list[int]
) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Join each example of the sequence with the nearest earlier one that has another prompt.

    Boyer and Moore's majority vote, keeping the votes: `waiting` holds examples of one prompt, and
    an example of another prompt is joined with the last of them. At the end, k examples of one
    prompt P are left over. A pair without P can be split to take two of them, or extended to a ring
    of three to take one. With p pairs that contain P and f pairs that do not, P has k + p of
    k + 2p + 2f examples. If that is at most half, then f ≥ k/2, and all k are joined. Otherwise
    f < k/2: every pair without P is split, and k − 2f examples remain. Linear time.

    Returns:
        Rings of two; one ring of three or an empty list; the examples that remain.
    """
    pairs: list[tuple[int, int]] = []
    waiting: list[int] = []
    for example in sequence:
        if waiting and keys[waiting[-1]] != keys[example]:
            pairs.append((waiting.pop(), example))
        else:
            waiting.append(example)
    if not waiting:
        return pairs, [], []

    # Every pair made since P began to wait contains P: the last pairs without P are the nearest.
    prompt = keys[waiting[-1]]
    triple: list[int] = []
    for i in range(len(pairs) - 1, -1, -1):
        first, second = pairs[i]
        if prompt in (keys[first], keys[second]):
            continue
        if len(waiting) == 1:
            triple = [first, second, waiting.pop()]
            del pairs[i]
        else:
            pairs[i] = (first, waiting.pop())
            pairs.append((second, waiting.pop()))
        if not waiting:
            break
    return pairs, triple, waiting
