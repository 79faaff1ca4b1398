"""One row of a source → the records in it: the forms that records, labels and messages may take.

Three forms: `{prompt, completion, label}`, `{messages | conversations, label}` and
`{chosen, rejected}` with or without `prompt`, which gives two records, the chosen one first.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from kto_lightning.data.messages import is_message, last_turn, parse_messages
from kto_lightning.data.sources import COLUMNS, Row
from kto_lightning.data.strict_json import Unusable, is_deeper, json_or_text, shown, without_none

LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False} | {
    "desirable": True,
    "undesirable": False,
}
SET_BY_THE_TOKENIZATION = {"tokenize", "return_dict", "return_tensors", "add_generation_prompt"} | {
    "conversation",
    "continue_final_message",
    "padding",
    "truncation",
    "max_length",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}
MAX_NESTING = 100
FLOAT32 = np.finfo(np.float32)

Text = str | list[dict]


@dataclass(kw_only=True, slots=True)
class Record:
    """A completion that somebody liked or did not, with its prompt; not yet tokenized."""

    prompt: Text
    """Plain text or chat messages; of the same kind as the completion."""
    completion: Text
    desirable: bool
    weight: float = 1.0
    """The record's own weight, which multiplies its class's."""
    tools: list | None = None
    chat_template_kwargs: dict = field(default_factory=dict)
    file: str
    """The source as it was named: a path, or a hub data set's id."""
    line: int
    """From 1: the line of a jsonl or csv file, elsewhere the row."""


def is_conversational(record: Record) -> bool:
    """Whether the record is made of chat messages, which take a chat template."""
    return isinstance(record.prompt, list)


def encode(record: Record) -> str:
    """The record's text as JSON, its keys in their order, for chat templates print objects."""
    content = {
        "prompt": record.prompt,
        "completion": record.completion,
        "tools": record.tools,
        "chat_template_kwargs": record.chat_template_kwargs,
    }
    return json.dumps(content, ensure_ascii=False, allow_nan=False)


def records_of(row: Row) -> Iterator[Record]:
    """The records of one row: one, or two for a pair.

    Raises:
        Unusable: with a message that says what is wrong, what was got and what to do.
    """
    if not isinstance(row.value, dict):
        raise Unusable(f"a record must be a JSON object, got {shown(row.value)}. Drop or wrap it.")
    fields = {key: value for key, value in row.value.items() if value is not None}
    common = {
        "weight": _weight(fields.get("weight", 1.0)),
        "tools": _tools(fields.get("tools"), row.cells),
        "chat_template_kwargs": _template_kwargs(fields.get("chat_template_kwargs"), row.cells),
        "file": row.file,
        "line": row.line,
    }
    for prompt, completion, desirable in _forms(row.value, fields, row.cells):
        prompt, completion = _match_kinds(prompt, completion)
        record = Record(prompt=prompt, completion=completion, desirable=desirable, **common)
        _check_serializable(record)
        yield record


def _forms(row: dict, fields: dict, cells: bool) -> list[tuple[Text, Text, bool]]:
    if "chosen" in fields or "rejected" in fields:
        prompt, chosen, rejected = _pair(fields, cells)
        return [(prompt, chosen, True), (prompt, rejected, False)]
    for key in ("messages", "conversations"):
        if key in fields and "completion" not in fields:
            prompt, completion = last_turn(parse_messages(key, fields[key], cells))
            return [(prompt, completion, _label(row))]
    prompt, completion = _text("prompt", row, cells), _text("completion", row, cells)
    return [(prompt, completion, _label(row))]


def _missing(key: str, row: dict) -> Unusable:
    if key in row:
        return Unusable(f"'{key}' is null. Drop the line or fill it in.")
    has = shown(", ".join(name for name in COLUMNS if name in row) or ", ".join(map(str, row)))
    return Unusable(f"'{key}' is missing; the record has {has}. Drop the line or add it.")


def _label(row: dict) -> bool:
    if "label" not in row:
        raise Unusable("'label' is missing. Drop the line or give it a label.")
    label = row["label"]
    if isinstance(label, str):
        known = LABELS.get(label.strip().lower())
    else:
        known = bool(label) if isinstance(label, int | float) and label in (0, 1) else None
    if known is None:
        raise Unusable(
            f"'label' must be true or false, got {shown(label)}. Drop the line or give it a label."
        )
    return known


def _weight(value: object) -> float:
    try:
        weight = float(value) if isinstance(value, str) else value
    except ValueError:
        weight = None
    # The bounds keep the float32 column from turning it into 0 or infinity.
    lowest, highest = float(FLOAT32.tiny), float(FLOAT32.max)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        weight = None
    if weight is None or not lowest <= weight <= highest:
        raise Unusable(
            f"'weight' must be a positive, finite number, got {shown(value)}. Mend it, or leave "
            "it out for 1.0."
        )
    return float(weight)


def _tools(value: object, cells: bool) -> list | None:
    tools = json_or_text(value) if isinstance(value, str) else value
    tools = without_none(tools) if cells and not isinstance(value, str) else tools
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable(f"'tools' must be a list of objects, got {shown(value)}. Mend or drop it.")
    return tools


def _template_kwargs(value: object, cells: bool) -> dict:
    kwargs = json_or_text(value) if isinstance(value, str) else value
    kwargs = without_none(kwargs) if cells and not isinstance(value, str) else kwargs
    if kwargs is None:
        return {}
    if not isinstance(kwargs, dict):
        raise Unusable(f"'chat_template_kwargs' must be an object, got {shown(value)}. Mend it.")
    reserved = sorted(SET_BY_THE_TOKENIZATION & kwargs.keys())
    if reserved:
        raise Unusable(
            f"'chat_template_kwargs' may not set {', '.join(reserved)}: the tokenization does. "
            "Take it out."
        )
    return kwargs


def _text(key: str, row: dict, cells: bool) -> Text:
    value = row.get(key)
    if value is None:
        raise _missing(key, row)
    if isinstance(value, str):
        content = json_or_text(value) if cells and value.startswith("[") else None
        if not isinstance(content, list) or not content or not all(map(is_message, content)):
            return value
        return parse_messages(key, content, cells=False)
    return parse_messages(key, value, cells)


def _match_kinds(prompt: Text, completion: Text) -> tuple[Text, Text]:
    """Both as text or both as messages: text beside messages is the user's or assistant's turn."""
    if isinstance(prompt, str) and isinstance(completion, list):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    elif isinstance(completion, str) and isinstance(prompt, list):
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(prompt, list) and not prompt:
        raise Unusable("no message stands before the completion. Add a prompt or drop the line.")
    return prompt, completion


def _pair(fields: dict, cells: bool) -> tuple[Text, Text, Text]:
    chosen, rejected = _text("chosen", fields, cells), _text("rejected", fields, cells)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise Unusable("'chosen' and 'rejected' must both be text or both messages. Mend the line.")
    if "prompt" not in fields:
        return _split_prompt(chosen, rejected)
    prompt = _text("prompt", fields, cells)
    if isinstance(chosen, str):
        return prompt, chosen, rejected
    if isinstance(prompt, str):
        # Beside whole conversations a plain prompt only repeats the user's turn in them.
        split = _split_prompt(chosen, rejected)
        return split if split[0] else (prompt, chosen, rejected)
    # TRL would train on the prompt twice if whole conversations stand beside it.
    length = len(prompt)
    if chosen[:length] == rejected[:length] == prompt and min(len(chosen), len(rejected)) > length:
        return prompt, chosen[length:], rejected[length:]
    return prompt, chosen, rejected


def _split_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """The common beginning as the prompt, by the rules of TRL's `extract_prompt`.

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
    """Refuses what could not travel on as JSON in UTF-8 to the chat template."""
    try:
        content = encode(record)
        content.encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise Unusable(
            f"the text holds half a character (\\u{code:04x}). Mend or drop it."
        ) from error
    except (TypeError, ValueError) as error:
        raise Unusable(f"a value cannot be written as JSON ({error}). Mend or drop it.") from error
    # Brackets bound the depth from above, so that few records are walked through.
    brackets = content.count("[") + content.count("{")
    values = [record.prompt, record.completion, record.tools, record.chat_template_kwargs]
    if brackets > MAX_NESTING and is_deeper(values, MAX_NESTING):
        raise Unusable(f"nested deeper than {MAX_NESTING} levels. Flatten or drop it.")
