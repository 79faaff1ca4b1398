"""Chat messages in the shape that chat templates expect: `role`, `content` and further keys.

ShareGPT's `from` and `value` are translated; a table's filled-in nulls are taken out again.
"""

from kto_lightning.data.strict_json import Unusable, json_or_text, shown, without_none

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
    """Whether `value` has a speaker, named as chat templates or as ShareGPT do."""
    return isinstance(value, dict) and ("role" in value or "from" in value)


def parse_messages(key: str, value: object, cells: bool) -> list[dict]:
    """The messages of field `key`, a list or the JSON text of one; `cells`: see `Row`.

    Raises:
        Unusable: for no message, one without a speaker, and one without content or tool calls.
    """
    if isinstance(value, str):
        value, cells = json_or_text(value), False
    if not isinstance(value, list) or not value:
        kind = "a non-empty list of messages"
        kind = kind if key in ("messages", "conversations") else f"a string or {kind}"
        raise Unusable(f"'{key}' must be {kind}, got {shown(value)}. Mend or drop the line.")
    return [_message(f"{key}[{index}]", item, cells) for index, item in enumerate(value)]


def _message(where: str, value: object, cells: bool) -> dict:
    if cells and isinstance(value, str):  # how parquet keeps a column of `datasets`' type Json
        value, cells = json_or_text(value), False
    if not isinstance(value, dict) or not is_message(value):
        raise Unusable(
            f"'{where}' must be an object with 'role' and 'content', got {shown(value)}. "
            "Mend or drop the line."
        )
    # A null key means what a missing one means, but templates ask whether `content` is null.
    message = {key: item for key, item in value.items() if item is not None or key == "content"}
    if cells:
        message = {key: without_none(item) for key, item in message.items()}
    message = _from_sharegpt(where, message) if "role" not in message else message
    if not isinstance(message["role"], str) or not message["role"]:
        raise Unusable(f"'{where}.role' must be a name, got {shown(message['role'])}. Mend it.")
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
    raise Unusable(
        f"'{where}.content' must be text (null only beside 'tool_calls'), got {shown(content)}. "
        "Mend or drop the line."
    )


def _from_sharegpt(where: str, message: dict) -> dict:
    speaker = message.get("from")
    speaker = speaker.lower() if isinstance(speaker, str) else speaker
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(SHAREGPT_ROLES)
        raise Unusable(f"'{where}.from' must be one of {known}, got {shown(speaker)}. Mend it.")
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    text = message.get("value")
    calls = _calls(text) if speaker == "function_call" else None
    if calls:
        return {"role": role, "content": "", "tool_calls": calls, **rest}
    return {"role": role, "content": text, **rest}


def _calls(text: object) -> list[dict] | None:
    """ShareGPT's `{"name": …, "arguments": …}`, or a list of them, as tool calls; else None."""
    content = json_or_text(text) if isinstance(text, str) else text
    functions = content if isinstance(content, list) else [content]
    if not all(
        isinstance(item, dict) and {"name", "arguments"} <= item.keys() for item in functions
    ):
        return None
    return [{"type": "function", "function": function} for function in functions]


def last_turn(messages: list[dict]) -> tuple[list[dict], list[dict]]:
    """The last turn of the assistant, which the label judges, and all that stands before it."""
    turns = [index for index, item in enumerate(messages) if item["role"] == "assistant"]
    if not turns:
        raise Unusable("no message is the assistant's: nothing to judge. Drop the line.")
    return messages[: turns[-1]], messages[turns[-1] : turns[-1] + 1]
