"""`KTODataModule`: from files of records to the loader whose item is one optimizer step."""

import os
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from kto_lightning.data.batches import Pairing, PlanSampler, unpaired
from kto_lightning.data.collate import all_keys
from kto_lightning.data.loaders import Batching, PairingKind, Placement
from kto_lightning.data.reading import Reading
from kto_lightning.data.split import split_by_prompt
from kto_lightning.data.tokenize import ExampleSet, Truncation
from kto_lightning.data.weights import ClassWeights, check_weights, resolve_weights
from kto_lightning.errors import ConfigError, KTOError
from kto_lightning.types import StepBatch


class KTODataModule(LightningDataModule):
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

    Raises:
        ConfigError: if a number is outside what it may be.
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
        self._sampler: PlanSampler | None = None
        self._state: dict[str, int] | None = None
        self._error: KTOError | None = None

    @property
    def _module(self) -> Any:
        assert self.trainer is not None
        return self.trainer.lightning_module

    @property
    def num_steps_per_epoch(self) -> int:
        assert self.train_set is not None
        return -(-len(self.train_set) // self.batch_size)

    def prepare_data(self) -> None:
        """Read and tokenize once per machine; the other processes find it in the cache.

        An error waits for `setup`, where every process meets it: one that ended here would leave
        the others waiting.
        """
        assert self.trainer is not None
        try:
            self._load(str(self.trainer.state.fn))
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
            self.predict_set = self.predict_set or self._examples(self.predict, "predict")
            return
        fraction = isinstance(self.validation, (int, float))
        if self.validation_set is None and self.validation is not None and not fraction:
            self.validation_set = self._examples(self.validation, "validation")
        if self.train_set is None and (stage == "fit" or fraction):
            self._load_training_set()
        if stage == "validate" and self.validation_set is None:
            raise ConfigError("--data.validation is needed: a file of records, or a fraction.")
        if self.validation_set is not None and self._validation_pairing is None:
            # Here, so that a held-out set that cannot be paired is refused before the model loads.
            self._validation_pairing = self._pair(self.validation_set)

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
        self._check_interval()

    def _check_interval(self) -> None:
        """Before the model is loaded; Lightning finds out when the first epoch begins."""
        assert self.trainer is not None
        interval, every = self.trainer.val_check_interval, self.trainer.check_val_every_n_epoch
        if isinstance(interval, int) and every is not None and interval > self.num_steps_per_epoch:
            raise ConfigError(
                f"--trainer.val_check_interval {interval} is more than the "
                f"{self.num_steps_per_epoch} steps of an epoch. Lower it, or count steps over all "
                "epochs with --trainer.check_val_every_n_epoch null."
            )

    def _examples(self, source: float | str | list[str] | None, key: str) -> ExampleSet:
        if source is None:
            raise ConfigError(f"--data.{key} is needed: a file of records.")
        assert not isinstance(source, (int, float))
        if self.tokenizer is None:
            module = self._module
            self.tokenizer = self.reading.load_tokenizer(
                module.policy_name, trust_remote_code=module.trust_remote_code
            )
        return self.reading.examples(source, self.tokenizer)

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
        needs_partners = self._module.loss != "apo_zero_unpaired"
        pairing = self.batching.pair(examples.prompt_keys, needs_partners=needs_partners)
        if len(pairing.self_paired):
            self.warnings.append(
                "the last block of --data.pairing rotate has a single example, which is paired "
                "with itself as in TRL: its reward counts as its own reference point. "
                "--data.pairing distinct_prompts has no such case."
            )
        return pairing

    def train_dataloader(self) -> DataLoader[StepBatch]:
        assert self.train_set is not None
        assert self.class_weights is not None
        assert self._train_pairing is not None
        shuffle = self.batching.shuffle
        self._sampler = self._plans(self.train_set, self._train_pairing, shuffle=shuffle)
        if self._state is not None:
            self._sampler.load_state(self._state)
        return self._loader(self.train_set, self._sampler, self.class_weights)

    def val_dataloader(self) -> DataLoader[StepBatch] | list[Any]:
        if self.validation_set is None:
            return []
        assert self._validation_pairing is not None
        examples = self.validation_set
        # Held-out loss is weighted as in training; on its own, as its classes ask for.
        weights = self.class_weights or self._resolve_weights(examples)
        plans = self._plans(examples, self._validation_pairing, shuffle=False)
        return self._loader(examples, plans, weights)

    def predict_dataloader(self) -> DataLoader[StepBatch]:
        assert self.predict_set is not None
        examples = self.predict_set
        plans = self._plans(examples, unpaired(len(examples)), shuffle=False)
        return self._loader(examples, plans, ClassWeights(desirable=1.0, undesirable=1.0))

    def _placement(self) -> Placement:
        assert self.trainer is not None
        return Placement(
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            packed=self._module.policy.packed,
            with_keys=self._module.reference_cache is not None,
        )

    def _plans(self, examples: ExampleSet, pairing: Pairing, *, shuffle: bool) -> PlanSampler:
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        return self.batching.plans(examples, pairing, self._placement(), shuffle=shuffle, seed=seed)

    def _loader(
        self, examples: ExampleSet, plans: PlanSampler, weights: ClassWeights
    ) -> DataLoader[StepBatch]:
        batches = self.batching.batches(examples, weights, self._placement())
        return self.batching.loader(batches, plans)

    def reference_keys(self) -> set[bytes]:
        """The keys of all reference log-probs that this run can ask for."""
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
        counts = self.train_set.counts if self.train_set is not None else None
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
        assert self.trainer is not None
        if self._sampler is None:
            return {}
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        state = self._sampler.state_dict(num_steps_done=progress.processed)
        if state["start"] >= self.trainer.num_training_batches:  # `limit_train_batches` steps
            state |= {"epoch": state["epoch"] + 1, "start": 0}
        return {"sampler": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict.get("sampler")
