"""LibreChat: an exported conversation.

Where: the menu of a conversation > Export, type `json`, gives `TITLE.json`:
`{conversationId, endpoint, title, options, messages: [...]}`. With `include endpoint options` the
file has `options.promptPrefix`, the system prompt; with `export all message branches` it has all
branches; with `recursive` the answers to a message stand in its `children`, in `messages` or
`messagesTree`. A message has `messageId`, `parentMessageId`, `isCreatedByUser`, `text` or `content`
(a list of parts) and, if it was judged, `feedback {rating: thumbsUp | thumbsDown, tag, text}`. The
messages may also be rows themselves, as in a dump of the collection `messages`; those of one
conversation (`conversationId`) must follow each other.

Parts of the type `think` become `reasoning_content`, as does the block `:::thinking` with which
older versions begin a text. Tool calls and images are refused.

Source: github.com/danny-avila/LibreChat, client/src/hooks/Conversations/useExportConversation.ts,
client/src/hooks/Messages/useBuildMessageTree.ts, packages/data-provider/src/feedback.ts,
packages/data-provider/src/types/assistants.ts, packages/data-schemas/src/schema/message.ts.
"""

import re
from collections.abc import Iterator, Sequence

from kto_lightning.data.importers.branches import branch_to
from kto_lightning.data.importers.importer import (
    NO_JUDGEMENT,
    UNFINISHED,
    Importer,
    Judged,
    at,
    flag,
    make_record,
    most,
    read_groups,
    refusal,
    to_row,
)
from kto_lightning.data.rows import BadRecord, Row, SkippedRow
from kto_lightning.data.strict_json import RecordError, quote

RATINGS = {"thumbsUp": True, "thumbsDown": False}
ROOT = "00000000-0000-0000-0000-000000000000"
MESSAGE_KEYS = {"messageId", "parentMessageId", "isCreatedByUser"}
_THINKING = re.compile(r"\A:::thinking\n(.*?)\n:::\s*", re.DOTALL)


def matches(rows: Sequence[object]) -> bool:
    """Whether the rows are conversations or messages of LibreChat."""
    return most(rows, lambda row: _is_message(row) or _is_conversation(row))


def records(rows: Iterator[Row | BadRecord]) -> Iterator[Row | BadRecord | SkippedRow]:
    """A row for every judged answer."""
    return read_groups(rows, _conversation_id, _judge)


def _is_message(row: dict) -> bool:
    return row.keys() >= MESSAGE_KEYS


def _is_conversation(row: dict) -> bool:
    messages = _tree(row)
    return bool(messages) and isinstance(messages[0], dict) and _is_message(messages[0])


def _tree(row: dict) -> list | None:
    lists = (row.get(key) for key in ("messages", "messagesTree"))
    return next((value for value in lists if isinstance(value, list)), None)


def _conversation_id(value: object) -> object:
    """None for a row that is a conversation by itself."""
    if not isinstance(value, dict) or not _is_message(value):
        return None
    return str(value.get("conversationId", ""))


def _judge(group: list[Row]) -> Iterator[Row | BadRecord | SkippedRow]:
    """The judged answers of one conversation, whose rows are messages, or one row is all of it."""
    found: list[tuple[Row, dict]] = []
    for row in group:
        messages = _messages_of(row.value)
        if messages is None:
            problem = f"must be a conversation or a message, got {quote(row.value)}. Remove it."
            yield to_row(row, RecordError(problem))
        else:
            found += [(row, message) for message in messages]
    by_id: dict[str, dict] = {}
    for _, message in found:
        key = message["messageId"]
        # Which one an answer belongs to is unknown: its parent is missing then.
        by_id[key] = message if key not in by_id else {"twice": True}
    for row, message in found:
        feedback = message.get("feedback")
        if feedback not in (None, ""):
            yield to_row(row, _judge_message(by_id, message, feedback, _system(row.value)))


def _messages_of(value: object) -> list[dict] | None:
    """The messages of a row, those in `children` too; None if it is none and has none."""
    if not isinstance(value, dict):
        return None
    top = [value] if _is_message(value) else _tree(value)
    if top is None:
        return None
    messages, open_lists = [], [top]
    while open_lists:
        for item in open_lists.pop():
            if not isinstance(item, dict):
                continue
            if isinstance(item.get("messageId"), str):
                messages.append(item)
            if isinstance(item.get("children"), list):
                open_lists.append(item["children"])
    return messages


def _system(value: object) -> object:
    options = at(value, "options")
    return at(options, "promptPrefix") or at(options, "system") or at(value, "promptPrefix")


def _judge_message(
    by_id: dict[str, dict], message: dict, feedback: object, system: object
) -> Judged:
    rating = at(feedback, "rating")
    if rating is None:
        return NO_JUDGEMENT
    label = RATINGS.get(rating) if isinstance(rating, str) else None
    try:
        if label is None:
            raise RecordError(
                f"'feedback.rating' must be thumbsUp or thumbsDown, got {quote(rating)}. Fix it."
            )
        if flag(message.get("unfinished")) is True:
            return UNFINISHED
        branch = branch_to(by_id, message["messageId"], "parentMessageId", ROOT)
        tag = at(feedback, "tag")
        return make_record(
            [_message(item) for item in branch],
            label,
            system,
            tag=at(tag, "key") or tag,
            comment=at(feedback, "text"),
            model=message.get("model"),
        )
    except RecordError as problem:
        return problem


def _message(message: dict) -> dict:
    """Raises RecordError for a message that is not text, or is no answer of the model."""
    key, is_user = message.get("messageId"), flag(message.get("isCreatedByUser"))
    if "twice" in message:
        raise RecordError("two messages have the same 'messageId'. Export the conversation again.")
    if not isinstance(is_user, bool):
        raise refusal(key, f"must have true or false in 'isCreatedByUser', got {quote(is_user)}")
    if flag(message.get("error")):
        raise refusal(key, "is an error of the server or of the model")
    for attached in ("files", "attachments", "quotes"):
        if message.get(attached) not in (None, "", [], "[]"):
            raise refusal(key, f"has '{attached}', which the model got besides the text")
    text, reasoning = _parts(key, message)
    if not text.strip():
        raise refusal(key, "has no text")
    converted = {"role": "user" if is_user else "assistant", "content": text}
    return {**converted, "reasoning_content": reasoning} if reasoning else converted


def _parts(key: object, message: dict) -> tuple[str, str]:
    """The text of a message and its reasoning."""
    parts = message.get("content")
    if not isinstance(parts, list) or not parts:
        text = message.get("text")
        if not isinstance(text, str):
            raise refusal(key, f"must have text in 'text', got {quote(text)}")
        block = _THINKING.match(text) if text.startswith(":::") else None
        return (text[block.end() :], block[1]) if block else (text, "")
    texts: dict[str, list[str]] = {"text": [], "think": []}
    for part in parts:
        kind = at(part, "type")
        if kind == "agent_update":  # names the agent that goes on
            continue
        text = at(part, kind) if kind in ("text", "think") else None
        text = at(text, "value") if isinstance(text, dict) else text
        if not isinstance(text, str):
            raise refusal(key, f"holds a part of the type {quote(kind)} that is not text")
        texts[str(kind)].append(text)
    return _join(texts["text"]), "\n\n".join(texts["think"])


def _join(texts: list[str]) -> str:
    """Texts between which a part of another kind stood, apart as LibreChat sends them."""
    joined = ""
    for text in texts:
        apart = not joined or joined[-1].isspace() or not text or text[0].isspace()
        joined += text if apart else " " + text
    return joined


IMPORTER = Importer(
    what="a LibreChat conversation",
    matches=matches,
    records=records,
    nothing_found="the file is an export of LibreChat in which no answer is judged. Only thumbs up "
    "and down that were given before the conversation was exported are in the file.",
)
