"""Chainlit: threads as its data layers return them.

Where: Chainlit has no export of its own. A data layer's `get_thread` (and `list_threads`, as
`{pageInfo, data: [threads]}`) gives a thread as `{id, createdAt, name, metadata, steps, elements}`,
to be written as JSON; all data layers give this form. Of its steps, those of the types
`user_message` and `assistant_message` are the conversation, in the order of `createdAt`; runs,
tools and calls of models are how an answer came about. A step that was judged has
`feedback {forId, value, comment}`, with the value 1 or 0. Chainlit shows the buttons at the last
answer of a run and stores the judgement at the run: a judged run is its last answer. The steps of
threads may also be rows themselves, those of one thread (`threadId`) after each other.

Files sent with a message (`elements` with its id in `forId`) are refused: the thread lacks their
contents. What an answer shows beside its text, such as sources, is left out.

Source: github.com/Chainlit/chainlit, backend/chainlit/types.py, backend/chainlit/step.py,
backend/chainlit/callbacks.py, backend/chainlit/data/sql_alchemy.py,
frontend/src/components/chat/Messages/index.tsx.
"""

from collections.abc import Iterator, Sequence

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

ROLES = {"user_message": "user", "assistant_message": "assistant", "system_message": "system"}
STEP_KEYS = {"id", "threadId", "type", "output"}


def matches(rows: Sequence[object]) -> bool:
    """Whether the rows are threads or steps of Chainlit."""
    return most(rows, lambda row: _is_step(row) or _is_thread(row))


def records(rows: Iterator[Row | BadRecord]) -> Iterator[Row | BadRecord | SkippedRow]:
    """A row for every judged answer."""
    return read_groups(rows, _thread_id, _judge)


def _is_step(row: object) -> bool:
    return isinstance(row, dict) and row.keys() >= STEP_KEYS and "parentId" in row


def _is_thread(row: dict) -> bool:
    steps = row.get("steps")
    return isinstance(steps, list) and any(map(_is_step, steps))


def _thread_id(value: object) -> object:
    """None for a row that is a thread by itself."""
    return str(at(value, "threadId")) if _is_step(value) else None


def _judge(group: list[Row]) -> Iterator[Row | BadRecord | SkippedRow]:
    """The judged answers of one thread, whose rows are steps, or one row is all of it."""
    steps: list[tuple[Row, dict]] = []
    for row in group:
        found = [row.value] if _is_step(row.value) else at(row.value, "steps")
        if isinstance(found, list):
            steps += [(row, step) for step in found if isinstance(step, dict)]
        else:
            problem = f"must be a thread or a step, got {quote(row.value)}. Remove it."
            yield to_row(row, RecordError(problem))
    if all(isinstance(step.get("createdAt"), str) for _, step in steps):
        steps.sort(key=lambda item: item[1]["createdAt"])
    elements = at(group[0].value, "elements")
    with_files = [at(item, "forId") for item in elements] if isinstance(elements, list) else []
    messages = [step for _, step in steps if str(step.get("type")) in ROLES]
    for row, step in steps:
        feedback = step.get("feedback")
        if feedback not in (None, ""):
            yield to_row(row, _judge_step(messages, step, feedback, with_files))


def _judge_step(messages: list[dict], step: dict, feedback: object, with_files: list) -> Judged:
    value = at(feedback, "value")
    if value is None:
        return NO_JUDGEMENT
    try:
        if value not in (0, 1):
            raise RecordError(f"'feedback.value' must be 0 or 1, got {quote(value)}. Fix it.")
        last = _answer(messages, step)
        if flag(messages[last].get("streaming")) is True:
            return UNFINISHED
        return make_record(
            [_message(message, with_files) for message in messages[: last + 1]],
            value == 1,
            comment=at(feedback, "comment"),
        )
    except RecordError as problem:
        return problem


def _answer(messages: list[dict], step: dict) -> int:
    """The index of the judged message: the step itself, or the last answer of the run it is."""
    for index in reversed(range(len(messages))):
        message = messages[index]
        in_run = message.get("parentId") == step.get("id") and step.get("id") is not None
        if message is step or (in_run and message["type"] == "assistant_message"):
            return index
    raise RecordError(
        f"the judged step {quote(step.get('id'))} is of the type {quote(step.get('type'))} and has "
        "no answer. Remove the judgement.",
        kind="the judged step has no answer",
    )


def _message(step: dict, with_files: list) -> dict:
    """Raises RecordError for a message that is not text, or is no answer of the model."""
    key, role, text = step.get("id"), ROLES[step["type"]], step.get("output")
    if flag(step.get("isError")):
        raise refusal(key, "is an error of the app")
    if with_files and role == "user" and key in with_files:
        raise refusal(key, "has files, whose contents the thread lacks")
    if not isinstance(text, str) or not text.strip():
        raise refusal(key, f"must have text in 'output', got {quote(text)}")
    return {"role": role, "content": text}


IMPORTER = Importer(
    what="threads of Chainlit",
    matches=matches,
    records=records,
    nothing_found="the file has threads of Chainlit in which no answer is judged. Write the "
    "threads as the data layer's `get_thread` returns them, with `feedback` in their steps.",
)
