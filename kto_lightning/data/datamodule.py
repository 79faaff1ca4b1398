"""`KTODataModule`: from files of records to the loader whose item is one optimizer step."""

import os
from typing import Any, Literal

from lightning import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from kto_lightning.data.batches import (
    Pairing,
    PlanSampler,
    pair_distinct_prompts,
    pair_rotate,
    unpaired,
)
from kto_lightning.data.collate import StepBatches, all_keys
from kto_lightning.data.packing import example_costs
from kto_lightning.data.records import load_records
from kto_lightning.data.split import split_by_prompt
from kto_lightning.data.tokenize import ExampleSet, Truncation, tokenize_records
from kto_lightning.data.weights import ClassWeights, check_weights, resolve_weights
from kto_lightning.errors import ConfigError, ModelError
from kto_lightning.models import load_tokenizer, vocabulary_size
from kto_lightning.types import StepBatch

PairingKind = Literal["distinct_prompts", "rotate"]


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
        self.batch_size, self.max_tokens, self.max_length = batch_size, max_tokens, max_length
        self.truncation: Truncation = truncation
        self.shuffle = shuffle
        self.pairing_kind: PairingKind = pairing
        self.pairing_seed = pairing_seed
        self.tokenizer_name, self.chat_template = tokenizer, chat_template
        self.num_workers, self.preprocessing_workers = num_workers, preprocessing_workers
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
        self._check_settings()

    def _check_settings(self) -> None:
        for name in ("batch_size", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--data.{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"--data.max_length must be at least 2, got {self.max_length}.")
        for name in ("num_workers", "pairing_seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--data.{name} must be at least 0, got {getattr(self, name)}.")
        if self.preprocessing_workers is not None and self.preprocessing_workers < 1:
            raise ConfigError(
                "--data.preprocessing_workers must be at least 1, or null to choose, got "
                f"{self.preprocessing_workers}."
            )

    @property
    def _module(self) -> Any:
        assert self.trainer is not None
        return self.trainer.lightning_module

    @property
    def num_steps_per_epoch(self) -> int:
        assert self.train_set is not None
        return -(-len(self.train_set) // self.batch_size)

    def prepare_data(self) -> None:
        """Read and tokenize once per machine; the other processes find it in the cache."""
        assert self.trainer is not None
        self._load(str(self.trainer.state.fn))

    def setup(self, stage: str) -> None:
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

    def _load_training_set(self) -> None:
        examples = self._examples(self.train, "train")
        if isinstance(self.validation, (int, float)):
            kept, held_out = split_by_prompt(
                examples.prompt_keys,
                examples.desirable,
                fraction=self.validation,
                seed=self.pairing_seed,
            )
            self.validation_set = examples.select(held_out)
            examples = examples.select(kept)
        self.class_weights = self._resolve_weights(examples)
        self._train_pairing = self._pair(examples, shuffle=self.shuffle)
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
        records = load_records(source)
        self.tokenizer = self.tokenizer or self._load_tokenizer()
        return tokenize_records(
            records,
            self.tokenizer,
            max_length=self.max_length,
            truncation=self.truncation,
            num_workers=self.preprocessing_workers,
        )

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        module = self._module
        name = self.tokenizer_name or module.policy_name
        known = vocabulary_size(module.policy_name, trust_remote_code=module.trust_remote_code)
        tokenizer = load_tokenizer(
            name, chat_template=self.chat_template, trust_remote_code=module.trust_remote_code
        )
        if len(tokenizer) > known:
            raise ModelError(
                f"the tokenizer of {name} has {len(tokenizer)} tokens, but the model "
                f"{module.policy_name} embeds only {known}. Use the tokenizer that belongs to the "
                "model, or resize the model's embeddings and save it again."
            )
        return tokenizer

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

    def _pair(self, examples: ExampleSet, *, shuffle: bool) -> Pairing:
        if self._module.loss == "apo_zero_unpaired":
            return unpaired(len(examples))
        if self.pairing_kind == "distinct_prompts":
            seed = self.pairing_seed if shuffle else None
            return pair_distinct_prompts(examples.prompt_keys, seed=seed)
        pairing = pair_rotate(len(examples), self.batch_size)
        if len(pairing.self_paired):
            self.warnings.append(
                "the last block of --data.pairing rotate has a single example, which is paired "
                "with itself as in TRL: its reward counts as its own reference point. "
                "--data.pairing distinct_prompts has no such case."
            )
        return pairing

    def _pair_validation(self) -> Pairing:
        """Drawn once: the loader and the reference cache ask for it."""
        assert self.validation_set is not None
        if self._validation_pairing is None:
            self._validation_pairing = self._pair(self.validation_set, shuffle=self.shuffle)
        return self._validation_pairing

    def train_dataloader(self) -> DataLoader[StepBatch]:
        assert self.train_set is not None
        assert self.class_weights is not None
        assert self._train_pairing is not None
        self._sampler = self._plans(self.train_set, self._train_pairing, shuffle=self.shuffle)
        if self._state is not None:
            self._sampler.load_state(self._state)
        return self._loader(self.train_set, self._sampler, self.class_weights)

    def val_dataloader(self) -> DataLoader[StepBatch] | list[Any]:
        if self.validation_set is None:
            return []
        examples = self.validation_set
        # Held-out loss is weighted as in training; on its own, as its classes ask for.
        weights = self.class_weights or self._resolve_weights(examples)
        pairing = self._pair_validation()
        return self._loader(examples, self._plans(examples, pairing, shuffle=False), weights)

    def predict_dataloader(self) -> DataLoader[StepBatch]:
        assert self.predict_set is not None
        examples = self.predict_set
        plans = self._plans(examples, unpaired(len(examples)), shuffle=False)
        return self._loader(examples, plans, ClassWeights(desirable=1.0, undesirable=1.0))

    def _plans(self, examples: ExampleSet, pairing: Pairing, *, shuffle: bool) -> PlanSampler:
        assert self.trainer is not None
        costs = example_costs(
            examples.prompt_lengths,
            examples.completion_lengths,
            pairing.partner,
            max_length=self.max_length,
        )
        return PlanSampler(
            pairing=pairing,
            costs=costs,
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            shuffle=shuffle,
            seed=int(os.environ.get("PL_GLOBAL_SEED", "0")),
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            padded=not self._module.policy.packed,
        )

    def reference_keys(self) -> set[bytes]:
        """The keys of all reference log-probs that this run can ask for."""
        keys: set[bytes] = set()
        validation_pairing = self._pair_validation() if self.validation_set is not None else None
        for examples, pairing in (
            (self.train_set, self._train_pairing),
            (self.validation_set, validation_pairing),
            # Rewards alone: no mismatched log-prob is ever asked for.
            (self.predict_set, unpaired(len(self.predict_set or ()))),
        ):
            if examples is not None and pairing is not None:
                keys |= all_keys(examples, pairing.partner, max_length=self.max_length)
        return keys

    def _batches(self, examples: ExampleSet, weights: ClassWeights) -> StepBatches:
        return StepBatches(
            examples=examples,
            desirable_weight=weights.desirable,
            undesirable_weight=weights.undesirable,
            max_length=self.max_length,
            can_share_prompts=self._module.policy.packed,
            with_keys=self._module.reference_cache is not None,
        )

    def _loader(
        self, examples: ExampleSet, plans: PlanSampler, weights: ClassWeights
    ) -> DataLoader[StepBatch]:
        batches = self._batches(examples, weights)
        return DataLoader(
            batches,
            batch_size=None,
            sampler=plans,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def facts(self) -> dict[str, Any]:
        """What a model card and `export` need to know of the data, in plain values."""
        counts = self.train_set.counts if self.train_set is not None else None
        template = self.tokenizer.chat_template if self.tokenizer and self.chat_template else None
        return {
            "train": self.train,
            "validation": self.validation,
            "desirable": counts.desirable if counts else None,
            "undesirable": counts.undesirable if counts else None,
            "desirable_weight": self.class_weights.desirable if self.class_weights else None,
            "undesirable_weight": self.class_weights.undesirable if self.class_weights else None,
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "truncation": self.truncation,
            "pairing": self.pairing_kind,
            "tokenizer": self.tokenizer_name,
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
