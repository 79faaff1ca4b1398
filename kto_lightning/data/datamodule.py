"""`KTODataModule`: from files of records to the loader whose item is one optimizer step."""

import os
from typing import Any, Literal

import numpy as np
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
from kto_lightning.data.collate import StepBatches
from kto_lightning.data.packing import example_costs
from kto_lightning.data.records import load_records
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
        self.train = train
        self.batch_size, self.max_tokens, self.max_length = batch_size, max_tokens, max_length
        self.truncation: Truncation = truncation
        self.shuffle = shuffle
        self.pairing_kind: PairingKind = pairing
        self.pairing_seed = pairing_seed
        self.tokenizer_name, self.chat_template = tokenizer, chat_template
        self.num_workers, self.preprocessing_workers = num_workers, preprocessing_workers
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.train_set: ExampleSet | None = None
        self.pairing: Pairing | None = None
        self.class_weights: ClassWeights | None = None
        self.warnings: list[str] = []
        """In plain words, for the summary."""
        self._sampler: PlanSampler | None = None
        self._state: dict[str, int] | None = None
        self._check_settings()

    def _check_settings(self) -> None:
        for name in ("batch_size", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--data.{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"--data.max_length must be at least 2, got {self.max_length}.")
        if self.num_workers < 0:
            raise ConfigError(f"--data.num_workers must be at least 0, got {self.num_workers}.")

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
        self._load()

    def setup(self, stage: str) -> None:
        self._load()

    def _load(self) -> None:
        if self.train_set is not None:
            return
        if self.train is None:
            raise ConfigError("--data.train is needed: a file of records to train on.")
        records = load_records(self.train)
        self.tokenizer = self._load_tokenizer()
        self.train_set = tokenize_records(
            records,
            self.tokenizer,
            max_length=self.max_length,
            truncation=self.truncation,
            num_workers=self.preprocessing_workers,
        )
        self.class_weights = self._resolve_weights(self.train_set)
        self.pairing = self._pair(self.train_set)

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

    def _pair(self, examples: ExampleSet) -> Pairing:
        if self._module.loss == "apo_zero_unpaired":
            return unpaired(len(examples))
        if self.pairing_kind == "rotate":
            pairing = pair_rotate(len(examples), self.batch_size)
        else:
            seed = self.pairing_seed if self.shuffle else None
            pairing = pair_distinct_prompts(examples.prompt_keys, seed=seed)
        if len(pairing.self_paired):
            self.warnings.append(
                "the last block of --data.pairing rotate has a single example, which is paired "
                "with itself as in TRL: its reward counts as its own reference point. "
                "--data.pairing distinct_prompts has no such case."
            )
        return pairing

    def train_dataloader(self) -> DataLoader[StepBatch]:
        assert self.train_set is not None
        assert self.pairing is not None
        assert self.class_weights is not None
        assert self.trainer is not None
        packed = self._module.policy.packed
        self._sampler = PlanSampler(
            pairing=self.pairing,
            costs=self._costs(self.train_set, self.pairing),
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            shuffle=self.shuffle,
            seed=int(os.environ.get("PL_GLOBAL_SEED", "0")),
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            padded=not packed,
        )
        if self._state is not None:
            self._sampler.load_state(self._state)
        batches = StepBatches(
            examples=self.train_set,
            desirable_weight=self.class_weights.desirable,
            undesirable_weight=self.class_weights.undesirable,
            max_length=self.max_length,
            can_share_prompts=packed,
        )
        return DataLoader(
            batches,
            batch_size=None,
            sampler=self._sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _costs(self, examples: ExampleSet, pairing: Pairing) -> np.ndarray:
        return example_costs(
            examples.prompt_lengths,
            examples.completion_lengths,
            pairing.partner,
            max_length=self.max_length,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where in the data the run is, in completed optimizer steps."""
        assert self.trainer is not None
        if self._sampler is None:
            return {}
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return {"sampler": self._sampler.state_dict(num_steps_done=progress.processed)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict.get("sampler")
