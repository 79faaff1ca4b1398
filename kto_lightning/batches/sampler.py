"""`PlanSampler`: the order of an epoch, and the plan of each of its optimizer steps."""

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
    """The order of the examples in an epoch, a permutation.

    A pure function of its arguments, on every platform. Units are shuffled as wholes; without
    `shuffle` they come by their first members, which for TRL's blocks is the order of the file.
    Each buffer of a stream has its own order; the first one has that of a data set.
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
    """The batch over all ranks, in the order of the epoch."""
    partners: Int64[np.ndarray, " batch"] | None
    """The partner of each example; None if the loss needs none."""
    micro_batches: list[MicroBatch]
    """Of this rank, positions in `examples`; the same number on every rank."""
    step_in_epoch: int
    """From 0 at the beginning of the epoch, also in a resumed one."""


@dataclass(kw_only=True, eq=False)
class PlanSampler(Sampler[StepPlan]):
    """One rank's `StepPlan` for every optimizer step of an epoch; a smaller last batch is kept.

    A plan covers a whole optimizer step, because how a batch is divided among ranks and
    micro-batches depends on all its lengths (`packing`).

    The plans are a function of the settings, `epoch` and `start` alone: ranks agree on them without
    communication, and a resumed run needs no replay. Lightning calls `set_epoch` on a loader's
    `sampler` before every epoch; without that call each epoch would repeat the order of the first.
    The length is that of the whole epoch even after a resume, because Lightning also counts the
    steps done before it.

    Raises:
        ConfigError: if `batch_size` is not positive.
    """

    pairing: Pairing
    costs: Int[np.ndarray, " examples"]
    """Tokens of each example, from `packing.example_costs`."""
    batch_size: int
    """Examples per optimizer step over all ranks."""
    max_tokens: int
    """Tokens per forward on one device."""
    shuffle: bool
    """Whether each epoch has an order of its own."""
    seed: int
    """Draws these orders."""
    rank: int = 0
    world_size: int = 1
    padded: bool = False
    """Whether forwards pad their micro-batches."""
    buffer: int = 0
    """The number of the stream's buffer that the examples are from."""
    epoch: int = field(default=0, init=False)
    start: int = field(default=0, init=False)
    """The first step of `epoch` to yield; above 0 after a resume."""

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
        """Start `epoch`: from its beginning, or from the loaded state if that is in this epoch.

        Lightning also calls this for the epoch it resumes in, so `start` must survive that call.
        """
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def state_dict(self, *, num_steps_done: int, ends_epoch: bool = False) -> dict[str, int]:
        """State for a checkpoint after `num_steps_done` steps of this epoch.

        Args:
            num_steps_done: as the trainer counts them; the sampler itself is ahead of the training,
                because workers prefetch.
            ends_epoch: whether the trainer ends this epoch there (`limit_train_batches`).
        """
        epoch, start = (self.epoch + 1, 0) if ends_epoch else (self.epoch, num_steps_done)
        return {"epoch": epoch, "start": start} | self._order_settings()

    def load_state(self, state: Mapping[str, int]) -> None:
        """Resume where `state_dict` was taken.

        A state taken after the last step of an epoch becomes the beginning of the next one:
        otherwise workers would prefetch from the exhausted sampler, and that epoch would be empty.

        Raises:
            ConfigError: if the order of an epoch was another one then, so that some examples would
                be seen twice and others never.
        """
        for name, now in self._order_settings().items():
            if state[name] != now and name == "pairing_checksum":
                raise ConfigError(
                    "cannot resume within an epoch: the examples have other partners than when the "
                    "checkpoint was saved. Use the same data, --data settings and seeds as then, "
                    "or start a new run from the exported model."
                )
            if state[name] != now:
                raise ConfigError(
                    f"cannot resume within an epoch: {name} was {state[name]} when the checkpoint "
                    f"was saved and is {now} now. Use the same data, --data settings and seeds as "
                    "then, or start a new run from the exported model."
                )
        self.epoch, self.start = divmod(state["epoch"] * len(self) + state["start"], len(self))

    def _order_settings(self) -> dict[str, int]:
        """The settings that determine the order of an epoch; ranks and `max_tokens` do not."""
        partner = self.pairing.partner
        checksum = crc32(self.pairing.members.tobytes())
        return {
            "num_examples": len(self.pairing),
            "batch_size": self.batch_size,
            "shuffle": int(self.shuffle),
            "seed": self.seed,
            "pairing_checksum": checksum if partner is None else crc32(partner.tobytes(), checksum),
        }
