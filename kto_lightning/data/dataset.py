"""The data set of a run: records of all sources, checked, cached on disk and tokenized."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import datasets.config
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from kto_lightning.data.bad_records import BadRecords, join_names
from kto_lightning.data.caches import load_or_make
from kto_lightning.data.examples import ExampleSet, Truncation
from kto_lightning.data.labels import LabelReader, label_reader
from kto_lightning.data.records import Record, parse_row, record_to_json
from kto_lightning.data.rows import BadRecord, Row
from kto_lightning.data.sources import content_hash, expand, read_rows
from kto_lightning.data.strict_json import RecordError
from kto_lightning.data.tokenize import tokenize_records
from kto_lightning.errors import MOST_PROCESSES, DataError, check_count
from kto_lightning.models.tokenizer import load_tokenizer

FORMAT_VERSION = 2
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


def read_records(
    source: str | list[str], *, streaming: bool = False, labels: LabelReader | None = None
) -> Iterator[Record | BadRecord]:
    """The records of files, globs or hub data sets, in order, one at a time.

    Memory use is constant, except for a `.json` file, which is read whole.

    Args:
        source: a path, a glob, a hub data set's id, or a list of those.
        streaming: whether to read hub data sets while they are downloaded, without storing them.
        labels: the reader of the source's labels, if it is read more than once.

    Raises:
        DataError: if a source is missing, of unknown kind or unreadable, or if there is no record.
    """
    names = expand(source)
    labels = labels or label_reader(names, streaming=streaming)
    empty = True
    for name in names:
        for row in read_rows(name, streaming=streaming):
            empty = False
            if isinstance(row, BadRecord):
                yield row
                continue
            try:
                records = list(parse_row(row, labels))
            except RecordError as problem:
                yield _bad_record(row, str(problem), problem.kind)
            except RecursionError:
                yield _bad_record(row, "the record is nested too deep. Flatten or drop it.")
            else:
                yield from records
    if empty:
        raise DataError(
            f"{join_names(names)}: no record in there. Check that it is the right file."
        )


def _bad_record(row: Row, message: str, kind: str = "") -> BadRecord:
    keys = [str(key) for key in row.value] if isinstance(row.value, dict) else []
    return BadRecord(file=row.file, line=row.line, message=message, kind=kind, keys=keys)


def load_records(
    source: str | list[str], *, cache_dir: str | None = None, labels_needed: bool = True
) -> datasets.Dataset:
    """All records as a memory-mapped data set, parsed only once for the same contents.

    Columns: `record` (JSON of prompt, completion, tools, chat_template_kwargs), `desirable`,
    `weight`, `file`, `line`, `prompt_guessed`, `messages_left`. The fingerprint depends on names
    and contents only, so the token ids mapped from it are cached too.

    Args:
        source: a path, a glob, a hub data set's id, or a list of those.
        cache_dir: directory of the cache; None for the default of `datasets`.
        labels_needed: whether a record without a label is bad; otherwise its `desirable` is null.

    Raises:
        DataError: as `read_records`; and if any record is bad, with their number and the first few.
    """
    hashes = {name: content_hash(name) for name in expand(source)}
    contents = [FORMAT_VERSION, labels_needed, list(hashes.items())]
    key = hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:32]
    root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser()

    def make() -> datasets.Dataset:
        try:
            return datasets.Dataset.from_generator(
                lambda: _rows(hashes, labels_needed),
                features=FEATURES,
                cache_dir=str(root),
                fingerprint=key,
                writer_batch_size=100,  # rows in memory at a time: a row may have 10 MB
            )
        except DatasetGenerationError as error:
            cause = error.__cause__
            if isinstance(cause, DataError | OSError):
                raise cause from None
            raise

    return load_or_make(
        make,
        root / "generator" / f"default-fingerprint={key}",
        "0.0.0/[dg]*",  # dataset_info.json, generator-train.arrow
        name="records",
        removed="0.0.0",
        what="parsed records",
    )


def _rows(hashes: dict[str, str], labels_needed: bool) -> Iterator[dict[str, object]]:
    """The rows of the data set; raises at the end, so that the error counts all bad records."""
    names, bad, num_read = list(hashes), BadRecords(), 0
    labels = label_reader(names, optional=not labels_needed)
    for record in read_records(names, labels=labels):
        num_read += 1
        if isinstance(record, BadRecord):
            bad.add(record)
        else:
            yield as_row(record)
    for name, before in hashes.items():
        if content_hash(name) != before:
            raise DataError(
                f"{name} has changed while it was read. Wait until it is complete, and start again."
            )
    if bad.count:
        raise bad.error(names, num_read)


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

    tokenizer: str | None
    """A directory or hub id; None: the policy's tokenizer."""
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
        self, policy: str, *, trust_remote_code: bool, adapter_base: str | None = None
    ) -> PreTrainedTokenizerBase:
        """Load the tokenizer for a policy.

        Raises:
            ModelError: if there is no tokenizer.
        """
        name = self.tokenizer or policy
        return load_tokenizer(
            name,
            chat_template=self.chat_template,
            trust_remote_code=trust_remote_code,
            given_base=adapter_base if name == policy else None,
        )

    def examples(
        self,
        source: str | list[str],
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
            load_records(source, labels_needed=labels_needed),
            tokenizer,
            max_length=max_length,
            truncation=self.truncation,
            num_workers=self.preprocessing_workers,
        )
