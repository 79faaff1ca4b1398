"""The records of a run before its model is loaded: read, tokenized, split, paired and weighted."""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
from lightning import Trainer
from transformers import PreTrainedTokenizerBase

from kto_lightning.batches.class_weights import ClassWeights, imbalance_warning
from kto_lightning.batches.loader import Batching, check_validation_interval
from kto_lightning.batches.objective import Objective
from kto_lightning.batches.packing import example_costs
from kto_lightning.batches.pairing import Pairing, pair_none
from kto_lightning.data.dataset import Reading, summary_of
from kto_lightning.data.examples import ExampleSet
from kto_lightning.data.lost import losses_of
from kto_lightning.data.rewards import exclude_rewards_files
from kto_lightning.data.sources import SourceLike
from kto_lightning.data.split import split_by_prompt
from kto_lightning.data.streaming.stream import (
    ExampleStream,
    check_stream_settings,
    open_stream,
    resolve_stream_weights,
)
from kto_lightning.distributed import warn
from kto_lightning.errors import ModelError


@dataclass(kw_only=True, slots=True)
class PreparedData:
    """Sets of examples with their pairings and weights; each is made by one of the methods.

    The methods raise ConfigError for settings that contradict each other or the records, and
    DataError as `load_records` and `tokenize_records`.
    """

    reading: Reading
    batching: Batching
    objective: Objective
    tokenizer: PreTrainedTokenizerBase
    num_embeddings: dict[str, int]
    """The number of token ids that each model of the run embeds, by its name."""
    end_ids: set[int]
    """The tokens at which the policy stops."""
    train_set: ExampleSet | None = None
    validation_set: ExampleSet | None = None
    predict_set: ExampleSet | None = None
    stream: ExampleStream | None = None
    """Trained on instead of `train_set`."""
    class_weights: ClassWeights | None = None
    train_pairing: Pairing | None = None
    validation_pairing: Pairing | None = None
    readings: list[str] = field(default_factory=list)
    """How records are read where it is not by the names of their columns, for the summary."""
    warnings: list[str] = field(default_factory=list)
    """For the summary, a sentence each."""
    report_line: str | None = None
    """The path of the data report, for the summary."""

    def __post_init__(self) -> None:
        model, size = min(self.num_embeddings.items(), key=lambda item: item[1])
        if len(self.tokenizer) > size:
            self.warnings.append(
                f"{self._too_many_tokens(model, size)}; the records may use none of the others."
            )

    def load_train(
        self, source: SourceLike, validation: float | SourceLike | None, trainer: Trainer
    ) -> None:
        """The training set; if `validation` is a fraction, the validation set is split off it."""
        examples = self._examples(source)
        if isinstance(validation, (int, float)):
            kept, held_out = split_by_prompt(
                examples.prompt_keys,
                examples.desirable,
                fraction=validation,
                seed=self.batching.pairing_seed,
            )
            self.validation_set = examples.select(held_out)
            examples = examples.select(kept)
        self.class_weights = self.weights_of(examples)
        self.train_pairing = self._pair(examples)
        self.train_set = examples
        self._warn_of_long(examples, self.train_pairing)
        check_validation_interval(trainer, self.num_steps_per_epoch)

    def load_stream(
        self,
        source: SourceLike,
        validation: float | SourceLike | None,
        trainer: Trainer,
        *,
        buffer_size: int,
    ) -> None:
        """The stream to train on; no record is read yet."""
        check_stream_settings(buffer_size, validation, self.reading.records, trainer)
        weights = self.objective.desirable_weight, self.objective.undesirable_weight
        self.class_weights = resolve_stream_weights(*weights)
        self.stream = open_stream(
            source,
            self.tokenizer,
            max_length=self.batching.max_length,
            truncation=self.reading.truncation,
            buffer_size=buffer_size,
            batch_size=self.batching.batch_size,
            warn=partial(warn, trainer),
            end_ids=self.end_ids,
            check_id=self._check_id,
            settings=self.reading.records,
        )
        self.readings += self.stream.reader.notes
        limit = self.batching.max_length
        if limit is None or limit > self.batching.max_tokens:
            up_to = "any length" if limit is None else f"up to --data.max_length {limit} tokens"
            self.warnings.append(
                f"records of {up_to} may come in the stream, and one longer than --data.max_tokens "
                f"{self.batching.max_tokens} has a forward of its own, whatever memory that takes. "
                "Lower --data.max_length to truncate them."
            )

    def load_validation(self, source: SourceLike) -> None:
        """The validation set from records of its own."""
        self.validation_set = self._examples(source)

    def pair_validation(self) -> None:
        """Pair the validation set, so that one that cannot be is refused before the model loads."""
        if self.validation_set is None or self.validation_pairing is not None:
            return
        self.validation_pairing = self._pair(self.validation_set)
        self._warn_of_long(self.validation_set, self.validation_pairing)
        if self.train_set is None:
            return
        held_out = self.validation_set.prompt_keys
        shared = int(np.isin(held_out, self.train_set.prompt_keys).sum())
        if shared:
            self.warnings.append(
                f"{shared} of {len(held_out)} held-out records have prompts that are also trained "
                "on, so val/… measures memorised prompts as well as new ones. Remove them from one "
                "side, or give --data.validation a fraction: the split is by prompt."
            )

    def load_predict(self, source: SourceLike) -> None:
        """The records to reward, without the files that an earlier `predict` wrote."""
        kept, skipped = exclude_rewards_files(source)
        self.warnings += [f"skipped {name}, which `predict` wrote." for name in skipped]
        self.predict_set = self._examples(kept, labels_needed=False)
        num_unlabelled = self.predict_set.records.data.column("desirable").null_count
        if 0 < num_unlabelled < len(self.predict_set.records):
            self.warnings.append(
                f"{num_unlabelled} records have no label that can be read: theirs is null."
            )
        self._warn_of_long(self.predict_set, pair_none(len(self.predict_set)))

    @property
    def num_steps_per_epoch(self) -> int | None:
        """Optimizer steps; None: unknown, because the records are streamed."""
        if self.train_set is None:
            return None
        return -(-len(self.train_set) // self.batching.batch_size)

    def paired_sets(self) -> list[tuple[ExampleSet, Pairing]]:
        """All sets that are loaded, with their pairings; `predict` needs no partners."""
        pairs = [
            (self.train_set, self.train_pairing),
            (self.validation_set, self.validation_pairing),
            (self.predict_set, pair_none(len(self.predict_set or ()))),
        ]
        return [(s, pairing) for s, pairing in pairs if s is not None and pairing is not None]

    def longest_sequence(self) -> int | None:
        """The most tokens that a sequence of this run can have; None: no limit."""
        max_length = self.batching.max_length
        if self.stream is not None and max_length is None:
            return None
        found = [
            examples.longest(
                mismatched=self.objective.needs_partners and examples is not self.predict_set
            )
            for examples, _ in self.paired_sets()
        ]
        return max(found if self.stream is None else [*found, max_length or 0])

    def weights_of(self, examples: ExampleSet) -> ClassWeights:
        """The class weights for a set; warns where its effective ratio is out of bounds."""
        counts = examples.counts.desirable, examples.counts.undesirable
        weights = self.objective.class_weights(*counts)
        warning = imbalance_warning(*counts, weights)
        if warning:
            self.warnings.append(warning)
        return weights

    def _warn_of_long(self, examples: ExampleSet, pairing: Pairing) -> None:
        """Warn of examples that no division into micro-batches brings under `max_tokens`."""
        lengths = example_costs(
            examples.prompt_lengths,
            examples.completion_lengths,
            pairing.partner,
            max_length=self.batching.max_length,
        )
        allowed, longest = self.batching.max_tokens, int(lengths.argmax())
        count, most = int((lengths > allowed).sum()), int(lengths[longest])
        if not count:
            return
        have = "record has" if count == 1 else "records have"
        two = " with the longer of its two completions" if pairing.partner is not None else ""
        self.warnings.append(
            f"{count} {have} more than --data.max_tokens {allowed} tokens, the longest {most}{two} "
            f"({examples.location(longest)}). Such a record has a forward of its own: this one "
            f"holds {most / allowed:.3g} times the activations that max_tokens allows, and its "
            f"attention costs {(most / allowed) ** 2:.3g} times that of {allowed} tokens. Lower "
            "--data.max_length to truncate it, or save memory with "
            "--model.activation_checkpointing true."
        )

    def _examples(self, source: SourceLike, *, labels_needed: bool = True) -> ExampleSet:
        examples = self.reading.examples(
            source,
            self.tokenizer,
            max_length=self.batching.max_length,
            labels_needed=labels_needed,
        )
        self._check_id(*examples.largest_id())
        readings = summary_of(examples.records).sentences
        self.readings += [text for text in readings if text not in self.readings]
        end = examples.other_end(self.end_ids, self.tokenizer)
        self.warnings += [loss.sentence for loss in losses_of(examples.lost_parts(), end)]
        return examples

    def _check_id(self, token: int, where: str) -> None:
        """Refuse a token that a model does not embed."""
        for model, size in self.num_embeddings.items():
            if token >= size:
                raise ModelError(
                    f"{where}: {str(self.tokenizer.decode([token]))!r} is token {token}, and "
                    f"{self._too_many_tokens(model, size)}. Use the tokenizer that belongs to the "
                    "model, or resize the model's embeddings and save it again."
                )

    def _too_many_tokens(self, model: str, size: int) -> str:
        name = self.tokenizer.name_or_path
        return (
            f"the tokenizer of {name} has {len(self.tokenizer)} tokens, but the model {model} "
            f"embeds only {size}"
        )

    def _pair(self, examples: ExampleSet) -> Pairing:
        pairing = self.batching.pair(
            examples.prompt_keys, needs_partners=self.objective.needs_partners
        )
        if len(pairing.self_paired):
            self.warnings.append(
                "the last block of --data.pairing rotate has a single example, which is paired "
                "with itself as in TRL: its reward counts as its own reference point. "
                "--data.pairing distinct_prompts has no such case."
            )
        return pairing
