"""How a batch is cut into micro-batches for every rank: a pure function of lengths and a budget.

Every rank computes the plan of all ranks and takes its own, so nothing is ever communicated. The
cut decides memory and speed, never the result (invariant 1: "the batch decides, never the cut").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int, Int64

from kto_lightning.errors import ConfigError

EVENNESS = 64
"""The search for the smallest budget stops when it is known to one part in so many."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward and backward run on one rank."""

    positions: list[int]
    """Ascending positions into the batch, at least one."""
    is_filler: bool = False
    """True for a filler: one example that some other micro-batch trains on and that here counts
    for nothing, because this rank would otherwise run fewer forwards than the others."""


@dataclass(slots=True)
class _Bin:
    """A micro-batch in the making. Tokens are summed, or under padding count × longest."""

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
    """Tokens of each example as the plan counts them: its prompt and the longer of its completions.

    So neither the matched nor the mismatched forward, with or without its prompts, is ever given
    more than `max_tokens`.

    Args:
        prompt_lengths: tokens of each prompt.
        completion_lengths: tokens of each completion, before the cut to `max_length`.
        partner: whose completion is each example's mismatched one; None: there are none.
        max_length: where sequences are cut; None: nowhere.
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
    """Cut a batch into micro-batches of at most `max_tokens`, the same number on every rank.

    As few per rank as first fit finds, by decreasing length or in batch order; then the most even
    ones by MULTIFIT (Coffman, Garey and Johnson, 1978): the smallest budget under which first fit
    decreasing still needs no more. An example longer than `max_tokens` is alone in its micro-batch;
    a rank left without one runs a filler, the batch's shortest example at weight zero.

    Args:
        lengths: tokens of each example of the batch, see `example_costs`.
        max_tokens: tokens per forward on one device.
        world_size: number of ranks.
        padded: whether the forward pads each micro-batch to its longest example.

    Returns:
        For each rank its micro-batches, the costliest first. One rank that can take the whole batch
        at once gets it as one micro-batch in the batch's order.

    Raises:
        ConfigError: if `max_tokens` or `world_size` is not positive.
        ValueError: if the batch is empty.
    """
    if max_tokens < 1 or world_size < 1:
        raise ConfigError(
            f"cannot cut a batch for {world_size} ranks of {max_tokens} tokens each: both must be "
            "at least 1. Raise --data.max_tokens (16384 by default)."
        )
    sizes = [int(length) for length in lengths]
    if not sizes:
        raise ValueError("a batch to be cut into micro-batches has at least one example, got none")
    bins = _fewest_even_bins(sizes, max_tokens, world_size, padded)
    # The sort is stable and the bins come in a fixed order, so every rank deals the same hands.
    bins.sort(key=lambda full: -full.cost())
    shortest = min(range(len(sizes)), key=sizes.__getitem__)
    micro_batches = [MicroBatch(sorted(full.positions)) for full in bins]
    while len(micro_batches) % world_size:
        micro_batches.append(MicroBatch([shortest], is_filler=True))
    # Ranks wait for each other in every round, so a round's micro-batches are of like cost; every
    # other round is dealt backwards, so that no rank gets the costliest each time.
    rounds = [micro_batches[i : i + world_size] for i in range(0, len(micro_batches), world_size)]
    rounds = [hand[::-1] if i % 2 else hand for i, hand in enumerate(rounds)]
    return [list(rank) for rank in zip(*rounds, strict=True)]


def _fewest_even_bins(
    sizes: list[int], max_tokens: int, world_size: int, padded: bool
) -> list[_Bin]:
    """The fewest bins per rank within the budget, as even as MULTIFIT makes them, none empty."""
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
    while enough - too_small > 1 + enough // EVENNESS:
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
    """Put each example into the first bin it fits, or else into a new one, however long it is."""
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
    """Give bins that would stay empty the smaller half of the costliest that can be halved.

    A rank that trains on something is of more use than one that only keeps step.
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
