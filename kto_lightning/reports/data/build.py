"""Building a `DataReport` from a source, or from a training set that is already loaded."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from kto_lightning.data.dataset import FEATURES, as_row, load_records, read_records, summary_of
from kto_lightning.data.examples import ExampleSet
from kto_lightning.data.lost import LostPart, OtherEnd
from kto_lightning.data.reader import RecordReader
from kto_lightning.data.record_settings import RecordSettings
from kto_lightning.data.records import Record
from kto_lightning.data.rows import BadRecord, SkippedRow
from kto_lightning.data.sources import SourceLike, expand, names_of
from kto_lightning.data.tokenize import tokenize_records
from kto_lightning.errors import DataError
from kto_lightning.files import write_whole
from kto_lightning.models.tokenizer import end_token_ids
from kto_lightning.reports.data.facts import (
    Facts,
    gather_facts,
    published_columns,
    records_of_dataset,
)
from kto_lightning.reports.data.fields import (
    DataReport,
    Lengths,
    PerClass,
    Shapes,
    Truncation,
    Weights,
)
from kto_lightning.reports.data.findings import findings_of
from kto_lightning.reports.data.guide import guide_of, try_record
from kto_lightning.reports.data.guide_fields import Guide, TriedRecord
from kto_lightning.reports.data.order import order_of
from kto_lightning.reports.data.statistics import (
    cut_answers_of,
    format_of,
    labels_of,
    lengths_of,
    repeats_of,
    shapes_of,
    weights_of,
)


def report_of_source(
    source: SourceLike,
    settings: RecordSettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
    max_length: int | None = 1024,
    num_tried: int = 0,
) -> DataReport:
    """Report on a source; bad records are counted and skipped.

    Args:
        source: a path, a glob, a hub data set's id, or a list of those.
        settings: how rows are read as records.
        tokenizer: for lengths in tokens; None: in characters. If its template cannot render some
            record, lengths are in characters too, and `tokenizer_problem` says why.
        batch_size: examples per batch, for the share of single-label batches.
        max_length: tokens to which a record would be truncated at its end; None: no limit.
        num_tried: how many of the first records to show as they would be trained.

    Raises:
        ConfigError: if no record has a column that the settings name.
        DataError: if the source is missing, of unknown kind, unreadable or empty.
        ModelError: if the tokenizer lacks a chat template or end-of-text token that is needed.
    """
    settings = settings or RecordSettings()
    reader = RecordReader(expand(source), settings)
    first: list[Record] = []
    facts = gather_facts(_keep_first(reader.read(), first, num_tried))
    table = facts.table
    lengths = _lengths_in_characters(facts)
    labels = labels_of(table["desirable"])
    weights = weights_of(labels.desirable, labels.undesirable)
    measured = table["prompt_characters"], table["completion_characters"], table["desirable"]
    problem = lost_parts = other_end = None
    if tokenizer is not None and len(facts):
        try:
            examples = _tokenize(source, settings, facts, tokenizer)
        except DataError as error:
            problem = str(error)
        else:
            lengths, weights = _measure(examples, max_length)
            measured = examples.prompt_lengths, examples.completion_lengths, examples.desirable
            end_ids = end_token_ids(tokenizer, tokenizer.name_or_path)
            lost_parts, other_end = examples.lost_parts(), examples.other_end(end_ids, tokenizer)
    has_template = tokenizer is not None and tokenizer.chat_template is not None
    return _assemble(
        source,
        facts,
        lengths,
        weights,
        shapes=shapes_of(*measured, table["desirable"]) if len(facts) else None,
        batch_size=batch_size,
        tokenizer=None if tokenizer is None else tokenizer.name_or_path,
        problem=problem,
        lost_parts=lost_parts,
        other_end=other_end,
        read_as=reader.notes,
        guide=guide_of(reader, settings, facts, has_template=has_template),
        chat_advised=has_template and bool(len(facts)) and bool(table["plain_turns"].mean() > 0.5),
        tried=[try_record(record, tokenizer) for record in first] if num_tried else None,
    )


def _keep_first(
    records: Iterator[Record | BadRecord | SkippedRow], first: list[Record], count: int
) -> Iterator[Record | BadRecord | SkippedRow]:
    """The same records; the first ones are put into `first`."""
    for record in records:
        if isinstance(record, Record) and len(first) < count:
            first.append(record)
        yield record


def report_of_training_set(
    source: SourceLike,
    records: Dataset,
    examples: ExampleSet,
    *,
    batch_size: int,
    max_length: int | None,
    tokenizer: str | None = None,
    other_end: OtherEnd | None = None,
) -> DataReport:
    """Report on the training set of `fit`, without tokenizing again.

    Args:
        source: of `records`; its files are read once more for their columns.
        records: from `load_records`.
        examples: the same records from `tokenize_records` with this `max_length`.
        batch_size: examples per batch, for the share of single-label batches.
        max_length: as in `examples`.
        tokenizer: its name.
        other_end: from `examples`.
    """
    facts = gather_facts(records_of_dataset(records))
    reading = summary_of(records)
    facts.left_out = reading.left_out
    counts = examples.counts
    lengths = lengths_of(
        examples.prompt_lengths, examples.completion_lengths, examples.desirable, unit="tokens"
    )
    if max_length is not None:
        lengths.truncation = Truncation(
            max_length=max_length,
            truncated=PerClass(
                desirable=counts.truncated_desirable, undesirable=counts.truncated_undesirable
            ),
            dropped=PerClass(
                desirable=counts.dropped_desirable, undesirable=counts.dropped_undesirable
            ),
        )
    _add_prefixes(lengths, examples)
    weights = weights_of(counts.desirable, counts.undesirable)
    measured = examples.prompt_lengths, examples.completion_lengths, examples.desirable
    return _assemble(
        source,
        facts,
        lengths,
        weights,
        shapes=shapes_of(*measured, facts.table["desirable"]),
        batch_size=batch_size,
        tokenizer=tokenizer,
        lost_parts=examples.lost_parts(),
        other_end=other_end,
        read_as=reading.notes,
    )


def write_data_report(path: str | Path, report: DataReport) -> None:
    """Write a report as JSON, as `inspect --json` prints it for one file.

    Raises:
        KTOError: if the file cannot be written.
    """
    write_whole(Path(path), as_json(report.to_dict()) + "\n", what="the data report")


def as_json(content: dict | list) -> str:
    """Indented ASCII JSON, which any terminal shows."""
    return json.dumps(content, indent=2, allow_nan=False)


def _assemble(
    source: SourceLike,
    facts: Facts,
    lengths: Lengths,
    weights: Weights,
    *,
    shapes: Shapes | None,
    batch_size: int,
    tokenizer: str | None,
    problem: str | None = None,
    lost_parts: list[LostPart] | None,
    other_end: OtherEnd | None,
    read_as: list[str],
    guide: Guide | None = None,
    chat_advised: bool = False,
    tried: list[TriedRecord] | None = None,
) -> DataReport:
    table, names = facts.table, names_of(source)
    report = DataReport(
        sources=[names] if isinstance(names, str) else names,
        examples=len(facts),
        bad_records=facts.bad,
        columns=published_columns(source),
        format=format_of(facts),
        labels=labels_of(table["desirable"]),
        order=order_of(table["desirable"], batch_size=batch_size),
        weights=weights,
        lengths=lengths,
        repeats=repeats_of(facts, batch_size=batch_size),
        empty_completions=facts.places(np.flatnonzero(table["empty"])),
        guessed_prompts=facts.places(
            np.flatnonzero(table["prompt_guessed"] & table["desirable"])  # one of the two of a pair
        ),
        messages_left=facts.places(np.flatnonzero(table["messages_left"])),
        tokenizer=tokenizer,
        tokenizer_problem=problem,
        findings=[],
        shapes=shapes,
        lost_parts=lost_parts,
        other_end=other_end,
        cut_answers=cut_answers_of(facts),
        left_out=facts.left_out,
        read_as=read_as,
        guide=guide,
        chat_advised=chat_advised,
        tried=tried,
    )
    report.findings = [finding.sentence for finding in findings_of(report)]
    return report


def _lengths_in_characters(facts: Facts) -> Lengths:
    table = facts.table
    return lengths_of(
        table["prompt_characters"],
        table["completion_characters"],
        table["desirable"],
        unit="characters",
    )


def _tokenize(
    source: SourceLike,
    settings: RecordSettings,
    facts: Facts,
    tokenizer: PreTrainedTokenizerBase,
) -> ExampleSet:
    """The usable records, not truncated; without bad records, from the cache that `fit` uses."""
    if facts.bad.count:
        records = Dataset.from_list(
            [as_row(item) for item in read_records(source, settings) if isinstance(item, Record)],
            features=FEATURES,
        )
    else:
        records = load_records(source, settings)
    return tokenize_records(records, tokenizer, max_length=None)


def _measure(examples: ExampleSet, max_length: int | None) -> tuple[Lengths, Weights]:
    """Lengths before truncation, and the class weights of the records that `max_length` keeps."""
    prompt, completion = examples.prompt_lengths, examples.completion_lengths
    desirable = examples.desirable
    lengths = lengths_of(prompt, completion, desirable, unit="tokens")
    _add_prefixes(lengths, examples)
    if max_length is None:
        return lengths, weights_of(int(desirable.sum()), int((~desirable).sum()))
    stays = prompt < max_length
    truncated = stays & (prompt + completion > max_length)
    lengths.truncation = Truncation(
        max_length=max_length,
        truncated=_count_per_class(truncated, desirable),
        dropped=_count_per_class(~stays, desirable),
    )
    kept = _count_per_class(stays, desirable)
    return lengths, weights_of(kept.desirable, kept.undesirable)


def _add_prefixes(lengths: Lengths, examples: ExampleSet) -> None:
    lengths.prompts_not_prefix = examples.counts.prompts_not_prefix
    lengths.lost_prompt_end = examples.counts.lost_prompt_end


def _count_per_class(marked: np.ndarray, desirable: np.ndarray) -> PerClass[int]:
    return PerClass(
        desirable=int((marked & desirable).sum()), undesirable=int((marked & ~desirable).sum())
    )
