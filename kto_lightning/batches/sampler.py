"""Which completion is mismatched with which prompt, and the order in which an epoch sees them.

Partners are a property of the data set: they are fixed before the first step, by the order of the
records and a seed of their own, and never by the batch. So each (x, y') recurs in every epoch, and
its reference log-prob can be kept (invariant 3).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np
from jaxtyping import Int, Int64
from torch.utils.data import Sampler

from kto_lightning.batches.packing import MicroBatch, plan_micro_batches
from kto_lightning.batches.pairing import Pairing
from kto_lightning.errors import ConfigError


def epoch_order(
    pairing: Pairing, *, shuffle: bool, seed: int, epoch: int, buffer: int = 0
) -> Int64[np.ndarray, " examples"]:
    """The examples in the order in which an epoch sees them, a permutation.

    A pure function of its arguments on every platform. Units are shuffled as wholes; without
    `shuffle` they come by their first member, which for TRL's blocks is the order of the file.
    Each buffer of a stream has an order of its own; the first has that of a whole data set.
    """
    if not shuffle:
        return pairing.members.copy()
    num_shuffled = len(pairing) - pairing.num_fixed
    units = pairing.members[:num_shuffled].reshape(-1, pairing.unit_size)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, buffer])))
    order = generator.permutation(len(units))
    return np.concatenate([units[order].ravel(), pairing.members[num_shuffled:]])


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One optimizer step for one rank."""

    examples: Int64[np.ndarray, " batch"]
    """The whole batch over all ranks, in the order of the epoch."""
    partners: Int64[np.ndarray, " batch"] | None
    """Whose completion is each one's mismatched one; None where none is needed."""
    micro_batches: list[MicroBatch]
    """This rank's; all ranks have the same number."""
    step_in_epoch: int
    """From 0, over the whole epoch, whether it was resumed or not."""


@dataclass(kw_only=True, eq=False)
class PlanSampler(Sampler[StepPlan]):
    """This rank's plan for every optimizer step of an epoch; the last, smaller batch is kept.

    A pure function of (seed, epoch, start). Lightning calls `set_epoch` on a loader's `sampler`.
    The length is always that of the whole epoch, because Lightning counts the steps done before a
    resume as well. Raises ConfigError if `batch_size` is not positive.
    """

    pairing: Pairing
    costs: Int[np.ndarray, " examples"]
    """Tokens of each example, see `packing.example_costs`."""
    batch_size: int
    """Examples per optimizer step over all ranks."""
    max_tokens: int
    """Tokens per forward on one device."""
    shuffle: bool
    """Whether each epoch has an order of its own."""
    seed: int
    """Of these orders."""
    rank: int = 0
    world_size: int = 1
    padded: bool = False
    """Whether forwards pad their micro-batches."""
    buffer: int = 0
    """Which part of a stream the examples are."""
    epoch: int = field(default=0, init=False)
    start: int = field(default=0, init=False)
    """The step of `epoch` at which iteration begins."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"--data.batch_size must be at least 1, got {self.batch_size}.")

    def __len__(self) -> int:
        return -(-len(self.pairing) // self.batch_size)

    def __iter__(self) -> Iterator[StepPlan]:
        settings = {"seed": self.seed, "epoch": self.epoch, "buffer": self.buffer}
        order = epoch_order(self.pairing, shuffle=self.shuffle, **settings)
        for step in range(self.start, len(self)):
            examples = order[step * self.batch_size : (step + 1) * self.batch_size]
            plan = plan_micro_batches(
                self.costs[examples],
                max_tokens=self.max_tokens,
                world_size=self.world_size,
                padded=self.padded,
            )
            partner = self.pairing.partner
            yield StepPlan(
                examples=examples,
                partners=None if partner is None else partner[examples],
                micro_batches=plan[self.rank],
                step_in_epoch=step,
            )

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch`: from where a loaded state left it, if that is the epoch it was in."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def state_dict(self, *, num_steps_done: int, ends_epoch: bool = False) -> dict[str, int]:
        """What a checkpoint needs to go on after `num_steps_done` steps of this epoch.

        The trainer knows that number, and whether it ends the epoch there (`limit_train_batches`);
        the sampler does not, because workers fetch ahead of it.
        """
        epoch, start = (self.epoch + 1, 0) if ends_epoch else (self.epoch, num_steps_done)
        return {"epoch": epoch, "start": start} | self._order_settings()

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on where `state_dict` was taken.

        A state taken after an epoch's last step is the next epoch's first: left as it is, a loader
        with workers would fetch from the exhausted sampler and that epoch would be lost.

        Raises:
            ConfigError: if the order of an epoch was another then, so that going on would see some
                examples twice and others never.
        """
        for name, now in self._order_settings().items():
            if state[name] != now:
                raise ConfigError(
                    f"cannot go on within an epoch: {name} was {state[name]} when the checkpoint "
                    f"was saved and is {now} now. Use the same data, --data settings and seeds as "
                    "then, or start a new run from the exported model."
                )
        self.epoch, self.start = divmod(state["epoch"] * len(self) + state["start"], len(self))

    def _order_settings(self) -> dict[str, int]:
        """What decides the order of an epoch. Ranks and `max_tokens` are free to change."""
        partner = self.pairing.partner
        checksum = crc32(self.pairing.members.tobytes())
        return {
            "num_examples": len(self.pairing),
            "batch_size": self.batch_size,
            "shuffle": int(self.shuffle),
            "seed": self.seed,
            "pairing_checksum": checksum if partner is None else crc32(partner.tobytes(), checksum),
        }
