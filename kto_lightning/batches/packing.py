"""Micro-batches: how a batch is divided among ranks and forwards, by lengths and a token budget.

A pure function: every rank computes the plan of all ranks and takes its own part, without
communication. The division affects memory and speed, never the result, because losses and z0 are
taken over the whole batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int, Int64

from kto_lightning.errors import ConfigError

BUDGET_PRECISION = 64
"""The search for the smallest budget stops at a relative precision of 1 in this number."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The examples of one forward and backward on one rank."""

    positions: list[int]
    """Ascending positions in the batch, at least one."""
    is_filler: bool = False
    """True for a filler: an example of another micro-batch, run again with weight zero so that this
    rank runs as many forwards as the others, which wait for it in collectives."""


@dataclass(slots=True)
class _Bin:
    """A micro-batch under construction. Its cost: the sum of lengths; padded, count × longest."""

    padded: bool
    positions: list[int] = field(default_factory=list)
    total: int = 0
    longest: int = 0

    def cost(self) -> int:
        return len(self.positions) * self.longest if self.padded else self.total

    def cost_with(self, length: int) -> int:
        if self.padded:
            return (len(self.positions) + 1) * max(self.longest, length)
        return self.total + length

    def add(self, position: int, length: int) -> None:
        self.positions.append(position)
        self.total += length
        self.longest = max(self.longest, length)


def example_costs(
    prompt_lengths: Int[np.ndarray, " examples"],
    completion_lengths: Int[np.ndarray, " examples"],
    partner: Int64[np.ndarray, " examples"] | None,
    *,
    max_length: int | None,
) -> Int64[np.ndarray, " examples"]:
    """Tokens that the plan counts for each example: prompt + the longer of its two completions.

    A micro-batch takes two forwards: prompts with their own completions, then with the mismatched
    ones. The longer completion bounds both by `max_tokens`, even if the second one repeats the
    prompts. Not the sum of both: they run one after the other, and the mismatched forward has no
    gradient and keeps no activations.

    Args:
        prompt_lengths: tokens of each prompt.
        completion_lengths: tokens of each completion, before truncation.
        partner: the example whose completion is the mismatched one; None: there are none.
        max_length: tokens after which sequences are truncated; None: never.
    """
    longer = completion_lengths
    if partner is not None:
        longer = np.maximum(completion_lengths, completion_lengths[partner])
    costs = prompt_lengths.astype(np.int64) + longer
    return costs if max_length is None else np.minimum(costs, max_length)


def plan_micro_batches(
    lengths: Sequence[int] | Int[np.ndarray, " batch"],
    *,
    max_tokens: int,
    world_size: int,
    padded: bool = False,
) -> list[list[MicroBatch]]:
    """Divide a batch into micro-batches of at most `max_tokens`, the same number on every rank.

    The number per rank is the smallest that first fit finds, by decreasing length or in batch
    order. MULTIFIT (Coffman, Garey and Johnson, 1978) then evens out their sizes: it searches the
    smallest budget under which first fit decreasing needs no more micro-batches. An example longer
    than `max_tokens` has a micro-batch of its own. A rank with one micro-batch too few runs a
    filler: the shortest example of the batch, with weight zero.

    Args:
        lengths: tokens of each example of the batch, see `example_costs`.
        max_tokens: tokens per forward on one device.
        world_size: number of ranks.
        padded: whether forwards pad to the longest example of the micro-batch.

    Returns:
        The micro-batches of each rank, the costliest first. If a single rank has room for the whole
        batch, it is one micro-batch in batch order.

    Raises:
        ConfigError: if `max_tokens` or `world_size` is not positive.
        ValueError: if the batch is empty.
    """
    if max_tokens < 1 or world_size < 1:
        raise ConfigError(
            f"cannot divide a batch among {world_size} ranks of {max_tokens} tokens each: both "
            "must be at least 1. Raise --data.max_tokens (16384 by default)."
        )
    sizes = [int(length) for length in lengths]
    if not sizes:
        raise ValueError("a batch must have at least one example, got none")
    bins = _fewest_even_bins(sizes, max_tokens, world_size, padded)
    # The sort is stable and the order of the bins deterministic: every rank gets the same plan.
    bins.sort(key=lambda full: -full.cost())
    shortest = min(range(len(sizes)), key=sizes.__getitem__)
    micro_batches = [MicroBatch(sorted(full.positions)) for full in bins]
    while len(micro_batches) % world_size:
        micro_batches.append(MicroBatch([shortest], is_filler=True))
    # Ranks wait for each other in every round, so the micro-batches of a round have similar costs.
    # Every other round is reversed, so that no rank always gets the costliest.
    rounds = [micro_batches[i : i + world_size] for i in range(0, len(micro_batches), world_size)]
    rounds = [dealt[::-1] if i % 2 else dealt for i, dealt in enumerate(rounds)]
    return [list(rank) for rank in zip(*rounds, strict=True)]


def _fewest_even_bins(
    sizes: list[int], max_tokens: int, world_size: int, padded: bool
) -> list[_Bin]:
    """The fewest bins per rank within the budget, evened out by MULTIFIT; none is empty."""
    in_order = list(range(len(sizes)))
    decreasing = sorted(in_order, key=lambda i: -sizes[i])

    def fit(order: list[int], budget: int) -> list[_Bin]:
        return _first_fit(order, sizes, budget, lambda: _Bin(padded))

    best = min(fit(decreasing, max_tokens), fit(in_order, max_tokens), key=len)
    if len(best) == world_size == 1:
        return best
    num_bins = -(-len(best) // world_size) * world_size
    too_small = -(-sum(min(size, max_tokens) for size in sizes) // num_bins) - 1
    enough = min(max_tokens, max(full.cost() for full in best))
    while enough - too_small > 1 + enough // BUDGET_PRECISION:
        budget = (too_small + enough) // 2
        bins = fit(decreasing, budget)
        if len(bins) <= num_bins:
            best, enough = bins, budget
        else:
            too_small = budget
    _split_until(best, num_bins, sizes)
    return best


def _first_fit(
    order: list[int], sizes: list[int], budget: int, new_bin: Callable[[], _Bin]
) -> list[_Bin]:
    """Put each example into the first bin with room, or into a new one, however long it is."""
    bins: list[_Bin] = []
    for position in order:
        length = sizes[position]
        target = next((b for b in bins if b.cost_with(length) <= budget), None)
        if target is None:
            target = new_bin()
            bins.append(target)
        target.add(position, length)
    return bins


def _split_until(bins: list[_Bin], num_bins: int, sizes: list[int]) -> None:
    """Split the costliest bin that has two examples until there are `num_bins`, if there can be.

    Otherwise fillers would take the missing places, and their ranks would compute nothing of use.
    """
    while len(bins) < min(num_bins, len(sizes)):
        largest = max((b for b in bins if len(b.positions) > 1), key=_Bin.cost)
        bins.remove(largest)
        order = sorted(largest.positions, key=lambda i: -sizes[i])
        halves = [_Bin(largest.padded), _Bin(largest.padded)]
        for position in order:
            length = sizes[position]
            costs = [(half.cost_with(length), len(half.positions)) for half in halves]
            halves[costs.index(min(costs))].add(position, length)
        bins.extend(halves)
