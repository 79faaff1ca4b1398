"""The data set of a run: records of all sources, checked, cached on disk and tokenized."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import datasets.config
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from kto_lightning.data.bad_records import BadRecords, join_names
from kto_lightning.data.caches import load_or_make
from kto_lightning.data.examples import ExampleSet, Truncation
from kto_lightning.data.reader import RecordReader
from kto_lightning.data.record_settings import RecordSettings
from kto_lightning.data.records import Record, record_to_json
from kto_lightning.data.rows import BadRecord, SkippedRow
from kto_lightning.data.sources import Source, SourceLike, expand
from kto_lightning.data.tokenize import tokenize_records
from kto_lightning.errors import MOST_PROCESSES, ConfigError, DataError, KTOError, check_count
from kto_lightning.files import write_whole
from kto_lightning.models.tokenizer import load_tokenizer, take_tokenizer

FORMAT_VERSION = 3
"""Part of the cache key: raise it when the same file would give other records or columns."""
FEATURES = datasets.Features(
    {
        "record": datasets.Value("string"),
        "desirable": datasets.Value("bool"),
        "weight": datasets.Value("float32"),
        "file": datasets.Value("string"),
        "line": datasets.Value("int64"),
        "prompt_guessed": datasets.Value("bool"),
        "messages_left": datasets.Value("bool"),
    }
)


SUMMARY_FILE = "reading.json"
"""In the directory of the cached data set."""


@dataclass(kw_only=True, slots=True)
class ReadingSummary:
    """How a source was read, stored with its records."""

    notes: list[str]
    """A sentence for what is not read by the names of the columns."""
    left_out: dict[str, int]
    """Numbers of rows, or judgements in them, by the reason why they are left out."""

    @property
    def sentences(self) -> list[str]:
        """For the summary of a run."""
        parts = [f"{count:,} {why}" for why, count in self.left_out.items()]
        return [*self.notes, *([f"left out: {', '.join(parts)}"] if parts else [])]


def read_records(
    source: SourceLike, settings: RecordSettings | None = None, *, streaming: bool = False
) -> Iterator[Record | BadRecord | SkippedRow]:
    """The records of a source, in order, one at a time.

    Memory use is constant, except for a `.json` file that is one object, which is read whole.

    Args:
        source: as `KTODataModule`'s `train`.
        settings: how rows are read as records.
        streaming: whether to read hub data sets while they are downloaded, without storing them.

    Raises:
        ConfigError, DataError: as `RecordReader.read`, and if a source is missing or of unknown
            kind.
    """
    yield from RecordReader(expand(source), settings, streaming=streaming).read()


def load_records(
    source: SourceLike,
    settings: RecordSettings | None = None,
    *,
    cache_dir: str | None = None,
    labels_needed: bool = True,
) -> datasets.Dataset:
    """All records as a memory-mapped data set, parsed only once for the same contents.

    Columns: `record` (JSON of prompt, completion, tools, chat_template_kwargs), `desirable`,
    `weight`, `file`, `line`, `prompt_guessed`, `messages_left`. The fingerprint depends on names,
    contents and settings only, so the token ids mapped from it are cached too.

    Args:
        source: as `KTODataModule`'s `train`.
        settings: how rows are read as records.
        cache_dir: directory of the cache; None for the default of `datasets`.
        labels_needed: whether a record without a label is bad; otherwise its `desirable` is null.

    Raises:
        ConfigError: as `RecordReader.read`.
        DataError: as `RecordReader.read`; if any record is bad, with their number and the first
            few; and if all are left out.
    """
    settings = settings or RecordSettings()
    sources = list({item.name: item for item in expand(source)}.values())
    hashes = [item.content_hash() for item in sources]
    names = [item.name for item in sources]
    contents = [
        *(FORMAT_VERSION, labels_needed, settings.to_plain()),
        list(zip(names, hashes, strict=True)),
    ]
    key = hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:32]
    root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser()
    directory = root / "generator" / f"default-fingerprint={key}"
    reader = RecordReader(sources, settings, labels_needed=labels_needed)
    left_out: Counter[str] = Counter()

    def make() -> datasets.Dataset:
        left_out.clear()
        try:
            dataset = datasets.Dataset.from_generator(
                lambda: _rows(reader, sources, hashes, left_out),
                features=FEATURES,
                cache_dir=str(root),
                fingerprint=key,
                writer_batch_size=100,  # rows in memory at a time: a row may have 10 MB
            )
        except DatasetGenerationError as error:
            cause = error.__cause__
            if isinstance(cause, KTOError | OSError):
                raise cause from None
            raise
        summary = directory / "0.0.0" / SUMMARY_FILE
        if not summary.exists():
            content = asdict(ReadingSummary(notes=reader.notes, left_out=dict(left_out)))
            write_whole(summary, json.dumps(content) + "\n", what="the cache of parsed records")
        return dataset

    return load_or_make(
        make,
        directory,
        "0.0.0/[dgr]*",  # dataset_info.json, generator-train.arrow, reading.json
        name="records",
        removed="0.0.0",
        what="parsed records",
    )


def summary_of(records: datasets.Dataset) -> ReadingSummary:
    """How the records of `load_records` were read."""
    directory = Path(records.cache_files[0]["filename"]).parent
    return ReadingSummary(**json.loads((directory / SUMMARY_FILE).read_text()))


def _rows(
    reader: RecordReader, sources: list[Source], hashes: list[str], left_out: Counter[str]
) -> Iterator[dict[str, object]]:
    """The rows of the data set; raises at the end, so that the error counts all bad records."""
    bad, num_read = BadRecords(), 0
    for record in reader.read():
        if isinstance(record, SkippedRow):
            left_out[record.why] += 1
            continue
        num_read += 1
        if isinstance(record, BadRecord):
            bad.add(record)
        else:
            yield as_row(record)
    for item, before in zip(sources, hashes, strict=True):
        if item.content_hash() != before:
            raise DataError(
                f"{item.name} has changed while it was read. Wait until it is complete, and start "
                "again."
            )
    names = [item.name for item in sources]
    if bad.count:
        raise bad.error(names, num_read, reader.advice() if bad.count == num_read else None)
    if not num_read:
        summary = ReadingSummary(notes=[], left_out=dict(left_out))
        raise DataError(
            f"{join_names(names)}: no record is left ({summary.sentences[-1]}). Give records with "
            "judgements, or change --data.unlabeled, --data.labels or --data.repeated."
        )


def as_row(record: Record) -> dict[str, object]:
    """The row of a record in the data set."""
    return {
        "record": record_to_json(record),
        "desirable": record.desirable,
        "weight": record.weight,
        "file": record.file,
        "line": record.line,
        "prompt_guessed": record.prompt_guessed,
        "messages_left": record.messages_left,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Settings for reading and tokenizing records; the fields are keys of `KTODataModule`."""

    records: RecordSettings
    tokenizer: str | PreTrainedTokenizerBase | None
    """A directory, a hub id or a tokenizer in memory; None: the policy's."""
    chat_template: str | None
    truncation: Truncation
    preprocessing_workers: int | None

    def __post_init__(self) -> None:
        check_count(
            "--data.preprocessing_workers",
            self.preprocessing_workers,
            most=MOST_PROCESSES,
            or_null=True,
        )

    def load_tokenizer(
        self, policy: str | None, *, trust_remote_code: bool, adapter_base: str | None = None
    ) -> PreTrainedTokenizerBase:
        """Load the tokenizer for a policy.

        Args:
            policy: a directory or hub id; None: it is in memory, and was loaded from neither.

        Raises:
            ConfigError: if none is given for a policy in memory.
            ModelError: if there is no tokenizer.
        """
        if self.tokenizer is not None and not isinstance(self.tokenizer, str):
            return take_tokenizer(self.tokenizer, chat_template=self.chat_template)
        name = self.tokenizer or policy
        if name is None:
            raise ConfigError(
                "the policy is a model in memory that was loaded from no directory or hub id, so "
                "that its tokenizer is not known. Give it: KTODataModule(tokenizer=…)."
            )
        return load_tokenizer(
            name,
            chat_template=self.chat_template,
            trust_remote_code=trust_remote_code,
            given_base=adapter_base if name == policy else None,
        )

    def examples(
        self,
        source: SourceLike,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None,
        labels_needed: bool = True,
    ) -> ExampleSet:
        """Load and tokenize all records of a source.

        Raises:
            ConfigError, DataError, ModelError: as `load_records` and `tokenize_records`.
        """
        return tokenize_records(
            load_records(source, self.records, labels_needed=labels_needed),
            tokenizer,
            max_length=max_length,
            truncation=self.truncation,
            num_workers=self.preprocessing_workers,
        )
