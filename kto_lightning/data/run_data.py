"""What a run reads before its model is loaded: records, tokenized, paired and weighted."""

from functools import partial
from typing import Any

import numpy as np
from lightning import LightningDataModule
from transformers import PreTrainedTokenizerBase

from kto_lightning.batches.class_weights import ClassWeights, check_weights, resolve_weights
from kto_lightning.batches.loader import Batching, PairingKind, check_validation_interval
from kto_lightning.batches.pairing import Pairing
from kto_lightning.batches.sampler import PlanSampler
from kto_lightning.data.dataset import Reading
from kto_lightning.data.rewards import without_rewards
from kto_lightning.data.split import split_by_prompt
from kto_lightning.data.streaming.sampler import StreamSampler
from kto_lightning.data.streaming.stream import (
    ExampleStream,
    check_stream_settings,
    open_stream,
    stream_weights,
)
from kto_lightning.data.tokenize import ExampleSet, Truncation
from kto_lightning.distributed import warn
from kto_lightning.errors import ConfigError, KTOError


class RunData(LightningDataModule):
    """The records of a run: read, tokenized, paired and weighted before the model is loaded.

    What depends on the model is asked of the module that the trainer runs. The arguments are
    `KTODataModule`'s, and explained there.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        validation: float | str | list[str] | None = None,
        predict: str | list[str] | None = None,
        batch_size: int = 8,
        max_tokens: int = 16384,
        max_length: int | None = 1024,
        truncation: Truncation = "keep_start",
        shuffle: bool = True,
        pairing: PairingKind = "distinct_prompts",
        pairing_seed: int = 0,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        num_workers: int = 0,
        preprocessing_workers: int | None = None,
        streaming: bool = False,
        buffer_size: int = 1024,
    ) -> None:
        super().__init__()
        self.train, self.validation, self.predict = train, validation, predict
        self.batch_size, self.max_length = batch_size, max_length
        self.reading = Reading(
            tokenizer=tokenizer,
            chat_template=chat_template,
            max_length=max_length,
            truncation=truncation,
            preprocessing_workers=preprocessing_workers,
        )
        self.batching = Batching(
            batch_size=batch_size,
            max_tokens=max_tokens,
            max_length=max_length,
            shuffle=shuffle,
            pairing=pairing,
            pairing_seed=pairing_seed,
            num_workers=num_workers,
        )
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.train_set: ExampleSet | None = None
        self.validation_set: ExampleSet | None = None
        self.predict_set: ExampleSet | None = None
        self.class_weights: ClassWeights | None = None
        self.warnings: list[str] = []
        """In plain words, for the summary."""
        self._train_pairing: Pairing | None = None
        self._validation_pairing: Pairing | None = None
        self.report_line: str | None = None
        """Where the data report is, for the summary."""
        self.streaming, self.buffer_size = streaming, buffer_size
        self.stream: ExampleStream | None = None
        """What is trained on instead of `train_set`."""
        self._sampler: PlanSampler | StreamSampler | None = None
        self._state: dict[str, Any] = {}
        """Of the run that this one goes on with."""
        self._error: KTOError | None = None

    @property
    def _module(self) -> Any:
        if self.trainer is None:
            raise ConfigError(
                "KTODataModule asks its trainer's KTOModule for tokenizer, loss and weights. Give "
                "it to a trainer: trainer.fit(module, datamodule=data)."
            )
        return self.trainer.lightning_module

    @property
    def _needs_partners(self) -> bool:
        return self._module.loss != "apo_zero_unpaired"

    @property
    def num_steps_per_epoch(self) -> int | None:
        """None: not known, because the records are streamed."""
        if self.streaming:
            return None
        assert self.train_set is not None
        return -(-len(self.train_set) // self.batch_size)

    def longest_sequence(self) -> int | None:
        """Tokens that a sequence of this run may have; None: any number."""
        paired = [s for s in (self.train_set, self.validation_set) if s is not None]
        found = [examples.longest(mismatched=self._needs_partners) for examples in paired]
        if self.predict_set is not None:
            found.append(self.predict_set.longest(mismatched=False))
        if self.stream is None:
            return max(found)
        return None if self.max_length is None else max([self.max_length, *found])

    def prepare_data(self) -> None:
        """Read and tokenize once per machine; the other processes find it in the cache.

        An error waits for `setup`, where every process meets it: one that ended here would leave
        the others waiting.
        """
        if self.trainer is None or self.trainer.state.fn is None:
            return  # `setup` says so
        try:
            self._load(self.trainer.state.fn.value)
        except KTOError as error:
            self._error = error

    def setup(self, stage: str) -> None:
        if self._error is not None:
            raise self._error
        self._load(stage)
        if self.validation_set is None and self.trainer is not None:
            # Lightning would warn of an empty validation loader, at length and every time.
            self.trainer.limit_val_batches = 0

    def _load(self, stage: str) -> None:
        """Records of a stage (`fit`, `validate` or `predict`), read once."""
        if stage == "predict":
            self.predict_set = self.predict_set or self._examples(self._to_predict(), "predict")
            return
        fraction = isinstance(self.validation, (int, float))
        if self.validation_set is None and self.validation is not None and not fraction:
            self.validation_set = self._examples(self.validation, "validation")
        if self.streaming and stage == "fit":
            self.stream = self.stream or self._open_stream()
        elif self.train_set is None and (stage == "fit" or fraction):
            self._load_training_set()
        if stage == "validate" and self.validation_set is None:
            raise ConfigError("--data.validation is needed: a file of records, or a fraction.")
        if self.validation_set is not None and self._validation_pairing is None:
            # Here, so that a held-out set that cannot be paired is refused before the model loads.
            self._validation_pairing = self._pair(self.validation_set)
            self._warn_of_shared_prompts()

    def _warn_of_shared_prompts(self) -> None:
        if self.train_set is None or self.validation_set is None:
            return
        held_out = self.validation_set.prompt_keys
        shared = int(np.isin(held_out, self.train_set.prompt_keys).sum())
        if shared:
            self.warnings.append(
                f"{shared} of {len(held_out)} held-out records have prompts that are trained on "
                "as well, so that val/… says more of what was learnt by heart than of new prompts. "
                "Leave them out, or hold a fraction out: prompts are then divided."
            )

    def _to_predict(self) -> list[str]:
        kept, left_out = without_rewards(self._source(self.predict, "predict"))
        self.warnings += [f"left out {name}, which `predict` wrote." for name in left_out]
        return kept

    def _open_stream(self) -> ExampleStream:
        """What it and its settings cannot give is found out before the model is loaded."""
        assert self.trainer is not None
        module = self._module
        check_stream_settings(self.buffer_size, self.validation, self.trainer)
        module.optimization.check_length(module.num_training_steps())
        weights = module.desirable_weight, module.undesirable_weight
        self.class_weights = stream_weights(*weights)
        return open_stream(
            self._source(self.train, "train"),
            self._the_tokenizer(),
            max_length=self.max_length,
            truncation=self.reading.truncation,
            buffer_size=self.buffer_size,
            batch_size=self.batch_size,
            warn=partial(warn, self.trainer),
        )

    def _load_training_set(self) -> None:
        examples = self._examples(self.train, "train")
        if isinstance(self.validation, (int, float)):
            kept, held_out = split_by_prompt(
                examples.prompt_keys,
                examples.desirable,
                fraction=self.validation,
                seed=self.batching.pairing_seed,
            )
            self.validation_set = examples.select(held_out)
            examples = examples.select(kept)
        self.class_weights = self._resolve_weights(examples)
        self._train_pairing = self._pair(examples)
        self.train_set = examples
        check_validation_interval(self.trainer, self.num_steps_per_epoch)

    def _examples(self, source: float | str | list[str] | None, key: str) -> ExampleSet:
        return self.reading.examples(self._source(source, key), self._the_tokenizer())

    @staticmethod
    def _source(source: float | str | list[str] | None, key: str) -> str | list[str]:
        if source is None:
            raise ConfigError(f"--data.{key} is needed: a file of records.")
        assert not isinstance(source, (int, float))
        return source

    def _the_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            module = self._module
            self.tokenizer = self.reading.load_tokenizer(
                module.policy_name, trust_remote_code=module.trust_remote_code
            )
        return self.tokenizer

    def _resolve_weights(self, examples: ExampleSet) -> ClassWeights:
        counts = examples.counts.desirable, examples.counts.undesirable
        module = self._module
        weights = resolve_weights(
            *counts, desirable=module.desirable_weight, undesirable=module.undesirable_weight
        )
        warning = check_weights(*counts, weights)
        if warning:
            self.warnings.append(warning)
        return weights

    def _pair(self, examples: ExampleSet) -> Pairing:
        keys = examples.prompt_keys
        pairing = self.batching.pair(keys, needs_partners=self._needs_partners)
        if len(pairing.self_paired):
            self.warnings.append(
                "the last block of --data.pairing rotate has a single example, which is paired "
                "with itself as in TRL: its reward counts as its own reference point. "
                "--data.pairing distinct_prompts has no such case."
            )
        return pairing
