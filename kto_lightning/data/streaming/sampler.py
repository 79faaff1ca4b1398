"""A stream's examples, buffer by buffer, as the steps of an epoch.

The stream is read in the loader's own process, as the sampler of its steps: workers only collate,
so that any number of them gives the same batches, and so does any number of ranks.
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
    cut_into_buffers,
    with_its_examples,
)
from kto_lightning.data.streaming.stream import ExampleStream, StreamPosition
from kto_lightning.errors import ConfigError, DataError


@dataclass(kw_only=True, eq=False)
class StreamSampler(Sampler[StreamedStep]):
    """This rank's steps of an epoch of a stream, as `PlanSampler` of a data set; of unknown length.

    Partners are joined and rings shuffled inside a buffer, by seeds that its number enters. Its
    size is a multiple of the batch's, so that no batch has a part in two. With a single buffer the
    steps are those of `PlanSampler`.
    """

    stream: ExampleStream
    batching: Batching
    context: ExecutionContext
    needs_partners: bool
    seed: int
    """Of the orders of the epochs."""
    epoch: int = field(default=0, init=False)
    _start: StreamPosition = field(default_factory=StreamPosition, init=False)
    _given: OrderedDict[int, tuple[StreamPosition, dict[int, str]]] = field(
        default_factory=OrderedDict, init=False
    )
    """By the number of steps done: where to go on, and where the last step's examples stand."""

    def __iter__(self) -> Iterator[StreamedStep]:
        start = self._start
        self._given.clear()
        steps_per_buffer = self.stream.buffer_size // self.batching.batch_size
        examples = self.stream.examples(start)
        for buffer in cut_into_buffers(examples, self.stream.buffer_size, first=start.buffer):
            first_step = buffer.number * steps_per_buffer
            for plan in self._plans(buffer, start=max(start.step - first_step, 0)):
                self._remember(buffer, plan, first_step)
                yield with_its_examples(plan, buffer.examples)

    def _plans(self, buffer: Buffer, *, start: int) -> Iterator[StepPlan]:
        """The steps of a buffer, counted from its first, from `start` on."""
        keys, number = buffer.examples.prompt_keys, buffer.number
        try:
            pairing = self.batching.pair(keys, needs_partners=self.needs_partners, buffer=number)
        except DataError as error:
            raise DataError(
                f"{buffer.span}: {error} With --data.streaming partners come from the same buffer: "
                "raise --data.buffer_size, or mix the lines of the file."
            ) from error
        if len(pairing.self_paired):
            where = buffer.examples[int(pairing.self_paired[0])].location
            self.stream.warn(f"{where} is paired with itself, being the last block of one.")
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

    def _remember(self, buffer: Buffer, plan: StepPlan, first_step: int) -> None:
        in_buffer = plan.step_in_epoch + 1
        first, done = buffer.examples[0], first_step + in_buffer
        place = StreamPosition(
            epoch=self.epoch,
            step=done,
            buffer=buffer.number,
            records=first.index,
            checksum=first.checksum,
        )
        if buffer.is_last and in_buffer == self._num_plans:
            place = StreamPosition(epoch=self.epoch + 1)
        locations = {
            (example := buffer.examples[position]).index: example.location
            for position in plan.examples.tolist()
        }
        self._given[done] = place, locations
        # A loader is at most two steps ahead per worker, and Lightning's fetcher one more.
        while len(self._given) > 2 * self.batching.num_workers + 4:
            self._given.popitem(last=False)

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch`: from where a loaded state left it, if that is the epoch it was in."""
        if epoch != self.epoch:
            self.epoch, self._start = epoch, StreamPosition(epoch=epoch)
            self._given.clear()

    def place(self, num_steps_done: int, *, ends_epoch: bool) -> StreamPosition:
        """Where to go on after that many steps of this epoch, one of the latest few.

        Args:
            num_steps_done: as the trainer counts them: the sampler itself is ahead.
            ends_epoch: whether the trainer stops this epoch there, though the stream goes on.
        """
        if ends_epoch:
            return StreamPosition(epoch=self.epoch + 1)
        if num_steps_done == self._start.step:
            return self._start
        return self._given[num_steps_done][0]

    def location(self, index: int) -> str:
        """Where an example of the steps at hand was written, as `file:line`."""
        found = (known[index] for _, known in self._given.values() if index in known)
        return next(found, f"record {index} of the stream")

    def state_dict(self, *, num_steps_done: int, ends_epoch: bool) -> dict[str, int]:
        """What a checkpoint needs to go on from `place`."""
        place = self.place(num_steps_done, ends_epoch=ends_epoch)
        return asdict(place) | self._order_settings()

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ConfigError: if the order of an epoch was another then.
        """
        for name, now in self._order_settings().items():
            if state.get(name) != now:
                raise ConfigError(
                    f"cannot go on within an epoch: {name} was {state.get(name)} when the "
                    f"checkpoint was saved and is {now} now. Use the same --data settings and "
                    "seeds as then, or start a new run from the exported model."
                )
        self._start = StreamPosition(
            **{name.name: state[name.name] for name in fields(StreamPosition)}
        )
        self.epoch = self._start.epoch

    def _order_settings(self) -> dict[str, int]:
        """What decides the order of an epoch, beside the records."""
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
    """Turns a step of a `StreamSampler` into its batch, by the settings of `StepBatches`."""

    batching: Batching
    weights: ClassWeights
    context: ExecutionContext

    def __getitem__(self, step: StreamedStep) -> StepBatch:
        batches = self.batching.batches(step.examples, self.weights, self.context)
        return batches[step.plan]
