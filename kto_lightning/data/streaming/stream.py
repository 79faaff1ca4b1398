"""Records read and tokenized on the fly in every epoch: for sources too big to be kept twice."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal
from zlib import crc32

import numpy as np
from jaxtyping import Int64
from transformers import PreTrainedTokenizerBase

from kto_lightning.batches.class_weights import ClassWeights, resolve_weights
from kto_lightning.data.dataset import BadRecord, Record, read_records
from kto_lightning.data.examples import Truncation, truncate_prompts
from kto_lightning.data.records import encode
from kto_lightning.data.streaming.buffers import StreamedExample
from kto_lightning.data.tokenize import lacking_in_tokenizer, tokenize_texts
from kto_lightning.errors import ConfigError, DataError

_CHUNK = 64
"""Records that are tokenized at a time."""
_MOST_SHOWN = 5
MOST_BAD = 100
"""From so many bad records on, a stream with more bad than good ones is given up: that is the wrong
file or the wrong form, and not a few spoilt lines."""


@dataclass(kw_only=True, slots=True)
class StreamPosition:
    """Where an epoch of a stream goes on, in numbers that a checkpoint holds."""

    epoch: int = 0
    step: int = 0
    """The next one."""
    buffer: int = 0
    """The one that `step` is in."""
    records: int = 0
    """Usable records before that buffer."""
    checksum: int = 0
    """Of these."""


@dataclass(kw_only=True, slots=True)
class StreamCounts:
    """What this process has met in an epoch so far; what a resumed run skips is only `records`."""

    records: int = 0
    """Usable ones."""
    bad: int = 0
    """Those that are not, or that the tokenizer's template cannot render."""
    dropped: int = 0
    """Without a token, or with a prompt that fills `max_length`."""
    desirable: int = 0
    undesirable: int = 0

    def __str__(self) -> str:
        return (
            f"{self.records} records read in the last epoch, {self.desirable} desirable and "
            f"{self.undesirable} undesirable ones tokenized, {self.dropped} dropped; {self.bad} "
            "bad ones left out"
        )


@dataclass(kw_only=True, eq=False)
class ExampleStream:
    """The examples of a source, over and over; bad records are warned of when they are met."""

    source: str | list[str]
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    truncation: Truncation
    buffer_size: int
    """Examples among which partners are found, a multiple of the batch's."""
    warn: Callable[[str], None]
    counts: StreamCounts = field(default_factory=StreamCounts, init=False)
    _num_shown: int = field(default=0, init=False)

    def examples(self, start: StreamPosition) -> Iterator[StreamedExample]:
        """The examples of an epoch, in the order of the files, from the buffer of `start` on.

        Raises:
            DataError: if the source cannot be read, holds nothing to train on, or almost only bad
                records (`MOST_BAD`).
            ConfigError: if the records before `start` are not those that were there.
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
            for example in self._tokenized(chunk):
                any_example = True
                yield example
        if not checked:
            raise ConfigError(
                "cannot go on within an epoch: the records of --data.train before the checkpoint's "
                "place in the stream are not those that were read then. Use the same files, or "
                "start a new run from the exported model."
            )
        if not any_example:
            raise DataError(
                f"None of the {self.counts.records + self.counts.bad} records in the stream can be "
                f"trained on: {self.counts.bad} are bad, {self.counts.dropped} have no token or "
                f"a prompt that fills --data.max_length {self.max_length}. See `inspect`."
            )

    def _usable_records(self) -> Iterator["_Usable"]:
        checksum = 0
        for record in read_records(self.source, streaming=True):
            if isinstance(record, BadRecord):
                self._count_bad(str(record))
                continue
            text = encode(record)
            yield _Usable(record=record, text=text, index=self.counts.records, checksum=checksum)
            self.counts.records += 1
            checksum = crc32(f"{record.desirable} {record.weight} {text}".encode(), checksum)

    def _count_bad(self, message: str) -> None:
        self.counts.bad += 1
        if self._num_shown < _MOST_SHOWN:
            self._num_shown += 1
            more = " Further ones are only counted." if self._num_shown == _MOST_SHOWN else ""
            self.warn(f"left out: {message}{more}")
        if self.counts.bad >= MOST_BAD and self.counts.bad > self.counts.records:
            raise DataError(
                f"{self.counts.bad} bad records and {self.counts.records} good ones so far, the "
                f"latest {message}\n--data.streaming leaves bad records out, but so many mean that "
                "the file or its form is wrong. `inspect` shows what is in it."
            )

    def _tokenized(self, chunk: list["_Usable"]) -> Iterator[StreamedExample]:
        columns = tokenize_texts([usable.text for usable in chunk], self.tokenizer)
        prompts, completions = columns["prompt_ids"], columns["completion_ids"]
        prompt_lengths, completion_lengths = map(_lengths, (prompts, completions))
        kept, dropped = truncate_prompts(
            prompt_lengths, completion_lengths, self.max_length, self.truncation
        )
        dropped |= prompt_lengths + completion_lengths == 0
        for row, usable in enumerate(chunk):
            record = usable.record
            location = f"{record.file}:{record.line}"
            if columns["fault"][row] is not None:
                self._refuse(columns["fault"][row], location)
                continue
            if dropped[row]:
                self.counts.dropped += 1
                continue
            self._count(record)
            yield StreamedExample(
                index=usable.index,
                prompt_ids=prompts[row][len(prompts[row]) - int(kept[row]) :],
                completion_ids=completions[row],
                desirable=record.desirable,
                weight=record.weight,
                prompt_key=columns["prompt_key"][row],
                location=location,
                checksum=usable.checksum,
            )

    def _refuse(self, fault: str, location: str) -> None:
        lacking = lacking_in_tokenizer(fault, location, self.tokenizer)
        if lacking is not None:
            raise lacking
        self._count_bad(f"{location}: the chat template cannot render it: {fault}")

    def _count(self, record: Record) -> None:
        if record.desirable:
            self.counts.desirable += 1
        else:
            self.counts.undesirable += 1


@dataclass(kw_only=True, slots=True)
class _Usable:
    """A record as it is tokenized."""

    record: Record
    text: str
    index: int
    checksum: int
    """Of all usable records before."""


def _lengths(ids: list[np.ndarray]) -> Int64[np.ndarray, " records"]:
    return np.array([len(row) for row in ids], dtype=np.int64)


def open_stream(
    source: str | list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation: Truncation,
    buffer_size: int,
    batch_size: int,
    warn: Callable[[str], None],
) -> ExampleStream:
    """The stream of a source, tried on its first example, so that a run does not begin in vain.

    Raises:
        DataError, ModelError: as `ExampleStream.examples` up to there.
    """
    stream = ExampleStream(
        source=source,
        tokenizer=tokenizer,
        max_length=max_length,
        truncation=truncation,
        buffer_size=-(-buffer_size // batch_size) * batch_size,
        warn=warn,
    )
    next(replace(stream, warn=lambda _: None).examples(StreamPosition()))
    return stream


def check_stream_settings(buffer_size: int, validation: object, trainer: Any) -> None:
    """Refuse what only a whole data set can give.

    Raises:
        ConfigError: if the buffer is too small to hold partners, or a share of the records or of
            the steps is asked for.
    """
    if buffer_size < 2:
        raise ConfigError(
            f"--data.buffer_size must be at least 2, got {buffer_size}: partners come from it."
        )
    if isinstance(validation, (int, float)):
        raise ConfigError(
            f"--data.validation {validation:g} is a share of records that --data.streaming true "
            "has not counted. Give a file of held-out records."
        )
    for name in ("limit_train_batches", "val_check_interval"):
        share = getattr(trainer, name)
        if isinstance(share, float) and share != 1.0:
            raise ConfigError(
                f"--trainer.{name} {share:g} is a share of an epoch whose length "
                "--data.streaming true does not know. Give a number of steps."
            )


def stream_weights(
    desirable: Literal["auto"] | float, undesirable: Literal["auto"] | float
) -> ClassWeights:
    """The weights that were given: a stream's records cannot be counted before it is read.

    Raises:
        ConfigError: if one is left to choose.
    """
    if desirable == "auto" or undesirable == "auto":
        raise ConfigError(
            "--data.streaming true cannot count the records that `auto` class weights need. Give "
            "--model.desirable_weight and --model.undesirable_weight: `inspect FILE` recommends "
            "them, from a part of the records too."
        )
    return resolve_weights(1, 1, desirable=desirable, undesirable=undesirable)
