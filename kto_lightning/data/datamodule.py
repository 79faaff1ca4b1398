"""`KTODataModule`: from files of records to the loader whose item is one optimizer step."""

import os
from dataclasses import asdict
from hashlib import sha256
from typing import Any

from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from kto_lightning.batches.class_weights import ClassWeights
from kto_lightning.batches.collate import StepBatches, all_pair_keys
from kto_lightning.batches.loader import Batching, ExecutionContext, PairingKind
from kto_lightning.batches.pairing import Pairing, pair_none
from kto_lightning.batches.sampler import PlanSampler
from kto_lightning.batches.types import StepBatch
from kto_lightning.batches.workers import StepLoader
from kto_lightning.data.columns import Columns
from kto_lightning.data.dataset import Reading
from kto_lightning.data.digests import check_same_records, record_digests
from kto_lightning.data.examples import ExampleSet, Truncation
from kto_lightning.data.labels import Labels
from kto_lightning.data.prepared import PreparedData
from kto_lightning.data.record_settings import RecordSettings, Repeated, Unlabeled
from kto_lightning.data.sources import SourceLike, names_of
from kto_lightning.data.streaming.sampler import StreamedBatches, StreamSampler
from kto_lightning.data.streaming.stream import StreamPosition
from kto_lightning.distributed import raise_together
from kto_lightning.errors import ConfigError, KTOError, check_count, pick_settings
from kto_lightning.models.tokenizer import tokenizer_name


class KTODataModule(LightningDataModule):
    """Records, tokenized, paired with mismatched completions and cut into steps.

    Settings of the model (its tokenizer, the loss, class weights, whether it shares prompts) are
    read from the trainer's `KTOModule`.

    A Python program may also give `tokenizer` as a `transformers.PreTrainedTokenizerBase`, of which
    a copy is used.

    Args:
        train: records to train on: a file (jsonl, json, csv, tsv, parquet, arrow; texts also as
            gz, zst, bz2, xz), a glob of them, a folder of save_to_disk, a hub data set (owner/name,
            owner/name:split or owner/name/config:split), or several of those. From Python also a
            datasets.Dataset, a list of dicts or a pandas DataFrame.
        validation: held-out records: a file like `train`, or a fraction of `train` by prompt; null:
            none.
        predict: records to reward, for the command `predict`.
        batch_size: examples per optimizer step, over all devices.
        max_tokens: tokens per forward on one device; changes memory and speed, never the result.
        max_length: tokens after which prompt + completion is truncated; null: never.
        truncation: keep_start cuts the completion's end; keep_end drops the prompt's start first.
        shuffle: another order in every epoch; false keeps the files' order.
        pairing: where mismatched completions come from: distinct_prompts, or rotate as TRL does.
        pairing_seed: draws the partners of distinct_prompts; apart from the run's seed, so that
            another seed keeps the reference's log-probs.
        tokenizer: a directory or hub id; null: the policy's.
        chat_template: instead of the tokenizer's: a file with a Jinja chat template, the name of
            one of its other templates, or another tokenizer (a directory or hub id).
        num_workers: loader processes per device.
        preprocessing_workers: processes that tokenize; null: as many as there are cores, up to 8.
        columns: columns of the file by the fields of a record, where they have other names; each a
            name or a path such as fields.prompt; null: prompt, completion, label and so on.
        labels: what the values of the label column mean: words (good, bad, neither) or thresholds
            for ratings (at_least, at_most); null: true and false, 1 and 0, yes and no, and so on.
        unlabeled: records without a label are an error, or are left out (skip) and counted.
        chat: make messages of prompts and completions that are plain text.
        format: the tool that exported the files; records reads them as they are; null: recognised
            by their structure.
        repeated: records that judge the same answer to the same prompt: keep all, join them by
            majority, or drop those that disagree (drop_disagreeing) and join the others.
        streaming: read `train` again in every epoch instead of keeping it on disk. Needs explicit
            class weights; bad records are skipped with a warning.
        buffer_size: under streaming, examples per buffer: partners and shuffling stay within one;
            rounded up to whole batches.

    Raises:
        ConfigError: if a number is outside what it may be.
    """

    def __init__(
        self,
        train: SourceLike | None = None,
        validation: float | SourceLike | None = None,
        predict: SourceLike | None = None,
        batch_size: int = 8,
        max_tokens: int = 16384,
        max_length: int | None = 1024,
        truncation: Truncation = "keep_start",
        shuffle: bool = True,
        pairing: PairingKind = "distinct_prompts",
        pairing_seed: int = 0,
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        num_workers: int = 0,
        preprocessing_workers: int | None = None,
        columns: Columns | None = None,
        labels: Labels | None = None,
        unlabeled: Unlabeled = "error",
        chat: bool = False,
        format: str | None = None,
        repeated: Repeated = "keep",
        streaming: bool = False,
        buffer_size: int = 1024,
    ) -> None:
        settings = dict(locals())
        if isinstance(tokenizer, os.PathLike):
            settings["tokenizer"] = os.fspath(tokenizer)
        super().__init__()
        self.train, self.validation, self.predict = train, validation, predict
        self.streaming, self.buffer_size = streaming, buffer_size
        # Each setting has one owner, which checks it.
        records = pick_settings(RecordSettings, settings)
        self.reading = pick_settings(Reading, settings | {"records": records})
        self.batching = pick_settings(Batching, settings)
        check_count("--data.buffer_size", buffer_size)
        _check_validation(validation)
        self._prepared: PreparedData | None = None
        self._sampler: PlanSampler | StreamSampler | None = None
        self._loaders: list[StepLoader] = []
        self._state: dict[str, Any] = {}
        """The state of the run that this one resumes."""
        self._digests: dict[str, Any] | None = None
        self._held_out_digest: str | None = None
        """Of the training set, once they are needed."""
        self._error: KTOError | None = None

    @property
    def prepared(self) -> PreparedData:
        """The records, once `setup` has read them."""
        assert self._prepared is not None
        return self._prepared

    @property
    def _run(self) -> Trainer:
        if self.trainer is None:
            raise ConfigError(
                "KTODataModule asks its trainer's KTOModule for tokenizer, loss and weights. Give "
                "it to a trainer: trainer.fit(module, datamodule=data)."
            )
        return self.trainer

    @property
    def _module(self) -> Any:
        # A `KTOModule`, which is in a higher import layer and cannot be imported here.
        return self._run.lightning_module

    @property
    def num_steps_per_epoch(self) -> int | None:
        """Optimizer steps; None: unknown, because the records are streamed."""
        return None if self.streaming else self.prepared.num_steps_per_epoch

    def longest_sequence(self) -> int | None:
        """The most tokens that a sequence of this run can have; None: no limit."""
        return self.prepared.longest_sequence()

    def prepare_data(self) -> None:
        """Read and tokenize once per machine; the other processes find it in the cache.

        An error is kept for `setup`, where all processes raise it: one that ended here would leave
        the others waiting.
        """
        if self.trainer is None or self.trainer.state.fn is None:
            return  # `setup` raises
        try:
            self._load(self.trainer.state.fn.value)
        except KTOError as error:
            self._error = error

    def setup(self, stage: str) -> None:
        error = self._error
        try:
            if error is None:
                self._load(stage)
        except KTOError as found:
            error = found
        raise_together(error)
        if self.prepared.validation_set is None and self.trainer is not None:
            # Lightning would warn of an empty validation loader in every run.
            self.trainer.limit_val_batches = 0

    def on_exception(self, exception: BaseException) -> None:
        """Let the module give its models back: Lightning calls `teardown` after success only."""
        if self.trainer is not None and self._module is not None:
            self._module.teardown("exception")

    def _load(self, stage: str) -> None:
        """Read the records of a stage (`fit`, `validate` or `predict`), each set once."""
        fraction = isinstance(self.validation, (int, float))
        from_train = stage == "fit" or (stage == "validate" and fraction)
        key = "train" if from_train else "predict" if stage == "predict" else "validation"
        source = self._source(key)
        data = self._prepared = self._prepared or self._begin()
        if stage == "predict":
            if data.predict_set is None:
                data.load_predict(source)
            return
        if data.validation_set is None and self.validation is not None and not fraction:
            data.load_validation(self._source("validation"))
        if stage == "fit" and self.streaming:
            if data.stream is None:
                self._module.optimization.check_num_steps(self._module.num_training_steps())
                data.load_stream(source, self.validation, self._run, buffer_size=self.buffer_size)
        elif from_train and data.train_set is None:
            data.load_train(source, self.validation, self._run)
        data.pair_validation()

    def _source(self, key: str) -> SourceLike:
        source = getattr(self, key)
        if source is None:
            or_fraction = ", or a fraction" if key == "validation" else ""
            raise ConfigError(f"--data.{key} is needed: a file of records{or_fraction}.")
        return source

    def _begin(self) -> PreparedData:
        module = self._module
        settings = module.model_settings
        num_embeddings = settings.vocabulary_sizes()
        tokenizer = self.reading.load_tokenizer(
            settings.policy_files,
            trust_remote_code=settings.trust_remote_code,
            adapter_base=settings.adapter_base,
        )
        return PreparedData(
            reading=self.reading,
            batching=self.batching,
            objective=module.objective,
            tokenizer=tokenizer,
            num_embeddings=num_embeddings,
            end_ids=settings.end_token_ids(tokenizer),
        )

    def train_dataloader(self) -> DataLoader[StepBatch]:
        data = self.prepared
        assert data.class_weights is not None
        if data.stream is not None:
            batches = StreamedBatches(
                batching=self.batching, weights=data.class_weights, context=self._context()
            )
            self._sampler = StreamSampler(
                stream=data.stream,
                batching=self.batching,
                context=self._context(),
                needs_partners=data.objective.needs_partners,
                seed=_run_seed(),
            )
        else:
            assert data.train_set is not None
            assert data.train_pairing is not None
            batches = self._batches(data.train_set, data.class_weights)
            shuffle = self.batching.shuffle
            self._sampler = self._plans(data.train_set, data.train_pairing, shuffle=shuffle)
        if data.train_set is not None:
            self._check_records(data.train_set)
        if "sampler" in self._state:
            try:
                self._sampler.load_state(self._state["sampler"])
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise ConfigError(
                    "the checkpoint does not tell its run's place in the data, or tells a wrong "
                    "one. Give another checkpoint that `fit` wrote."
                ) from error
        return self._loader(batches, self._sampler)

    def val_dataloader(self) -> DataLoader[StepBatch] | list[Any]:
        data, examples = self.prepared, self.prepared.validation_set
        if examples is None:
            return []
        assert data.validation_pairing is not None
        # In `fit` the held-out loss has the weights of training; alone, those of its own classes.
        weights = data.class_weights or data.weights_of(examples)
        plans = self._plans(examples, data.validation_pairing, shuffle=False)
        return self._loader(self._batches(examples, weights), plans)

    def predict_dataloader(self) -> DataLoader[StepBatch]:
        examples = self.prepared.predict_set
        assert examples is not None
        plans = self._plans(examples, pair_none(len(examples)), shuffle=False)
        weights = ClassWeights(desirable=1.0, undesirable=1.0)
        return self._loader(self._batches(examples, weights), plans)

    def _loader(
        self, batches: StepBatches | StreamedBatches, plans: PlanSampler | StreamSampler
    ) -> StepLoader:
        loader = self.batching.loader(batches, plans)
        self._loaders.append(loader)
        return loader

    def has_lost_worker(self) -> bool:
        """Whether a loader process of this rank was killed; its batches are made without it."""
        return any(loader.lost_worker for loader in self._loaders)

    def _context(self) -> ExecutionContext:
        return ExecutionContext(
            rank=self._run.global_rank,
            world_size=self._run.world_size,
            shares_prompts=self._module.policy.shares_prompts,
            with_keys=self._module.model_settings.reference_cache is not None,
        )

    def _plans(self, examples: ExampleSet, pairing: Pairing, *, shuffle: bool) -> PlanSampler:
        return self.batching.plans(
            examples, pairing, self._context(), shuffle=shuffle, seed=_run_seed()
        )

    def _batches(self, examples: ExampleSet, weights: ClassWeights) -> StepBatches:
        return self.batching.batches(examples, weights, self._context())

    def reference_keys(self) -> set[bytes] | None:
        """The cache keys of all reference log-probs that this run can need; None: unknown."""
        if self.prepared.stream is not None:
            return None
        max_length = self.batching.max_length
        sets = self.prepared.paired_sets()
        return set().union(
            *(
                all_pair_keys(examples, pairs.partner, max_length=max_length)
                for examples, pairs in sets
            )
        )

    def facts(self) -> dict[str, Any]:
        """What a model card and `export` need to know of the data, in plain values."""
        data = self.prepared
        source = data.train_set or data.stream
        counts = source.counts if source is not None else None
        weights = data.class_weights
        return {
            "train": _names(self.train),
            "validation": _names(self.validation),
            "held_out": self._held_out(),
            "desirable": counts.desirable if counts else None,
            "undesirable": counts.undesirable if counts else None,
            "desirable_weight": weights.desirable if weights else None,
            "undesirable_weight": weights.undesirable if weights else None,
            "batch_size": self.batching.batch_size,
            "max_length": self.batching.max_length,
            "truncation": self.reading.truncation,
            "shuffle": self.batching.shuffle,
            "pairing": self.batching.pairing,
            "pairing_seed": self.batching.pairing_seed,
            "streaming": self.streaming,
            **asdict(self.reading.records),
            **self._tokenizer_facts(),
            "chat_template": data.tokenizer.chat_template if self.reading.chat_template else None,
        }

    def _tokenizer_facts(self) -> dict[str, Any]:
        tokenizer = self.reading.tokenizer
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            return {"tokenizer": tokenizer_name(tokenizer), "tokenizer_in_memory": True}
        return {"tokenizer": tokenizer}

    def state_dict(self) -> dict[str, Any]:
        """The run's position in the data, in completed optimizer steps."""
        if self._sampler is None:
            return {}
        state: dict[str, Any] = {"sampler": self._sampler.state_dict(**self._steps_done())}
        if self.prepared.train_set is not None:
            state["records_checksum"] = self.prepared.train_set.checksum()
            state["records"] = self._digests_of(self.prepared.train_set)
        return state

    def _steps_done(self) -> dict[str, Any]:
        progress: Any = self._run.fit_loop.epoch_loop.batch_progress.current
        return {
            "num_steps_done": progress.processed,
            # `limit_train_batches` of them
            "ends_epoch": progress.processed >= self._run.num_training_batches,
        }

    def stream_position(self) -> StreamPosition | None:
        """Where a resumed run continues in the stream; None: nothing is streamed."""
        if isinstance(self._sampler, StreamSampler):
            return self._sampler.position_after(**self._steps_done())
        return None

    def location(self, index: int) -> str:
        """The place of an example of the current batch, as `file:line`."""
        if isinstance(self._sampler, StreamSampler):
            return self._sampler.location(index)
        assert self.prepared.train_set is not None
        return self.prepared.train_set.location(index)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict

    def _check_records(self, examples: ExampleSet) -> None:
        """Refuse to resume with other records than the checkpoint's run had."""
        digests = self._state.get("records")
        if isinstance(digests, dict):
            check_same_records(digests, self._digests_of(examples))
        now = examples.checksum()
        if self._state.get("records_checksum", now) != now:
            raise ConfigError(
                "the checkpoint was saved in a run on other records, or on these in another order: "
                "some would be seen twice and others never. Give the same --data.train as then, or "
                "start a new run from the exported model."
            )

    def _held_out(self) -> str | None:
        """The held-out records by their content; None: none are held out."""
        examples = self.prepared.validation_set
        if examples is None:
            return None
        if self._held_out_digest is None:
            self._held_out_digest = sha256(str(record_digests(examples)).encode()).hexdigest()[:12]
        return f"{len(examples)} records (digest {self._held_out_digest})"

    def _digests_of(self, examples: ExampleSet) -> dict[str, Any]:
        if self._digests is None:
            self._digests = record_digests(examples)
        return self._digests


def _names(source: float | SourceLike | None) -> float | str | list[str] | None:
    return source if source is None or isinstance(source, int | float) else names_of(source)


def _check_validation(validation: Any) -> None:
    if not isinstance(validation, bool | str):
        return
    is_flag = isinstance(validation, bool) or str(validation).lower() in ("true", "false")
    if is_flag and not os.path.exists(str(validation)):
        raise ConfigError(
            "--data.validation must be a file of records or a fraction such as 0.1, got "
            f"{str(validation).lower()}."
        )


def _run_seed() -> int:
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
