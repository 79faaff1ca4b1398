"""Conversations as logs write them: other keys for speaker and text, judgements of single turns."""

from collections.abc import Callable, Iterator

from kto_lightning.data.labels import is_unlabeled
from kto_lightning.data.messages import SHAREGPT_ROLES, is_message
from kto_lightning.data.strict_json import RecordError, parse_json_or_text, quote

SPEAKERS = SHAREGPT_ROLES | {
    **dict.fromkeys(("ai", "bot", "chatbot", "agent", "llm", "ai_message"), "assistant"),
    **dict.fromkeys(("prompter", "customer", "client", "person", "user_message"), "user"),
}
"""Roles by the names that logs give them, in lower case."""


def rename_messages(value: object, rename: Callable[[dict], dict]) -> object:
    """The messages of a conversation with `role` and `content`; other values as they are."""
    messages = parse_json_or_text(value)
    if not isinstance(messages, list) or not all(isinstance(item, dict) for item in messages):
        return value
    return [rename(message) for message in messages]


def role_of(speaker: object) -> object:
    """The role that a speaker's name stands for; an unknown name stays."""
    return SPEAKERS.get(speaker.casefold(), speaker) if isinstance(speaker, str) else speaker


def judged_turns(fields: dict, judgement_of: Callable[[dict], object]) -> Iterator[dict]:
    """The fields of a row for each judged answer of its conversation, with the messages up to it.

    A row without a judged answer is one without a label.

    Raises:
        RecordError: if a message that is not the assistant's is judged.
    """
    messages = fields.get("messages")
    messages = parse_json_or_text(messages)
    others = {key: value for key, value in fields.items() if key != "label"}
    if not isinstance(messages, list):
        yield others
        return
    any_judged = False
    for index, message in enumerate(messages):
        judgement = judgement_of(message) if isinstance(message, dict) else None
        if not is_message(message) or is_unlabeled(judgement):
            continue
        role = message.get("role", message.get("from"))
        if role_of(role) != "assistant":
            raise RecordError(
                f"messages[{index}] is judged, but its role is {quote(role)}, and only the "
                "assistant's answers are trained on. Remove the judgement.",
                kind="the judged message is not the assistant's",
            )
        any_judged = True
        yield {**others, "messages": messages[: index + 1], "label": judgement}
    if not any_judged:
        yield others
