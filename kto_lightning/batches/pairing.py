"""Partners: which example's completion is the mismatched completion of another."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from kto_lightning.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True, eq=False)
class Pairing:
    """Whose completion each example gets as its mismatched one, and what is shuffled whole.

    `members` lists every example once, unit after unit: `unit_size` examples each, but for the last
    `num_fixed` (a ring of three, an odd leftover, a smaller block), which every epoch sees last. So
    a batch whose size is a multiple of `unit_size` holds whole units, and where units are rings,
    its mismatched completions are a permutation of its completions.
    """

    partner: Int64[np.ndarray, " examples"] | None
    """None where the loss needs no mismatched completions."""
    members: Int64[np.ndarray, " examples"]
    """The units by their first member, then what is fixed."""
    unit_size: int
    num_fixed: int

    def __len__(self) -> int:
        return len(self.members)

    @property
    def self_paired(self) -> Int64[np.ndarray, " self_paired"]:
        """The examples whose mismatched completion is their own, worth a warning."""
        if self.partner is None:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(self.partner == np.arange(len(self)))


def unpaired(num_examples: int) -> Pairing:
    """No mismatched completions (`apo_zero_unpaired`): every example is shuffled on its own."""
    members = np.arange(num_examples, dtype=np.int64)
    return Pairing(partner=None, members=members, unit_size=1, num_fixed=0)


def pair_rotate(num_examples: int, batch_size: int) -> Pairing:
    """TRL's pairs: in each block of `batch_size` neighbours the completions rotate by one.

    (x1, y_last), (x2, y1), (x3, y2), …; a last block of one pairs with itself, which
    `Pairing.self_paired` tells.

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

    Inside a ring completions rotate by one. When a prompt holds more than half of all examples, the
    excess cannot be joined in rings: those examples get the completions of the others in turn, and
    are shuffled two by two so that even batches keep holding whole rings.

    Args:
        prompt_keys: equal exactly where prompts are.
        seed: draws the partners; None: neighbours as they stand, or the nearest that differ.

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
    """Join each example of the sequence with the nearest one before it that has another prompt.

    Boyer and Moore's majority vote with its votes kept: `waiting` holds examples of one prompt; an
    example of another prompt takes the last of them. In the end k examples of one prompt P are
    left. A pair without P can be opened for two of them (or for one, as a ring of three). P is in
    k + p examples when p pairs have it, of which f = pairs − p do not; if P holds at most half of
    all, k + p ≤ f + p + k/2, so f ≥ k/2 and there are pairs enough. Otherwise f < k/2, every
    pair without P is opened and the excess k − 2f stays. Linear in the number of examples.

    Returns:
        Rings of two; a ring of three or nothing; what stays because its prompt holds too much.
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

    # The last pairs without P are the nearest: every pair made since P began to wait has it.
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
