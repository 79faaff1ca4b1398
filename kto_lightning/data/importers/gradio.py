"""Gradio: the log of a `ChatInterface` with `flagging_mode="manual"`.

Where: `flagging_dir` (by default `.gradio/flagged`) has `log.csv`. Its header has the five names
`conversation,index,value,flag,timestamp`, its rows have four cells (named in `sources/csv_files`):
the conversation as JSON, the place of the judged answer in it, the option that was chosen (`Like`,
`Dislike`, another one of `flagging_options`, nothing where a judgement was taken back), the time.
The conversation is a list of `{role, content, metadata, options}`, with `content` a text or, since
version 6, a list of parts, and the place `[first, last]` that of the judged group of messages; or,
with `type="tuples"` up to version 5, a list of `[question, answer]`, and the place `[row, 1]`. A
cell with `,-` or the like in it is written with a `'` before it.

Messages with a title in `metadata` are thoughts, which become `reasoning_content`; texts of one
group are one answer. The log has no system prompt. Other options than `Like` and `Dislike` stay
words, for `--data.labels`. A judgement that was changed later is a row of its own:
see `--data.repeated`. (`dataset1.csv` of an `Interface` is an ordinary table, read by columns.)

Source: github.com/gradio-app/gradio, gradio/flagging.py (`ChatCSVLogger`), gradio/utils.py,
gradio/components/chatbot.py, js/chatbot/shared/ChatBot.svelte, js/chatbot/shared/utils.ts.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from kto_lightning.data.importers.importer import (
    NO_JUDGEMENT,
    Importer,
    Judged,
    at,
    make_record,
    most,
    read_each,
)
from kto_lightning.data.rows import BadRecord, Row, SkippedRow
from kto_lightning.data.strict_json import RecordError, parse_json, quote

LABELS = {"Like": True, "Dislike": False}
ROLES = ("user", "assistant", "system")


class _Entry(NamedTuple):
    """A message of a conversation in either form."""

    place: tuple[int, int]
    """Its index; and, in a pair of question and answer, 0 for the question; else 1."""
    role: str
    text: str
    thought: bool


def matches(rows: Sequence[object]) -> bool:
    """Whether the rows are judgements of a chat interface's log."""
    return most(rows, _is_judgement)


def records(rows: Iterator[Row | BadRecord]) -> Iterator[Row | BadRecord | SkippedRow]:
    """A row for every judgement."""
    return read_each(rows, _judge)


def _is_judgement(row: dict) -> bool:
    conversation = row.get("conversation")
    listed = isinstance(conversation, list) or (
        isinstance(conversation, str) and conversation.startswith(("[", "'["))
    )
    return listed and {"index", "value"} <= row.keys()


def _judge(value: object) -> Iterator[Judged]:
    if not isinstance(value, dict) or not _is_judgement(value):
        yield RecordError(
            f"a judgement must have 'conversation', 'index' and 'value', got {quote(value)}. "
            "Remove it.",
            kind="a judgement must have 'conversation', 'index' and 'value'",
        )
        return
    option = value["value"]
    if option in (None, ""):
        yield NO_JUDGEMENT
        return
    try:
        if not isinstance(option, str):
            raise RecordError(f"'value' must be the chosen option, got {quote(option)}. Fix it.")
        entries = _entries(_parsed("conversation", value["conversation"]))
        judged = _place(_parsed("index", value["index"]), entries)
        if entries[-1].place > judged:
            entries = [entry for entry in entries if entry.place <= judged]
        messages = _messages(entries)
        yield make_record(messages, LABELS.get(option, option), value=option)
    except RecordError as problem:
        yield problem


@lru_cache(maxsize=1000)
def _parse_place(text: str) -> object:
    """As `parse_json`; most judgements of a log are at the same few places."""
    return parse_json(text)


def _parsed(key: str, value: object) -> object:
    """The value of a cell, which is JSON text in the file."""
    if not isinstance(value, str):
        return value
    try:
        text = value.removeprefix("'")
        return _parse_place(text) if key == "index" else parse_json(text, unique_keys=False)
    except RecordError as problem:
        raise RecordError(f"'{key}' is {problem}", kind=f"'{key}' is not JSON") from problem


def _entries(conversation: object) -> list[_Entry]:
    """Raises RecordError for a conversation in neither of the two forms."""
    if not isinstance(conversation, list):
        raise RecordError(f"'conversation' must be a list, got {quote(conversation)}. Remove it.")
    entries = []
    for index, item in enumerate(conversation):
        if isinstance(item, dict) and item.get("role") in ROLES:
            text = _text(index, item.get("content"))
            thought = bool(at(item, "metadata", "title"))
            entries.append(_Entry((index, 1), item["role"], text, thought))
        elif isinstance(item, list) and len(item) == 2:
            entries += [
                _Entry((index, side), ROLES[side], _text(index, text), False)
                for side, text in enumerate(item)
                if text is not None
            ]
        else:
            raise RecordError(
                f"item {index + 1} of 'conversation' must be a message or a question with its "
                f"answer, got {quote(item)}. Remove the row.",
                kind="an item of 'conversation' must be a message",
            )
    return entries


def _text(index: int, content: object) -> str:
    if isinstance(content, str):
        return content
    # A file is an object, or a list of its path and its alternative text.
    texts = [at(part, "text") for part in content] if isinstance(content, list) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RecordError(
            f"item {index + 1} of 'conversation' holds more than text: {quote(content)}. "
            "Remove the row.",
            kind="a message holds more than text",
        )
    return "".join(map(str, texts))


def _place(index: object, entries: list[_Entry]) -> tuple[int, int]:
    """The place of the last message of the judged answer."""
    match index:
        case bool():
            place = None
        case int():
            place = (index, 1)
        case [int(), int(1)] if any(entry.place[1] == 0 for entry in entries):
            place = (index[0], 1)
        case [int(), int()]:
            place = (index[1], 1)
        case _:
            place = None
    if place is None or all(entry.place != place for entry in entries):
        raise RecordError(
            f"'index' must be the place of an answer in the conversation, got {quote(index)}. "
            "Remove the row.",
            kind="'index' must be the place of an answer",
        )
    return place


def _messages(entries: list[_Entry]) -> list[dict]:
    """The messages of a chat; the assistant's that follow each other are one, with its thoughts."""
    messages: list[dict] = []
    for _, role, text, thought in entries:
        key = "reasoning_content" if thought else "content"
        if role != "assistant":
            messages.append({"role": role, "content": text})
        elif messages and messages[-1]["role"] == role:
            before = messages[-1].get(key)
            messages[-1][key] = text if before is None else f"{before}\n{text}"
        else:
            messages.append({"role": role, key: text})
    for message in messages:
        if message["role"] == "assistant" and not message.get("content", "").strip():
            raise RecordError("an answer in the conversation has no text. Remove the row.")
    return messages


IMPORTER = Importer(
    what="the log of a Gradio chat",
    matches=matches,
    records=records,
    nothing_found="the file is the log of a Gradio chat in which every judgement was taken back.",
)
