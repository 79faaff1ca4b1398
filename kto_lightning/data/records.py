"""`Record`, and the parser that turns one row of a source into records.

A row has one of three forms: `{prompt, completion, label}`, `{messages | conversations, label}` or
`{chosen, rejected}` with or without `prompt`, which gives two records, the chosen one first. A
field `system` becomes the first message. A label that is a list, of several judges, gives a record
for each.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from kto_lightning.data.labels import LabelReader, is_unlabeled, judgements_of
from kto_lightning.data.messages import is_message, parse_messages, split_last_turn
from kto_lightning.data.pairs import CONVERSATION_KEYS, is_said, message_text, parse_pair
from kto_lightning.data.record_settings import RecordSettings
from kto_lightning.data.rows import Row, SkippedRow
from kto_lightning.data.strict_json import (
    RecordError,
    drop_none,
    exceeds_depth,
    parse_json_or_text,
    quote,
)
from kto_lightning.data.texts import (
    Text,
    add_system,
    check_no_media,
    check_text_only,
    missing_key_error,
    parse_system,
    parse_text,
)

RESERVED_TEMPLATE_KWARGS = frozenset(
    (
        *("tokenize", "return_dict", "return_tensors", "add_generation_prompt", "conversation"),
        *("continue_final_message", "padding", "truncation", "max_length", "tokenizer_kwargs"),
        "return_assistant_tokens_mask",
    )
)
"""Arguments of `apply_chat_template` that tokenization sets itself."""
MAX_NESTING = 100
MAX_CHARACTERS = 16_000_000
"""Of a record. A tokenizer takes some 100 to 300 bytes of memory for each; no model reads them."""
FLOAT32 = np.finfo(np.float32)


@dataclass(kw_only=True, slots=True)
class Record:
    """A prompt with one labelled completion, not yet tokenized."""

    prompt: Text
    """Plain text or chat messages, the same kind as the completion."""
    completion: Text
    desirable: bool | None
    """None: unlabelled, which only `predict` takes."""
    weight: float = 1.0
    """The record's own weight; the loss multiplies it by the class weight."""
    tools: list | None = None
    chat_template_kwargs: dict = field(default_factory=dict)
    file: str
    """The source: a path, or the id of a hub data set."""
    line: int
    """From 1: the line in a jsonl or csv file, the row in any other source."""
    prompt_guessed: bool = False
    """Whether the prompt was cut from a pair's answers without a sign of where it ends."""
    messages_left: bool = False
    """Whether messages follow the assistant's last one, the completion; they are not used."""

    @property
    def location(self) -> str:
        """Where the record was written, as `file:line`."""
        return f"{self.file}:{self.line}"


def is_conversational(record: Record) -> bool:
    """Whether the record consists of chat messages, to be rendered by a chat template."""
    return isinstance(record.prompt, list)


def record_to_json(record: Record) -> str:
    """The text of a record as JSON; keys keep their order, because chat templates print objects."""
    content = {
        "prompt": record.prompt,
        "completion": record.completion,
        "tools": record.tools,
        "chat_template_kwargs": record.chat_template_kwargs,
    }
    return json.dumps(content, ensure_ascii=False, allow_nan=False)


UNLABELED = "without a judgement"
LEFT_OUT = "judged neither good nor bad"


def parse_row(
    row: Row, labels: LabelReader, settings: RecordSettings
) -> Iterator[Record | SkippedRow]:
    """Parse a row, its keys the fields of a record, into its records.

    One for each judgement, or two for a pair; a `SkippedRow` for what the settings leave out.

    Raises:
        RecordError: if the row has none of the three forms, or one of its values is invalid.
    """
    if not isinstance(row.value, dict):
        raise RecordError(
            f"a record must be a JSON object, got {quote(row.value)}. Drop or wrap it."
        )
    fields = {key: value for key, value in row.value.items() if value is not None}
    common = {
        "weight": _parse_weight(fields.get("weight", 1.0)),
        "tools": _parse_tools(fields.get("tools"), row.from_table),
        "chat_template_kwargs": _parse_template_kwargs(
            fields.get("chat_template_kwargs"), row.from_table
        ),
        "file": row.file,
        "line": row.line,
    }
    is_pair = "chosen" in fields or "rejected" in fields
    if is_pair and settings.columns is not None and settings.columns.label is not None:
        raise RecordError(
            "a 'label' is named, but the record is a pair, whose answers 'chosen' and 'rejected' "
            "judge. Leave out --data.columns.label, or name one answer with "
            "--data.columns.completion.",
            kind="a 'label' is named for a pair",
        )
    may_skip = settings.unlabeled == "skip" and not (is_pair or labels.optional)
    if may_skip and is_unlabeled(row.value.get("label")):
        yield SkippedRow(file=row.file, line=row.line, why=UNLABELED)
        return
    check_no_media(fields)
    system = parse_system(fields)
    parse = _records_of_pair if is_pair else _judged_records
    for record in parse(row, fields, common, labels):
        if record is None:
            yield SkippedRow(file=row.file, line=row.line, why=LEFT_OUT)
            continue
        record.prompt, record.completion = _match_kinds(
            record.prompt, record.completion, chat=settings.chat
        )
        record.prompt = add_system(record.prompt, record.completion, system)
        _check_serializable(record)
        _check_parts(record)
        yield record


def _records_of_pair(
    row: Row, fields: dict, common: dict, labels: LabelReader
) -> Iterator[Record | None]:
    pair = parse_pair(fields, row.from_table)
    common = common | {"prompt": pair.prompt, "prompt_guessed": pair.prompt_guessed}
    yield Record(completion=pair.chosen, desirable=True, **common)
    yield Record(completion=pair.rejected, desirable=False, **common)


def _judged_records(
    row: Row, fields: dict, common: dict, labels: LabelReader
) -> Iterator[Record | None]:
    """A record for each judgement of a row's completion; None for one that is neither good nor bad.
    Prompt and completion may still be of different kinds."""
    assert isinstance(row.value, dict)
    for key in CONVERSATION_KEYS:
        if key in fields and "completion" not in fields:
            messages = parse_messages(key, fields[key], row.from_table)
            _check_repeats(fields, key, messages, row.from_table)
            prompt, completion = split_last_turn(messages)
            common = common | {"messages_left": len(prompt) + len(completion) < len(messages)}
            break
    else:
        prompt, completion = (
            parse_text(key, row.value, row.from_table) for key in ("prompt", "completion")
        )
        _check_covers(fields, prompt, completion)
    for desirable in _parse_label(row.value, labels):
        if desirable is None and not labels.optional:
            yield None
        else:
            yield Record(prompt=prompt, completion=completion, desirable=desirable, **common)


def _check_repeats(fields: dict, key: str, messages: list[dict], from_table: bool) -> None:
    """Raise RecordError if the row has another prompt than the one in its messages."""
    for other in ("prompt", *CONVERSATION_KEYS):
        if other == key or other not in fields:
            continue
        given = parse_text(other, fields, from_table)
        if isinstance(given, str) and is_said(given, messages):
            continue
        if given != messages[: len(given)]:
            raise RecordError(
                f"'{other}' is not a part of '{key}', which is read. Keep one of the two."
            )


def _check_covers(fields: dict, prompt: Text, completion: Text) -> None:
    """Raise RecordError if messages beside prompt and completion say more than these."""
    read = [
        *(prompt if isinstance(prompt, list) else [prompt]),
        *(completion if isinstance(completion, list) else [completion]),
    ]
    for key in CONVERSATION_KEYS:
        value = fields.get(key)
        value = parse_json_or_text(value)
        messages = value if isinstance(value, list) else []
        said = [message_text(item) for item in messages if is_message(item)]
        if not all(is_said(text, read) for text in said):
            raise RecordError(
                f"'{key}' says more than 'prompt' and 'completion', which are read. Keep one of "
                "the two."
            )


def _check_parts(record: Record) -> None:
    """Raise RecordError for parts of a record that would not reach the tokens."""
    if isinstance(record.prompt, list) and isinstance(record.completion, list):
        check_text_only([*record.prompt, *record.completion])
    elif record.tools:
        raise RecordError(
            "'tools' stand beside plain text, and only a chat template can show them. Write prompt "
            "and completion as messages, or remove 'tools'."
        )


def _parse_label(row: dict, labels: LabelReader) -> list[bool | None]:
    """The judgements of a row; None for one that is neither good nor bad."""
    try:
        if "label" not in row:
            raise missing_key_error("label", row)
        return [labels.read(item) for item in judgements_of(row["label"]) or [None]]
    except RecordError:
        if labels.optional:
            return [None]
        raise


def _parse_weight(value: object) -> float:
    try:
        weight = float(value) if isinstance(value, str) else value
    except ValueError:
        weight = None
    # Outside these bounds the float32 column would turn it into 0 or infinity.
    lowest, highest = float(FLOAT32.tiny), float(FLOAT32.max)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        weight = None
    if weight is None or not lowest <= weight <= highest:
        raise RecordError(
            f"'weight' must be a positive, finite number, got {quote(value)}. Fix it, or omit it "
            "for 1.0."
        )
    return float(weight)


def _parse_tools(value: object, from_table: bool) -> list | None:
    tools = parse_json_or_text(value)
    tools = drop_none(tools) if from_table and not isinstance(value, str) else tools
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError(
            f"'tools' must be a list of objects, got {quote(value)}. Fix or remove it."
        )
    return tools


def _parse_template_kwargs(value: object, from_table: bool) -> dict:
    kwargs = parse_json_or_text(value)
    kwargs = drop_none(kwargs) if from_table and not isinstance(value, str) else kwargs
    if kwargs is None:
        return {}
    if not isinstance(kwargs, dict):
        raise RecordError(f"'chat_template_kwargs' must be an object, got {quote(value)}. Fix it.")
    reserved = sorted(RESERVED_TEMPLATE_KWARGS & kwargs.keys())
    if reserved:
        raise RecordError(
            f"'chat_template_kwargs' may not set {', '.join(reserved)}: tokenization sets it. "
            "Remove it."
        )
    return kwargs


def _match_kinds(prompt: Text, completion: Text, *, chat: bool) -> tuple[Text, Text]:
    """Convert text to a user's or assistant's message where the other one is a list of messages,
    or with `chat`."""
    if chat and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(prompt, str) and isinstance(completion, list):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    elif isinstance(completion, str) and isinstance(prompt, list):
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(prompt, list) and not prompt:
        raise RecordError(
            "there is no message before the completion. Add a prompt or remove the line."
        )
    return prompt, completion


def _check_serializable(record: Record) -> None:
    """Raise RecordError for what cannot be written as JSON in UTF-8, as the data set stores it, or
    is too long or too deep."""
    try:
        content = record_to_json(record)
        content.encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise RecordError(
            f"the text contains an unpaired surrogate (\\u{code:04x}). Fix or remove it."
        ) from error
    except (TypeError, ValueError) as error:
        raise RecordError(
            f"a value cannot be written as JSON ({error}). Fix or remove it."
        ) from error
    if len(content) > MAX_CHARACTERS:
        raise RecordError(
            f"the record has {len(content):,} characters, and at most {MAX_CHARACTERS:,} are read. "
            "Shorten or drop it."
        )
    # The number of brackets is an upper bound on the depth: few records need the exact walk.
    brackets = content.count("[") + content.count("{")
    values = [record.prompt, record.completion, record.tools, record.chat_template_kwargs]
    if brackets > MAX_NESTING and exceeds_depth(values, MAX_NESTING):
        raise RecordError(f"nested deeper than {MAX_NESTING} levels. Flatten or drop it.")
