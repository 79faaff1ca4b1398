"""`KTODataModule`: from files of records to the loader whose item is one optimizer step."""

import os
from typing import Any

from torch.utils.data import DataLoader

from kto_lightning.batches.class_weights import ClassWeights
from kto_lightning.batches.collate import StepBatches, all_keys
from kto_lightning.batches.loader import ExecutionContext
from kto_lightning.batches.pairing import Pairing, unpaired
from kto_lightning.batches.sampler import PlanSampler
from kto_lightning.batches.types import StepBatch
from kto_lightning.data.run_data import RunData
from kto_lightning.data.streaming.sampler import StreamedBatches, StreamSampler
from kto_lightning.data.streaming.stream import StreamPosition
from kto_lightning.data.tokenize import ExampleSet
from kto_lightning.errors import ConfigError


class KTODataModule(RunData):
    """Records, tokenized, paired with mismatched completions and cut into steps.

    What depends on the model (its tokenizer, the loss, class weights, whether it shares prompts) is
    asked of the module that the trainer runs.

    Args:
        train: records to train on: a file (jsonl, json, csv, parquet), a glob of them, several, or
            a hub data set.
        validation: held-out records: a file like `train`, or a fraction of `train` by prompt; null:
            none.
        predict: records to reward, for the command `predict`.
        batch_size: examples per optimizer step, over all devices.
        max_tokens: tokens per forward on one device; decides memory only, never the result.
        max_length: tokens after which prompt + completion is truncated; null: never.
        truncation: keep_start cuts the completion's end; keep_end drops the prompt's start first.
        shuffle: another order in every epoch; false keeps the files' order.
        pairing: where mismatched completions come from: distinct_prompts, or rotate as TRL does.
        pairing_seed: draws the partners of distinct_prompts; apart from the run's seed, so that
            another seed keeps the reference's log-probs.
        tokenizer: a directory or hub id; null: the policy's.
        chat_template: a file with a Jinja chat template instead of the tokenizer's.
        num_workers: loader processes per device.
        preprocessing_workers: processes that tokenize; null: as many as there are cores, up to 8.
        streaming: read `train` anew in every epoch instead of keeping it on disk. Needs given class
            weights; bad records are left out with a warning.
        buffer_size: under streaming, the examples from among which partners come and which are
            shuffled together; rounded up to whole batches.

    Raises:
        ConfigError: if a number is outside what it may be.
    """

    def train_dataloader(self) -> DataLoader[StepBatch]:
        assert self.class_weights is not None
        if self.stream is not None:
            batches = StreamedBatches(
                batching=self.batching, weights=self.class_weights, context=self._context()
            )
            self._sampler = StreamSampler(
                stream=self.stream,
                batching=self.batching,
                context=self._context(),
                needs_partners=self._needs_partners,
                seed=_run_seed(),
            )
        else:
            assert self.train_set is not None
            assert self._train_pairing is not None
            batches = self._batches(self.train_set, self.class_weights)
            shuffle = self.batching.shuffle
            self._sampler = self._plans(self.train_set, self._train_pairing, shuffle=shuffle)
        if "sampler" in self._state:
            self._sampler.load_state(self._state["sampler"])
        if self.train_set is not None:
            self._check_records(self.train_set)
        return self.batching.loader(batches, self._sampler)

    def val_dataloader(self) -> DataLoader[StepBatch] | list[Any]:
        if self.validation_set is None:
            return []
        assert self._validation_pairing is not None
        examples = self.validation_set
        # Held-out loss is weighted as in training; on its own, as its classes ask for.
        weights = self.class_weights or self._resolve_weights(examples)
        plans = self._plans(examples, self._validation_pairing, shuffle=False)
        return self.batching.loader(self._batches(examples, weights), plans)

    def predict_dataloader(self) -> DataLoader[StepBatch]:
        assert self.predict_set is not None
        examples = self.predict_set
        plans = self._plans(examples, unpaired(len(examples)), shuffle=False)
        weights = ClassWeights(desirable=1.0, undesirable=1.0)
        return self.batching.loader(self._batches(examples, weights), plans)

    def _context(self) -> ExecutionContext:
        assert self.trainer is not None
        return ExecutionContext(
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            packed=self._module.policy.packed,
            with_keys=self._module.reference_cache is not None,
        )

    def _plans(self, examples: ExampleSet, pairing: Pairing, *, shuffle: bool) -> PlanSampler:
        return self.batching.plans(
            examples, pairing, self._context(), shuffle=shuffle, seed=_run_seed()
        )

    def _batches(self, examples: ExampleSet, weights: ClassWeights) -> StepBatches:
        return self.batching.batches(examples, weights, self._context())

    def reference_keys(self) -> set[bytes] | None:
        """The keys of all reference log-probs that this run can ask for; None: not known."""
        if self.stream is not None:
            return None
        keys: set[bytes] = set()
        for examples, pairing in (
            (self.train_set, self._train_pairing),
            (self.validation_set, self._validation_pairing),
            # Rewards alone: no mismatched log-prob is ever asked for.
            (self.predict_set, unpaired(len(self.predict_set or ()))),
        ):
            if examples is not None and pairing is not None:
                keys |= all_keys(examples, pairing.partner, max_length=self.max_length)
        return keys

    def facts(self) -> dict[str, Any]:
        """What a model card and `export` need to know of the data, in plain values."""
        source = self.train_set or self.stream
        counts = source.counts if source is not None else None
        template = (
            self.tokenizer.chat_template if self.tokenizer and self.reading.chat_template else None
        )
        return {
            "train": self.train,
            "validation": self.validation,
            "desirable": counts.desirable if counts else None,
            "undesirable": counts.undesirable if counts else None,
            "desirable_weight": self.class_weights.desirable if self.class_weights else None,
            "undesirable_weight": self.class_weights.undesirable if self.class_weights else None,
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "truncation": self.reading.truncation,
            "pairing": self.batching.pairing,
            "tokenizer": self.reading.tokenizer,
            "chat_template": template,
        }

    def state_dict(self) -> dict[str, Any]:
        """Where in the data the run is, in completed optimizer steps."""
        if self._sampler is None:
            return {}
        state: dict[str, Any] = {"sampler": self._sampler.state_dict(**self._steps_done())}
        if self.train_set is not None:
            state["records_checksum"] = self.train_set.checksum()
        return state

    def _steps_done(self) -> dict[str, Any]:
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return {
            "num_steps_done": progress.processed,
            # `limit_train_batches` of them
            "ends_epoch": progress.processed >= self.trainer.num_training_batches,
        }

    def stream_position(self) -> StreamPosition | None:
        """Where a stream goes on after the steps that are done; None: nothing is streamed."""
        if isinstance(self._sampler, StreamSampler):
            return self._sampler.place(**self._steps_done())
        return None

    def location(self, index: int) -> str:
        """Where an example of a batch at hand was written, as `file:line`."""
        if isinstance(self._sampler, StreamSampler):
            return self._sampler.location(index)
        assert self.train_set is not None
        return self.train_set.location(index)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict

    def _check_records(self, examples: ExampleSet) -> None:
        """Refuse to go on with other records than those of which some are done."""
        now = examples.checksum()
        if self._state.get("records_checksum", now) != now:
            raise ConfigError(
                "the checkpoint was saved in a run on other records, or on these in another order: "
                "some would be seen twice and others never. Give the same --data.train as then, or "
                "start a new run from the exported model."
            )


def _run_seed() -> int:
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
