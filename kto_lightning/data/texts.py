"""Prompts and completions as the fields of a row give them: plain text, or chat messages."""

from collections.abc import Iterable

from kto_lightning.data.messages import is_message, parse_messages
from kto_lightning.data.strict_json import RecordError, parse_json_or_text, quote

Text = str | list[dict]
SYSTEM_KEYS = ("system", "system_prompt")
SYSTEM_ROLES = ("system", "developer")
MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")
TEXT_PARTS = (None, "text", "input_text", "output_text")
"""Values of `type` in the parts of content that are text and nothing else."""
MAX_NAMES = 40


def key_names(keys: Iterable[object]) -> str:
    """The names of a row's keys, for an error message."""
    names = [quote(str(key))[1:-1] for key in keys]
    shown = ", ".join(names[:MAX_NAMES])
    return shown + (f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else "")


def missing_key_error(key: str, row: dict) -> RecordError:
    """The error for a row without the field `key`; it names the keys that are there."""
    add = "give it a label" if key == "label" else "add it"
    if key in row:
        return RecordError(f"'{key}' is null. Drop the line or fill it in.")
    return RecordError(
        f"'{key}' is missing; the record has {key_names(row) or 'no key'}. Drop the line or {add}.",
        kind=f"'{key}' is missing",
    )


def parse_text(key: str, row: dict, from_table: bool) -> Text:
    """Parse the prompt or completion in field `key`; `from_table`: see `Row`.

    Raises:
        RecordError: if it is missing, or neither text nor messages.
    """
    value = row.get(key)
    if value is None:
        raise missing_key_error(key, row)
    if isinstance(value, str):
        content = parse_json_or_text(value) if from_table and value[:1] in ("[", "{") else None
        content = [content] if is_message(content) else content
        if not isinstance(content, list) or not content or not all(map(is_message, content)):
            return value
        return parse_messages(key, content, from_table=False)
    return parse_messages(key, value, from_table)


def parse_system(fields: dict) -> str | None:
    """The system prompt that stands in a field of its own; None without one.

    Raises:
        RecordError: if it is not text, or two fields give different ones.
    """
    found = {key: fields[key] for key in SYSTEM_KEYS if fields.get(key) is not None}
    for key, value in found.items():
        if not isinstance(value, str):
            raise RecordError(f"'{key}' must be text, got {quote(value)}. Fix or remove it.")
    texts = {value for value in found.values() if value.strip()}
    if len(texts) > 1:
        raise RecordError("'system' and 'system_prompt' differ. Keep one of the two.")
    return texts.pop() if texts else None


def add_system(prompt: Text, completion: Text, system: str | None) -> Text:
    """The prompt with `system` as its first message.

    Raises:
        RecordError: beside plain text, and where a system message stands already.
    """
    if system is None:
        return prompt
    if isinstance(prompt, str) or isinstance(completion, str):
        raise RecordError(
            f"the system prompt {quote(system)} stands beside plain text, which has no place for "
            "it. Write prompt and completion as messages, as --data.chat true does, or put it into "
            "the prompt.",
            kind="'system' stands beside plain text",
        )
    if any(message["role"] in SYSTEM_ROLES for message in [*prompt, *completion]):
        raise RecordError(
            f"the system prompt {quote(system)} stands beside messages that have one already. "
            "Keep one of the two.",
            kind="'system' stands beside a system message",
        )
    return [{"role": "system", "content": system}, *prompt]


def check_no_media(fields: dict) -> None:
    """Raise RecordError for a field with images, videos or sound, which are not trained on."""
    for key in MEDIA_KEYS:
        if fields.get(key) not in (None, "", [], {}):
            raise RecordError(f"'{key}' is given, but only text is trained on. Drop the line.")


def check_text_only(messages: Iterable[dict]) -> None:
    """Raise RecordError for messages that carry images, videos, sound or other parts than text."""
    for message in messages:
        check_no_media(message)
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") not in TEXT_PARTS:
                raise RecordError(
                    f"a message holds a part of the type {quote(part['type'])[1:-1]}, but only "
                    "text is trained on. Drop the line."
                )
            if isinstance(part, dict):
                check_no_media(part)
