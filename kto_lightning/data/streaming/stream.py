"""`ExampleStream`: records read and tokenized anew in every epoch, without a copy on disk."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal
from zlib import crc32

import numpy as np
from jaxtyping import Int64
from lightning import Trainer
from transformers import PreTrainedTokenizerBase

from kto_lightning.batches.class_weights import ClassWeights, resolve_weights
from kto_lightning.data.examples import Truncation, decode_token, truncate_prompts
from kto_lightning.data.lost import LostPart, OtherEnd, losses_of
from kto_lightning.data.reader import RecordReader
from kto_lightning.data.record_settings import RecordSettings
from kto_lightning.data.records import Record, record_to_json
from kto_lightning.data.rows import BadRecord, SkippedRow
from kto_lightning.data.sources import SourceLike, expand
from kto_lightning.data.streaming.buffers import StreamedExample
from kto_lightning.data.template_limits import TemplateLimitError
from kto_lightning.data.tokenize import template_limit_error, tokenize_json_records, tokenizer_error
from kto_lightning.errors import ConfigError, DataError

_CHUNK = 64
"""Records tokenized in one call."""
_NUM_SHOWN = 5
MAX_BAD = 100
"""A stream with so many bad records, and more bad than usable ones, is an error: it is the wrong
file or form, and not a few damaged lines."""


@dataclass(kw_only=True, slots=True)
class StreamPosition:
    """Where to resume in an epoch of a stream; plain numbers, saved in checkpoints."""

    epoch: int = 0
    step: int = 0
    """The next step."""
    buffer: int = 0
    """The number of the buffer that contains `step`."""
    records: int = 0
    """Usable records before that buffer."""
    checksum: int = 0
    """CRC-32 of these records."""


@dataclass(kw_only=True, slots=True)
class StreamCounts:
    """Counts of the current epoch in this process.

    Records before the place where a run was resumed are not tokenized: only `records` and `bad`
    count them.
    """

    records: int = 0
    """Usable records."""
    bad: int = 0
    """Records that are invalid, or that cannot be turned into tokens."""
    dropped: int = 0
    """Usable records whose prompt fills `max_length`."""
    desirable: int = 0
    undesirable: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows by the reason why they are left out."""
    lost_parts: dict[str, int] = field(default_factory=dict)
    """Parts of records that their tokens lack, such as `reasoning of completion`."""
    other_ends: int = 0
    """Completions that do not end with a token at which the model stops."""
    guessed_prompts: int = 0
    """Pairs whose prompt was cut from their answers without a sign of where it ends."""
    messages_left: int = 0
    """Conversations with messages after the assistant's last one."""

    def __str__(self) -> str:
        return (
            f"{self.records} records read in the last epoch, {self.desirable} desirable and "
            f"{self.undesirable} undesirable ones tokenized, {self.dropped} dropped; bad records "
            f"skipped: {self.bad}"
            + "".join(f"; left out, {why}: {n}" for why, n in self.left_out.items())
            + "".join(f"; without the {name}: {n}" for name, n in self.lost_parts.items())
        )


@dataclass(kw_only=True, eq=False)
class ExampleStream:
    """The examples of a source, read in every epoch; bad records are skipped with a warning."""

    source: SourceLike
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    truncation: Truncation
    buffer_size: int
    """Examples per buffer, a multiple of the batch size."""
    warn: Callable[[str], None]
    end_ids: set[int]
    """The tokens at which the policy stops."""
    check_id: Callable[[int, str], None]
    """Raises ModelError if no model embeds the token; the second argument is its place."""
    settings: RecordSettings = field(default_factory=RecordSettings)
    reader: RecordReader = field(init=False)
    """Kept, so that the label column is searched for numbers once, not in every epoch."""
    counts: StreamCounts = field(default_factory=StreamCounts, init=False)
    _num_shown: int = field(default=0, init=False)
    _whole_checksum: int | None = field(default=None, init=False)
    """CRC-32 of all usable records in the latest epoch that was read to its end."""
    _reported: set[str] = field(default_factory=set, init=False)
    """What is reported once, such as each kind of lost part."""

    def __post_init__(self) -> None:
        self.reader = RecordReader(expand(self.source), self.settings, streaming=True)

    def examples(self, start: StreamPosition) -> Iterator[StreamedExample]:
        """The examples of an epoch, in file order, from the first one of `start`'s buffer.

        Raises:
            DataError: if the source cannot be read, has nothing to train on, or too many bad
                records (`MAX_BAD`).
            ConfigError: if the records before `start` are not those of the checkpoint.
            ModelError: if the tokenizer lacks what the records need.
        """
        self.counts = StreamCounts()
        records = islice(self._usable_records(), start.records, None)
        any_example = start.records > 0
        checked = not any_example
        while chunk := list(islice(records, _CHUNK)):
            if not checked and chunk[0].checksum != start.checksum:
                break
            checked = True
            for example in self._tokenize(chunk):
                any_example = True
                yield example
        if not checked:
            raise ConfigError(
                "cannot resume within an epoch: the records of --data.train before the "
                "checkpoint's place in the stream are not those that were read then. Use the same "
                "files, or start a new run from the exported model."
            )
        if not any_example:
            raise DataError(
                f"None of the {self.counts.records + self.counts.bad} records in the stream can be "
                f"trained on: {self.counts.bad} are bad, {self.counts.dropped} have a prompt "
                f"that fills --data.max_length {self.max_length}. Run `inspect` on them."
            )

    def _usable_records(self) -> Iterator["_UsableRecord"]:
        checksum = 0
        for record in self.reader.read():
            if isinstance(record, BadRecord):
                self._count_bad(str(record))
                continue
            if isinstance(record, SkippedRow):
                self.counts.left_out[record.why] = self.counts.left_out.get(record.why, 0) + 1
                continue
            text = record_to_json(record)
            yield _UsableRecord(
                record=record, text=text, index=self.counts.records, checksum=checksum
            )
            self.counts.records += 1
            checksum = crc32(f"{record.desirable} {record.weight} {text}".encode(), checksum)
            if record.prompt_guessed and record.desirable:
                self.counts.guessed_prompts += 1
                self._warn_once(
                    "a guessed prompt",
                    f"{record.location}: a pair without a prompt of its own: what both answers "
                    "begin with was taken, up to a whole word.",
                )
            if record.messages_left:
                self.counts.messages_left += 1
                self._warn_once(
                    "messages left",
                    f"{record.location}: messages follow the assistant's last turn, which the "
                    "label is taken for; they are not used.",
                )
        if self._whole_checksum not in (None, checksum):
            self.warn(
                "the records of --data.train have changed since the last epoch. To resume within "
                "an epoch, the files must be as they were in it."
            )
        self._whole_checksum = checksum

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._reported:
            self._reported.add(key)
            self.warn(f"{message} Further ones are only counted.")

    def _count_bad(self, message: str) -> None:
        self.counts.bad += 1
        if self._num_shown < _NUM_SHOWN:
            self._num_shown += 1
            more = " Further ones are only counted." if self._num_shown == _NUM_SHOWN else ""
            self.warn(f"skipped: {message}{more}")
        if self.counts.bad >= MAX_BAD and self.counts.bad > self.counts.records:
            self.reader.check_paths()
            raise DataError(
                f"{self.counts.bad} bad records and {self.counts.records} usable ones so far, the "
                f"latest {message}\n--data.streaming skips bad records, but so many mean that the "
                "file or its form is wrong. Run `inspect` on it."
            )

    def _tokenize(self, chunk: list["_UsableRecord"]) -> Iterator[StreamedExample]:
        texts = [usable.text for usable in chunk]
        try:
            columns = tokenize_json_records(texts, list(range(len(chunk))), self.tokenizer)
        except TemplateLimitError as error:
            where = chunk[error.row or 0].record.location
            raise template_limit_error(where, error.what, self.tokenizer) from None
        prompts, completions = columns["prompt_ids"], columns["completion_ids"]
        prompt_lengths, completion_lengths = map(_lengths, (prompts, completions))
        kept, dropped = truncate_prompts(
            prompt_lengths, completion_lengths, self.max_length, self.truncation
        )
        for row, usable in enumerate(chunk):
            record = usable.record
            location = record.location
            if columns["fault"][row] is not None:
                self._count_fault(columns["fault"][row], location)
                continue
            if dropped[row]:
                self.counts.dropped += 1
                continue
            self._count(record)
            self.check_id(columns["max_id"][row], location)
            self._audit(columns["lost_parts"][row], columns["end_id"][row], location)
            yield StreamedExample(
                index=usable.index,
                prompt_ids=prompts[row][len(prompts[row]) - int(kept[row]) :],
                completion_ids=completions[row],
                desirable=bool(record.desirable),
                weight=record.weight,
                prompt_key=columns["prompt_key"][row],
                location=location,
                checksum=usable.checksum,
            )

    def _count_fault(self, fault: str, location: str) -> None:
        error = tokenizer_error(fault, location, self.tokenizer)
        if error is not None:
            raise error
        self._count_bad(f"{location}: it cannot be turned into tokens: {fault}")

    def _audit(self, lost: list[str], end: int, location: str) -> None:
        """Count what an example's tokens lack, and say so when it is met first."""
        parts, other_end = self.counts.lost_parts, None
        for name in lost:
            parts[name] = parts.get(name, 0) + 1
        if end not in self.end_ids:
            self.counts.other_ends += 1
            other_end = OtherEnd(
                token=decode_token(end, self.tokenizer),
                end_tokens=[decode_token(token, self.tokenizer) for token in sorted(self.end_ids)],
                count=1,
                first=location,
            )
        new = [LostPart(name=name, count=1, first=location) for name in lost]
        for loss in losses_of(new, other_end):
            self._warn_once(loss.what.removesuffix(location), loss.sentence)

    def _count(self, record: Record) -> None:
        if record.desirable:
            self.counts.desirable += 1
        else:
            self.counts.undesirable += 1


@dataclass(kw_only=True, slots=True)
class _UsableRecord:
    """A record about to be tokenized."""

    record: Record
    text: str
    index: int
    checksum: int
    """CRC-32 of all usable records before this one."""


def _lengths(ids: list[np.ndarray]) -> Int64[np.ndarray, " records"]:
    return np.array([len(row) for row in ids], dtype=np.int64)


def open_stream(
    source: SourceLike,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation: Truncation,
    buffer_size: int,
    batch_size: int,
    warn: Callable[[str], None],
    end_ids: set[int],
    check_id: Callable[[int, str], None],
    settings: RecordSettings | None = None,
) -> ExampleStream:
    """Open the stream of a source and read its first example, so that errors come before training.

    Raises:
        DataError, ModelError: as `ExampleStream.examples`.
    """
    stream = ExampleStream(
        source=source,
        tokenizer=tokenizer,
        max_length=max_length,
        truncation=truncation,
        buffer_size=-(-buffer_size // batch_size) * batch_size,
        warn=warn,
        end_ids=end_ids,
        check_id=check_id,
        settings=settings or RecordSettings(),
    )
    silent = replace(stream, warn=lambda _: None)
    silent.reader = stream.reader
    next(silent.examples(StreamPosition()))
    return stream


def check_stream_settings(
    buffer_size: int, validation: object, settings: RecordSettings, trainer: Trainer
) -> None:
    """Check the settings of a streamed run before its model is loaded.

    Raises:
        ConfigError: if the buffer has no room for partners, or a setting needs all records at once
            or is a fraction of the records or steps, whose number is unknown.
    """
    if settings.repeated != "keep":
        raise ConfigError(
            f"--data.repeated {settings.repeated} compares all records, which --data.streaming "
            "true does not keep. Leave out one of the two."
        )
    if buffer_size < 2:
        raise ConfigError(
            f"--data.buffer_size must be at least 2, got {buffer_size}: partners come from it."
        )
    if isinstance(validation, (int, float)):
        raise ConfigError(
            f"--data.validation {validation:g} is a fraction of records that --data.streaming true "
            "has not counted. Give a file of held-out records."
        )
    for name in ("limit_train_batches", "val_check_interval"):
        fraction = getattr(trainer, name)
        if isinstance(fraction, float) and fraction != 1.0:
            raise ConfigError(
                f"--trainer.{name} {fraction:g} is a fraction of an epoch whose length "
                "--data.streaming true does not know. Give a number of steps."
            )


def resolve_stream_weights(
    desirable: Literal["auto"] | float, undesirable: Literal["auto"] | float
) -> ClassWeights:
    """The given class weights: `auto` needs counts, which a stream has not before it is read.

    Raises:
        ConfigError: if one of them is `auto`.
    """
    if desirable == "auto" or undesirable == "auto":
        raise ConfigError(
            "--data.streaming true cannot count the records, as `auto` class weights need. Give "
            "--model.desirable_weight and --model.undesirable_weight: `inspect FILE` recommends "
            "them, also from a part of the records."
        )
    return resolve_weights(1, 1, desirable=desirable, undesirable=undesirable)
