"""`StreamSampler`: the optimizer steps of an epoch of a stream, buffer by buffer.

The stream is read in the loader's own process, by its sampler; workers only collate. So batches do
not depend on the number of workers, nor on the number of ranks.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields

from torch.utils.data import Dataset, Sampler

from kto_lightning.batches.class_weights import ClassWeights
from kto_lightning.batches.loader import Batching, ExecutionContext
from kto_lightning.batches.sampler import StepPlan
from kto_lightning.batches.types import StepBatch
from kto_lightning.data.streaming.buffers import (
    Buffer,
    StreamedStep,
    attach_examples,
    cut_into_buffers,
)
from kto_lightning.data.streaming.stream import ExampleStream, StreamPosition
from kto_lightning.errors import ConfigError, DataError


@dataclass(kw_only=True, eq=False)
class StreamSampler(Sampler[StreamedStep]):
    """This rank's steps of an epoch of a stream: `PlanSampler` for a stream, of unknown length.

    Examples are paired and rings shuffled inside a buffer, by seeds derived from its number. The
    size of a buffer is a multiple of the batch size, so that no batch spans two. With a single
    buffer the steps equal those of `PlanSampler`.
    """

    stream: ExampleStream
    batching: Batching
    context: ExecutionContext
    needs_partners: bool
    seed: int
    """Draws the order of each epoch."""
    epoch: int = field(default=0, init=False)
    _start: StreamPosition = field(default_factory=StreamPosition, init=False)
    _recent: OrderedDict[int, tuple[StreamPosition, dict[int, str]]] = field(
        default_factory=OrderedDict, init=False
    )
    """For each of the latest steps, by its number from 1: where to resume after it, and where its
    examples were written, by index."""

    def __iter__(self) -> Iterator[StreamedStep]:
        start = self._start
        self._recent.clear()
        steps_per_buffer = self.stream.buffer_size // self.batching.batch_size
        examples = self.stream.examples(start)
        for buffer in cut_into_buffers(examples, self.stream.buffer_size, first=start.buffer):
            first_step = buffer.number * steps_per_buffer
            for plan in self._plans(buffer, start=max(start.step - first_step, 0)):
                self._record_step(buffer, plan, first_step)
                yield attach_examples(plan, buffer.examples)

    def _plans(self, buffer: Buffer, *, start: int) -> Iterator[StepPlan]:
        """Plans of a buffer's steps, beginning with its step `start`."""
        keys, number = buffer.examples.prompt_keys, buffer.number
        try:
            pairing = self.batching.pair(keys, needs_partners=self.needs_partners, buffer=number)
        except DataError as error:
            raise DataError(
                f"{buffer.span}: {error} With --data.streaming partners come from the same buffer: "
                "raise --data.buffer_size, or shuffle the lines of the file."
            ) from error
        if len(pairing.self_paired):
            where = buffer.examples[int(pairing.self_paired[0])].location
            self.stream.warn(f"{where} is paired with itself: the last block has one example.")
        plans = self.batching.plans(
            buffer.examples,
            pairing,
            self.context,
            shuffle=self.batching.shuffle,
            seed=self.seed,
            buffer=number,
        )
        plans.epoch, plans.start = self.epoch, start
        self._num_plans = len(plans)
        return iter(plans)

    def _record_step(self, buffer: Buffer, plan: StepPlan, first_step: int) -> None:
        in_buffer = plan.step_in_epoch + 1
        first, done = buffer.examples[0], first_step + in_buffer
        position = StreamPosition(
            epoch=self.epoch,
            step=done,
            buffer=buffer.number,
            records=first.index,
            checksum=first.checksum,
        )
        if buffer.is_last and in_buffer == self._num_plans:
            position = StreamPosition(epoch=self.epoch + 1)
        locations = {
            (example := buffer.examples[i]).index: example.location for i in plan.examples.tolist()
        }
        self._recent[done] = position, locations
        # A loader prefetches two steps per worker, and Lightning's data fetcher one more.
        while len(self._recent) > 2 * self.batching.num_workers + 4:
            self._recent.popitem(last=False)

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch`: from its beginning, or from the loaded state if that is in this epoch."""
        if epoch != self.epoch:
            self.epoch, self._start = epoch, StreamPosition(epoch=epoch)
            self._recent.clear()

    def position_after(self, num_steps_done: int, *, ends_epoch: bool) -> StreamPosition:
        """Where to resume after that many steps of this epoch, which must be one of the latest few.

        Args:
            num_steps_done: as the trainer counts them; the sampler itself is ahead.
            ends_epoch: whether the trainer ends this epoch there, before the stream ends.
        """
        if ends_epoch:
            return StreamPosition(epoch=self.epoch + 1)
        if num_steps_done == self._start.step:
            return self._start
        return self._recent[num_steps_done][0]

    def location(self, index: int) -> str:
        """Where an example of the latest steps was written, as `file:line`."""
        found = (known[index] for _, known in self._recent.values() if index in known)
        return next(found, f"record {index} of the stream")

    def state_dict(self, *, num_steps_done: int, ends_epoch: bool) -> dict[str, int]:
        """State for a checkpoint after `num_steps_done` steps, see `position_after`."""
        position = self.position_after(num_steps_done, ends_epoch=ends_epoch)
        return asdict(position) | self._order_settings()

    def load_state(self, state: Mapping[str, int]) -> None:
        """Resume where `state_dict` was taken.

        Raises:
            ConfigError: if the order of an epoch was another one then.
        """
        for name, now in self._order_settings().items():
            if state.get(name) != now:
                raise ConfigError(
                    f"cannot resume within an epoch: {name} was {state.get(name)} when the "
                    f"checkpoint was saved and is {now} now. Use the same --data settings and "
                    "seeds as then, or start a new run from the exported model."
                )
        self._start = StreamPosition(
            **{name.name: state[name.name] for name in fields(StreamPosition)}
        )
        self.epoch = self._start.epoch

    def _order_settings(self) -> dict[str, int]:
        """The settings that, besides the records, determine the order of an epoch."""
        return {
            "buffer_size": self.stream.buffer_size,
            "batch_size": self.batching.batch_size,
            "shuffle": int(self.batching.shuffle),
            "seed": self.seed,
            "pairing_seed": self.batching.pairing_seed,
            "rotates": int(self.batching.pairing == "rotate"),
            "has_partners": int(self.needs_partners),
            "max_length": self.batching.max_length or 0,
            "keeps_end": int(self.stream.truncation == "keep_end"),
        }


@dataclass(kw_only=True)
class StreamedBatches(Dataset[StepBatch]):
    """Collates the steps of a `StreamSampler`, as `StepBatches` the plans of a `PlanSampler`."""

    batching: Batching
    weights: ClassWeights
    context: ExecutionContext

    def __getitem__(self, step: StreamedStep) -> StepBatch:
        batches = self.batching.batches(step.examples, self.weights, self.context)
        return batches[step.plan]
