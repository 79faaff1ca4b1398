"""`Record`, and the parser that turns one row of a source into records.

A row has one of three forms: `{prompt, completion, label}`, `{messages | conversations, label}` or
`{chosen, rejected}` with or without `prompt`, which gives two records, the chosen one first.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from kto_lightning.data.messages import is_message, parse_messages, split_last_turn
from kto_lightning.data.sources import COLUMNS, Row
from kto_lightning.data.strict_json import (
    RecordError,
    drop_none,
    exceeds_depth,
    parse_json_or_text,
    quote,
)

LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False} | {
    "desirable": True,
    "undesirable": False,
}
RESERVED_TEMPLATE_KWARGS = frozenset(
    (
        *("tokenize", "return_dict", "return_tensors", "add_generation_prompt", "conversation"),
        *("continue_final_message", "padding", "truncation", "max_length", "tokenizer_kwargs"),
        "return_assistant_tokens_mask",
    )
)
"""Arguments of `apply_chat_template` that tokenization sets itself."""
MAX_NESTING = 100
FLOAT32 = np.finfo(np.float32)

Text = str | list[dict]


@dataclass(kw_only=True, slots=True)
class Record:
    """A prompt with one labelled completion, not yet tokenized."""

    prompt: Text
    """Plain text or chat messages, the same kind as the completion."""
    completion: Text
    desirable: bool
    weight: float = 1.0
    """The record's own weight; the loss multiplies it by the class weight."""
    tools: list | None = None
    chat_template_kwargs: dict = field(default_factory=dict)
    file: str
    """The source: a path, or the id of a hub data set."""
    line: int
    """From 1: the line in a jsonl or csv file, the row in any other source."""


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


def parse_row(row: Row) -> Iterator[Record]:
    """Parse a row into its records: one, or two for a pair.

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
    for prompt, completion, desirable in _labelled_completions(row.value, fields, row.from_table):
        prompt, completion = _match_kinds(prompt, completion)
        record = Record(prompt=prompt, completion=completion, desirable=desirable, **common)
        _check_serializable(record)
        yield record


def _labelled_completions(
    row: dict, fields: dict, from_table: bool
) -> list[tuple[Text, Text, bool]]:
    """(prompt, completion, desirable) of each record in the row."""
    if "chosen" in fields or "rejected" in fields:
        prompt, chosen, rejected = _parse_pair(fields, from_table)
        return [(prompt, chosen, True), (prompt, rejected, False)]
    for key in ("messages", "conversations"):
        if key in fields and "completion" not in fields:
            prompt, completion = split_last_turn(parse_messages(key, fields[key], from_table))
            return [(prompt, completion, _parse_label(row))]
    prompt, completion = (
        _parse_text("prompt", row, from_table),
        _parse_text("completion", row, from_table),
    )
    return [(prompt, completion, _parse_label(row))]


def _missing_key_error(key: str, row: dict) -> RecordError:
    if key in row:
        return RecordError(f"'{key}' is null. Drop the line or fill it in.")
    has = quote(", ".join(name for name in COLUMNS if name in row) or ", ".join(map(str, row)))
    return RecordError(f"'{key}' is missing; the record has {has}. Drop the line or add it.")


def _parse_label(row: dict) -> bool:
    if "label" not in row:
        raise RecordError("'label' is missing. Drop the line or give it a label.")
    label = row["label"]
    if isinstance(label, str):
        known = LABELS.get(label.strip().lower())
    else:
        known = bool(label) if isinstance(label, int | float) and label in (0, 1) else None
    if known is None:
        raise RecordError(
            f"'label' must be true or false, got {quote(label)}. Drop the line or give it a label."
        )
    return known


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
    tools = parse_json_or_text(value) if isinstance(value, str) else value
    tools = drop_none(tools) if from_table and not isinstance(value, str) else tools
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError(
            f"'tools' must be a list of objects, got {quote(value)}. Fix or remove it."
        )
    return tools


def _parse_template_kwargs(value: object, from_table: bool) -> dict:
    kwargs = parse_json_or_text(value) if isinstance(value, str) else value
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


def _parse_text(key: str, row: dict, from_table: bool) -> Text:
    value = row.get(key)
    if value is None:
        raise _missing_key_error(key, row)
    if isinstance(value, str):
        content = parse_json_or_text(value) if from_table and value.startswith("[") else None
        if not isinstance(content, list) or not content or not all(map(is_message, content)):
            return value
        return parse_messages(key, content, from_table=False)
    return parse_messages(key, value, from_table)


def _match_kinds(prompt: Text, completion: Text) -> tuple[Text, Text]:
    """Convert text to a user's or assistant's message where the other one is a list of messages."""
    if isinstance(prompt, str) and isinstance(completion, list):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    elif isinstance(completion, str) and isinstance(prompt, list):
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(prompt, list) and not prompt:
        raise RecordError(
            "there is no message before the completion. Add a prompt or remove the line."
        )
    return prompt, completion


def _parse_pair(fields: dict, from_table: bool) -> tuple[Text, Text, Text]:
    chosen, rejected = (
        _parse_text("chosen", fields, from_table),
        _parse_text("rejected", fields, from_table),
    )
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RecordError(
            "'chosen' and 'rejected' must both be text or both messages. Fix the line."
        )
    if "prompt" not in fields:
        return _split_prompt(chosen, rejected)
    prompt = _parse_text("prompt", fields, from_table)
    if isinstance(chosen, str):
        return prompt, chosen, rejected
    if isinstance(prompt, str):
        # Beside whole conversations, a plain prompt only repeats their user's turn.
        split = _split_prompt(chosen, rejected)
        return split if split[0] else (prompt, chosen, rejected)
    # `chosen` and `rejected` may repeat the prompt; TRL would then train on it twice.
    length = len(prompt)
    if chosen[:length] == rejected[:length] == prompt and min(len(chosen), len(rejected)) > length:
        return prompt, chosen[length:], rejected[length:]
    return prompt, chosen, rejected


def _split_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Split off the common beginning as the prompt, by the rules of TRL's `extract_prompt`.

    A completion keeps at least its last message or character, and a space before it.
    """
    shorter = min(len(chosen), len(rejected))
    length = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if length is None:
        length = max(shorter - 1, 0)
    elif length and chosen[length - 1] == " ":
        length -= 1
    return chosen[:length], chosen[length:], rejected[length:]


def _check_serializable(record: Record) -> None:
    """Raise RecordError for what cannot be written as JSON in UTF-8, as the data set stores it."""
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
    # The number of brackets is an upper bound on the depth: few records need the exact walk.
    brackets = content.count("[") + content.count("{")
    values = [record.prompt, record.completion, record.tools, record.chat_template_kwargs]
    if brackets > MAX_NESTING and exceeds_depth(values, MAX_NESTING):
        raise RecordError(f"nested deeper than {MAX_NESTING} levels. Flatten or drop it.")
