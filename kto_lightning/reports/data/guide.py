"""Help with a file that cannot be read as it stands: its columns, a mapping, records to look at."""

from transformers import PreTrainedTokenizerBase

from kto_lightning.data.proposal import Proposal, name_options, propose
from kto_lightning.data.reader import RecordReader
from kto_lightning.data.record_settings import RecordSettings
from kto_lightning.data.records import Record, record_to_json
from kto_lightning.data.tokenize import tokenize_json_records
from kto_lightning.reports.data.facts import Facts, visible_text
from kto_lightning.reports.data.guide_fields import Guide, SeenColumn, TriedRecord

MANY_BAD = 0.05
"""Share of records that cannot be used from which on other settings are proposed for them."""


def guide_of(
    reader: RecordReader, settings: RecordSettings, facts: Facts, *, has_template: bool
) -> Guide | None:
    """Help with a file of which no record can be used, or of many of which other settings would
    help."""
    if len(facts) and facts.bad.count < MANY_BAD * (len(facts) + facts.bad.count):
        return None
    rows = reader.first_rows()
    if not any(isinstance(row, dict) and row for row in rows):
        return None
    proposal = propose(rows, settings, chat_template=has_template and not len(facts))
    helps = proposal.says_more or (bool(proposal.missing) and not len(facts))
    return _as_fields(proposal, len(rows)) if helps else None


def _as_fields(proposal: Proposal, num_rows: int) -> Guide:
    """A proposal as plain values; `num_rows`: the rows that it comes from."""
    return Guide(
        rows=num_rows,
        columns=[
            SeenColumn(
                path=column.path,
                type=column.kind,
                filled=column.filled,
                example=column.example,
                values=column.values,
            )
            for column in proposal.facts
        ],
        flags=proposal.flags(""),
        fit_flags=proposal.flags(),
        missing=[name_options(sentence, "") for sentence in proposal.missing],
        notes=[name_options(sentence, "") for sentence in proposal.notes],
    )


def try_record(record: Record, tokenizer: PreTrainedTokenizerBase | None) -> TriedRecord:
    """A record as it would be trained, special tokens included."""
    tried = TriedRecord(
        place=record.location,
        desirable=bool(record.desirable),
        weight=record.weight,
        rendered=False,
        prompt=_plain(record.prompt),
        completion=_plain(record.completion),
        fault=None,
    )
    if tokenizer is None:
        return tried
    columns = tokenize_json_records([record_to_json(record)], [0], tokenizer)
    tried.fault = columns["fault"][0]
    if tried.fault is None:
        tried.rendered = True
        tried.prompt, tried.completion = (
            str(tokenizer.decode(columns[name][0])) for name in ("prompt_ids", "completion_ids")
        )
    return tried


def _plain(text: str | list[dict]) -> str:
    if isinstance(text, str):
        return text
    return "\n".join(f"{message['role']}: {visible_text([message])}" for message in text)
