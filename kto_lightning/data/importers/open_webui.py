"""Open WebUI: the feedback history, and exported chats with rated answers.

Where: Admin Panel > Evaluations > Feedback (`Feedback History`) > Export > JSON gives
`feedback-history-export-TIME.json`, as does `/api/v1/evaluations/feedbacks/all/export`. Each item
has `data.rating` (1 or -1, also as text), `data.details.rating` (1 to 10), `data.reason`,
`data.comment`, `data.tags`, `data.model_id`, `meta.message_id` (the judged message, often not the
last one) and `snapshot.chat`, the chat as it was when it was rated:
`chat.history.messages {id: {role, content, parentId}}`, `chat.params.system`. Lists that the API
gives without `/export`, and the CSV file, leave the snapshot out. Settings > Data Controls >
Export All Chats gives `[{chat: {history}}]`, in which `annotation.rating` of a message is the
judgement.

What an answer was before it was text is written into it as `<details type="...">`: `reasoning`
becomes `reasoning_content`; tool calls and code that was run cannot be told from what the model
wrote, so such answers are refused, as are messages with files, whose contents the export lacks.

Source: github.com/open-webui/open-webui, backend/open_webui/models/feedbacks.py,
backend/open_webui/routers/evaluations.py, backend/open_webui/utils/middleware.py,
src/lib/components/chat/Chat.svelte, src/lib/utils/index.ts.
"""

import html
import re
from collections.abc import Iterator, Sequence

from kto_lightning.data.importers.branches import branch_to
from kto_lightning.data.importers.importer import (
    NO_JUDGEMENT,
    UNFINISHED,
    Importer,
    Judged,
    at,
    make_record,
    most,
    read_each,
    refusal,
)
from kto_lightning.data.rows import BadRecord, Row, SkippedRow
from kto_lightning.data.strict_json import RecordError, quote

RATINGS = {1: True, "1": True, -1: False, "-1": False}
ROLES = ("user", "assistant", "system")
WHERE = "Admin Panel > Evaluations > Feedback > Export > JSON"
_DETAILS = re.compile(r'<details\s+type="([a-z_]+)"[^<>]*>')


def matches(rows: Sequence[object]) -> bool:
    """Whether the rows are feedback, rated chats, or the CSV file of the feedback history."""
    return most(rows, lambda row: _is_feedback(row) or _is_chat(row) or _is_csv(row))


def records(rows: Iterator[Row | BadRecord]) -> Iterator[Row | BadRecord | SkippedRow]:
    """A row for every rated answer."""
    return read_each(rows, _judge)


def _is_feedback(row: dict) -> bool:
    rated = isinstance(row.get("data"), dict) and "rating" in row["data"]
    return rated and ("snapshot" in row or at(row, "meta", "message_id") is not None)


def _is_chat(row: dict) -> bool:
    return isinstance(at(row, "chat", "history", "messages"), dict)


def _is_csv(row: dict) -> bool:
    return {"model_id", "sibling_model_ids", "rating", "reason", "comment"} <= row.keys()


def _judge(value: object) -> Iterator[Judged]:
    row = value if isinstance(value, dict) else {}
    if _is_chat(row):
        yield from _judge_chat(row["chat"])
        return
    rating = at(row, "data", "rating")
    try:
        label = _label(rating)
        if _is_csv(row):
            raise RecordError(f"a CSV file of the ratings has no conversations. Use {WHERE}.")
        if not _is_feedback(row):
            raise RecordError(
                f"a feedback must have 'data.rating' and 'snapshot', got {quote(value)}. "
                "Remove it.",
                kind="a feedback must have 'data.rating' and 'snapshot'",
            )
        chat = at(row, "snapshot", "chat", "chat")
        if not isinstance(at(chat, "history", "messages"), dict):
            raise RecordError(
                "the feedback holds no 'snapshot' of its chat, so what was asked and answered is "
                f"unknown. Use {WHERE}."
            )
        yield (
            NO_JUDGEMENT
            if label is None
            else _record(chat, at(row, "meta", "message_id"), label, row["data"])
        )
    except RecordError as problem:
        yield problem


def _judge_chat(chat: dict) -> Iterator[Judged]:
    for key, message in chat["history"]["messages"].items():
        annotation = at(message, "annotation")
        if not isinstance(annotation, dict):
            continue
        try:
            label = _label(annotation.get("rating"))
            yield NO_JUDGEMENT if label is None else _record(chat, key, label, annotation)
        except RecordError as problem:
            yield problem


def _label(rating: object) -> bool | None:
    if rating in (None, "", "0") or (rating is not False and rating == 0):
        return None
    label = RATINGS.get(rating) if isinstance(rating, int | float | str) else None
    if label is None or isinstance(rating, bool):
        raise RecordError(f"'rating' must be 1 or -1, got {quote(rating)}. Fix or remove it.")
    return label


def _record(chat: object, judged: object, label: bool, judgement: dict) -> Judged:
    """Raises RecordError if the conversation up to the judged message is not complete."""
    messages = at(chat, "history", "messages")
    assert isinstance(messages, dict)
    if not isinstance(judged, str):
        raise RecordError(
            f"'meta.message_id' must name the judged message, got {quote(judged)}. Remove it."
        )
    messages = {key: message for key, message in messages.items() if isinstance(message, dict)}
    branch = branch_to(messages, judged, "parentId")
    if branch[-1].get("done") is False:
        return UNFINISHED
    system = at(chat, "params", "system") or at(chat, "system")
    return make_record(
        [_message(message) for message in branch],
        label,
        system,
        details_rating=at(judgement, "details", "rating"),
        reason=judgement.get("reason"),
        comment=judgement.get("comment"),
        tags=judgement.get("tags"),
        model=judgement.get("model_id") or branch[-1].get("model"),
    )


def _message(message: dict) -> dict:
    """Raises RecordError for a message that is not text, or is no answer of the model."""
    key, role, content = message.get("id"), message.get("role"), message.get("content")
    if role not in ROLES:
        raise refusal(key, f"must have one of the roles {', '.join(ROLES)}, got {quote(role)}")
    if message.get("error"):
        raise refusal(key, "is an error of the server or of the model")
    if message.get("files"):
        raise refusal(key, "has files, whose contents the export lacks")
    if not isinstance(content, str) or not content.strip():
        raise refusal(key, f"must have text in 'content', got {quote(content)}")
    if role != "assistant" or "<details" not in content:
        return {"role": role, "content": content}
    return _split_reasoning(key, content)


def _split_reasoning(key: object, content: str) -> dict:
    """An answer, with the reasoning that stands before or in it in a key of its own."""
    texts, reasoning, end = [], [], 0
    for opening in _DETAILS.finditer(content):
        if opening.start() < end:  # a part of the reasoning
            continue
        closing = content.find("</details>", opening.end())
        if opening[1] != "reasoning":
            block = f"a block of the type '{opening[1]}'"
            raise refusal(key, f"holds {block}, which the model has not written as text")
        if closing < 0:
            raise refusal(key, "holds reasoning that does not end")
        texts.append(content[end : opening.start()])
        reasoning.append(_unquote(content[opening.end() : closing]))
        end = closing + len("</details>")
    if not reasoning:
        return {"role": "assistant", "content": content}
    answer = "".join([*texts, content[end:]]).strip()
    if not answer:
        raise refusal(key, "holds reasoning and no answer")
    return {"role": "assistant", "content": answer, "reasoning_content": "\n\n".join(reasoning)}


def _unquote(block: str) -> str:
    """The reasoning of a block; each line is quoted with `> `, in newer versions as HTML."""
    text = block.strip()
    if text.startswith("<summary>") and "</summary>" in text:
        text = text.partition("</summary>")[2].strip()
    text = html.unescape(text) if text.startswith("&gt;") else text
    return "\n".join(line.removeprefix(">").removeprefix(" ") for line in text.splitlines())


IMPORTER = Importer(
    what="an Open WebUI feedback history",
    matches=matches,
    records=records,
    nothing_found="the file is an export of Open WebUI in which no answer is rated. The export "
    f"with ratings is at {WHERE}.",
)
