"""Chat messages in the form that chat templates expect: `role`, `content` and further keys.

ShareGPT's `from` and `value` are converted; the nulls that tables fill in are dropped.
"""

from kto_lightning.data.strict_json import RecordError, drop_none, parse_json_or_text, quote

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
KEYS_REPLACING_CONTENT = ("tool_calls", "function_call", "reasoning", "reasoning_content")


def is_message(value: object) -> bool:
    """Whether `value` has a `role`, or a `from` as in ShareGPT."""
    return isinstance(value, dict) and ("role" in value or "from" in value)


def parse_messages(key: str, value: object, from_table: bool) -> list[dict]:
    """Parse the messages of field `key`, a list or its JSON text; `from_table`: see `Row`.

    Raises:
        RecordError: if there is no message, or one has no role, or neither content nor tool calls.
    """
    if isinstance(value, str):
        value, from_table = parse_json_or_text(value), False
    if is_message(value):
        value = [value]
    if not isinstance(value, list) or not value:
        kind = "a non-empty list of messages"
        kind = kind if key in ("messages", "conversations") else f"a string or {kind}"
        raise RecordError(f"'{key}' must be {kind}, got {quote(value)}. Fix or remove the line.")
    return [_parse_message(f"{key}[{index}]", item, from_table) for index, item in enumerate(value)]


def _parse_message(where: str, value: object, from_table: bool) -> dict:
    if from_table and isinstance(value, str):  # how parquet stores the type Json of `datasets`
        value, from_table = parse_json_or_text(value), False
    if not isinstance(value, dict) or not is_message(value):
        raise RecordError(
            f"'{where}' must be an object with 'role' and 'content', got {quote(value)}. "
            "Fix or remove the line."
        )
    # A null key means the same as a missing one, but templates test whether `content` is null.
    message = {key: item for key, item in value.items() if item is not None or key == "content"}
    if from_table:
        message = {key: drop_none(item) for key, item in message.items()}
    message = _convert_sharegpt(where, message) if "role" not in message else message
    if not isinstance(message["role"], str) or not message["role"]:
        raise RecordError(f"'{where}.role' must be a name, got {quote(message['role'])}. Fix it.")
    _check_content(where, message)
    return message


def _check_content(where: str, message: dict) -> None:
    content = message.get("content")
    if isinstance(content, str):
        return
    if content is None and any(message.get(key) for key in KEYS_REPLACING_CONTENT):
        return
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return
    raise RecordError(
        f"'{where}.content' must be text (null only beside 'tool_calls'), got {quote(content)}. "
        "Fix or remove the line."
    )


def _convert_sharegpt(where: str, message: dict) -> dict:
    speaker = message.get("from")
    speaker = speaker.lower() if isinstance(speaker, str) else speaker
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(SHAREGPT_ROLES)
        raise RecordError(f"'{where}.from' must be one of {known}, got {quote(speaker)}. Fix it.")
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    text = message.get("value")
    calls = _parse_tool_calls(text) if speaker == "function_call" else None
    if calls:
        return {"role": role, "content": "", "tool_calls": calls, **rest}
    return {"role": role, "content": text, **rest}


def _parse_tool_calls(text: object) -> list[dict] | None:
    """ShareGPT's `{"name": …, "arguments": …}`, or a list of them, as tool calls; else None."""
    content = parse_json_or_text(text)
    functions = content if isinstance(content, list) else [content]
    if not all(
        isinstance(item, dict) and {"name", "arguments"} <= item.keys() for item in functions
    ):
        return None
    return [{"type": "function", "function": function} for function in functions]


def split_last_turn(messages: list[dict]) -> tuple[list[dict], list[dict]]:
    """All messages before the assistant's last one, and that one, which the label applies to.

    Raises:
        RecordError: if no message is the assistant's.
    """
    turns = [index for index, item in enumerate(messages) if item["role"] == "assistant"]
    if not turns:
        raise RecordError(
            "no message has the role assistant, so there is no completion. Remove the line."
        )
    return messages[: turns[-1]], messages[turns[-1] : turns[-1] + 1]
